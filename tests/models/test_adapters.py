# SPDX-License-Identifier: Apache-2.0

"""Adapters alone in a folder, onto a base in the released layout or one that was saved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from alphagrpo_ext.models.adapters import load_adapter, save_adapter
from alphagrpo_ext.models.bagel import LORA_TARGET_MODULES
from alphagrpo_ext.models.bagel.checkpoint import load_released, save_released
from alphagrpo_ext.models.loading import load_model


WEIGHTS = "adapter_model.safetensors"


def adapt(model: torch.nn.Module, r: int = 2) -> PeftModel:
    """An adapter that changes the model's outputs from the start."""
    torch.manual_seed(0)
    config = LoraConfig(r=r, target_modules=LORA_TARGET_MODULES, init_lora_weights=False)
    return get_peft_model(model, config)


@pytest.fixture
def adapter(golden, tmp_path) -> Path:
    """Of the recorded checkpoint in the released layout."""
    save_adapter(adapt(load_released(golden.checkpoint)[0]), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(adapter: Path, fault: str) -> None:
    weights = load_file(adapter / WEIGHTS)
    name = next(name for name in weights if "layers.1.mlp_moe_gen.down_proj.lora_A" in name)
    if fault == "shape":
        weights[name] = weights[name][:, 1:].clone()
    elif fault == "missing":
        del weights[name]
    else:
        weights[name.replace("layers.1", "layers.2")] = weights[name].clone()
    save_file(weights, adapter / WEIGHTS)


def test_adapter_is_saved_alone_and_found_with_its_base(golden, adapter):
    expected = adapt(load_released(golden.checkpoint)[0])
    names = load_file(adapter / WEIGHTS)
    assert names
    assert all(".lora_" in name for name in names)
    assert sorted(path.name for path in adapter.iterdir()) == ["README.md", "adapter_config.json", WEIGHTS]
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        golden.checkpoint
    )

    model, processor = load_model(adapter)
    assert isinstance(model, PeftModel)
    assert processor.generation_system_prompt
    actual = model.state_dict()
    assert actual.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(actual[name], tensor), name
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_adapter_goes_onto_a_copy_of_its_base(golden, adapter, tmp_path):
    save_released(*load_released(golden.checkpoint), tmp_path / "copy")
    model = load_adapter(load_model(tmp_path / "copy", dtype=torch.bfloat16)[0], adapter)
    saved = load_file(adapter / WEIGHTS)
    adapted = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    assert len(adapted) == len(saved)
    for name, parameter in adapted.items():
        # In fp32 over a base in bf16.
        assert torch.equal(parameter, saved[name.replace(".default", "")]), name


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("shape", "mlp_moe_gen.down_proj.lora_A.weight in .* has shape"),
        ("missing", "lacks base_model.*layers.1.mlp_moe_gen.down_proj.lora_A.weight"),
        ("extra", "has base_model.*layers.2.mlp_moe_gen.down_proj.lora_A.weight, which the model does not have"),
    ],
)
def test_weights_must_fit_and_the_base_stays_whole(golden, adapter, fault, message):
    edit(adapter, fault)
    model, _ = load_released(golden.checkpoint)
    before = model.state_dict()
    with pytest.raises(ValueError, match=f"was made for another model.*{message}"):
        load_adapter(model, adapter)
    assert model.state_dict().keys() == before.keys()


def test_adapter_for_another_model(adapter, tiny_bagel):
    with pytest.raises(ValueError, match="was made for another model: .*lora_A.weight in .* has shape"):
        load_adapter(tiny_bagel, adapter)
    with pytest.raises(ValueError, match="was made for another model: adapter_model.safetensors lacks"):
        load_adapter(load_model("bagel-shapes")[0], adapter)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["query_key_value"]}))
    with pytest.raises(ValueError, match="was made for another model: Target modules .*query_key_value"):
        load_adapter(tiny_bagel, adapter)


def test_adapted_model_takes_no_second_adapter(golden, adapter):
    model, _ = load_model(adapter)
    with pytest.raises(ValueError, match="has an adapter already: merge it first"):
        load_adapter(model, adapter)


def test_truncated_adapter_is_named(adapter):
    path = adapter / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is truncated or damaged"):
        load_model(adapter)


def test_missing_file_is_named(golden, adapter, tmp_path):
    (adapter / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {WEIGHTS}"):
        load_model(adapter)
    with pytest.raises(FileNotFoundError, match=f"lacks adapter_config.json, {WEIGHTS}"):
        load_adapter(load_released(golden.checkpoint)[0], tmp_path)


def test_missing_base_is_named(adapter, tmp_path):
    path = adapter / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(FileNotFoundError, match=f"there is no folder {tmp_path / 'gone'}"):
        load_model(adapter)
    path.write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="has no base_model_name_or_path"):
        load_model(adapter)


def test_adapter_is_not_overwritten(golden, adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    with pytest.raises(FileExistsError, match="adapter has files"):
        save_adapter(adapt(load_released(golden.checkpoint)[0], r=4), adapter)
    assert (adapter / WEIGHTS).read_bytes() == (copy / WEIGHTS).read_bytes()
