# SPDX-License-Identifier: Apache-2.0

"""Adapters alone in a folder, onto a base in the released layout or one that was saved."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from alphagrpo_ext.models.adapters import (
    adapter_base,
    check_adapter_numbers,
    fit_adapter_config,
    freeze_parts,
    load_adapter,
    save_adapter,
)
from alphagrpo_ext.models.bagel import LORA_TARGET_MODULES, BagelModel
from alphagrpo_ext.models.bagel.checkpoint import load_released, save_released
from alphagrpo_ext.models.loading import load_model, load_processor


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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lora_alpha", float("nan"), "must be positive, but is nan"),
        ("lora_alpha", float("inf"), "must be positive, but is inf"),
        ("lora_alpha", 0, "must be positive, but is 0"),
        ("lora_alpha", -4, "must be positive, but is -4"),
        ("lora_alpha", "4", "must be a number, but is '4'"),
        ("lora_dropout", 1.0, r"must be in \[0, 1\), but is 1.0"),
        ("r", 2.5, "must be a whole number, but is 2.5"),
        ("r", "2", "must be a whole number, but is '2'"),
        ("r", None, "must be a whole number, but is None"),
        ("alpha_pattern.q_proj", float("nan"), "must be positive, but is nan"),
        ("rank_pattern.q_proj", 2.5, "must be a whole number, but is 2.5"),
        ("qalora_group_size", float("nan"), "must be a finite number, but is nan"),
    ],
)
def test_impossible_number_of_a_configuration_is_named(golden, adapter, name, value, message):
    path = adapter / "adapter_config.json"
    field, _, key = name.partition(".")
    entry = {key: value} if key else value
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: entry}))
    with pytest.raises(ValueError, match=f"^{name} in {path} {message}"):
        load_adapter(load_released(golden.checkpoint)[0], adapter)


def test_alpha_that_is_not_whole_loads(golden, adapter):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 0.5, "alpha_pattern": {"q_proj": 1.5}}))
    assert load_adapter(load_released(golden.checkpoint)[0], adapter).peft_config["default"].lora_alpha == 0.5


def test_types_of_adapters_have_fields_of_their_own():
    for config in (OFTConfig(oft_block_size=4), IA3Config(), LoHaConfig(), AdaLoraConfig(total_step=9)):
        check_adapter_numbers(config, "peft_config")
    with pytest.raises(ValueError, match="^eps in peft_config must be a finite number"):
        check_adapter_numbers(OFTConfig(oft_block_size=4, eps=float("nan")), "peft_config")
    with pytest.raises(ValueError, match="^peft_config is a PromptTuningConfig, which learns a prompt"):
        check_adapter_numbers(PromptTuningConfig(num_virtual_tokens=4), "peft_config")


def test_adapter_of_the_packaged_model_names_it(tmp_path):
    save_adapter(adapt(load_model("bagel-shapes")[0]), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    assert settings["base_model_name_or_path"] == "bagel-shapes"
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert f'pipeline("{tmp_path / "adapter"}")' in card.content
    assert "adapter (PEFT) for the unified multimodal model bagel-shapes" in card.content
    assert card.data.license == "apache-2.0"
    for folder, base in (
        ("/gone/site-packages/alphagrpo_ext/shapes/checkpoint", "bagel-shapes"),
        ("/gone/shapes/checkpoint", "/gone/shapes/checkpoint"),
    ):
        path.write_text(json.dumps(settings | {"base_model_name_or_path": folder}))
        assert adapter_base(tmp_path / "adapter") == base


def test_a_processor_beside_the_adapter_is_the_one_that_it_was_trained_with(tmp_path):
    model, processor = load_model("bagel-shapes")
    save_adapter(adapt(model), tmp_path / "adapter")
    assert load_processor(tmp_path / "adapter").reflection_prompt == processor.reflection_prompt
    processor.reflection_prompt = "mend it : {prompt}"
    processor.save_pretrained(tmp_path / "adapter")
    assert load_processor(tmp_path / "adapter").reflection_prompt == "mend it : {prompt}"
    assert load_model(tmp_path / "adapter")[1].reflection_prompt == "mend it : {prompt}"


def test_adapter_is_not_overwritten(golden, adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    with pytest.raises(FileExistsError, match="adapter has files"):
        save_adapter(adapt(load_released(golden.checkpoint)[0], r=4), adapter)
    assert (adapter / WEIGHTS).read_bytes() == (copy / WEIGHTS).read_bytes()


# Configurations as they are written for language models


def adapted_names(model: PeftModel) -> set[str]:
    """Modules of the policy with a trained weight, adapters and copies left out of the names."""
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name.removeprefix("base_model.model.").split(".lora_")[0].split(".modules_to_save")[0] for name in names}


def fit(model: BagelModel, trains_vision_tower: bool = False, **settings: Any) -> PeftModel:
    """An adapted model, as the trainer makes it."""
    config = fit_adapter_config(LoraConfig(r=2, **settings), model, trains_vision_tower=trains_vision_tower)
    adapted = get_peft_model(model, config)
    freeze_parts(adapted, trains_vision_tower)
    return adapted


@pytest.fixture
def packaged() -> BagelModel:
    return load_model("bagel-shapes")[0]


LANGUAGE_MODEL_CONFIGS = [
    {"task_type": "CAUSAL_LM"},
    {"task_type": "CAUSAL_LM", "target_modules": "all-linear"},
    {"target_modules": ["q_proj", "v_proj", "to_q", "conv_in", "fc1"]},
    {"target_modules": r".*\.(q_proj|to_k|out_proj|conv1)"},
    {"target_modules": "all-linear", "exclude_modules": ["q_proj", "layers.0.mlp.up_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*(gate|up)_proj.*"},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["conv_in", "embed_tokens", "lm_head"]},
    {"target_modules": ["k_proj"], "bias": "all"},
    {"target_modules": ["k_proj"], "layers_to_transform": [0], "use_dora": True},
]


@pytest.mark.parametrize("settings", LANGUAGE_MODEL_CONFIGS, ids=str)
def test_adapter_stays_out_of_what_is_not_trained_and_loads_as_it_was_saved(packaged, tmp_path, caplog, settings):
    config = LoraConfig(r=2, **settings)
    given = copy.deepcopy(config.to_dict())
    fit_adapter_config(config, packaged)
    assert config.to_dict() == given
    caplog.clear()
    with caplog.at_level("WARNING", logger="alphagrpo_ext.models.adapters"):
        adapted = fit(packaged, **settings)
    names = adapted_names(adapted)
    assert names
    assert not [name for name in names if name.startswith(("vae.", "vit_model.", "connector."))]
    if "exclude_modules" in settings:
        assert not [name for name in names if name.endswith("layers.0.mlp.up_proj")]
        assert [name for name in names if name.endswith("layers.0.mlp.down_proj")]
    assert len(caplog.records) == 1
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    save_adapter(adapted, tmp_path / "adapter")
    loaded, _ = load_model(tmp_path / "adapter")
    kept, again = adapted.state_dict(), loaded.state_dict()
    assert kept.keys() == again.keys()
    assert [name for name in kept if not torch.equal(kept[name], again[name])] == []


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_adapted_embeddings_load_as_peft_saves_them(packaged, tmp_path):
    """PEFT adds the weight before the adapter, of which it cannot know that it has not changed."""
    adapted = fit(packaged, target_modules=["q_proj", "embed_tokens"])
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path)
    assert any(name.endswith("embed_tokens.base_layer.weight") for name in load_file(tmp_path / WEIGHTS))
    loaded, _ = load_model(tmp_path)
    kept, again = adapted.state_dict(), loaded.state_dict()
    assert [name for name in kept if not torch.equal(kept[name], again[name])] == []


def test_all_linear_is_every_linear_layer_of_the_decoder(packaged):
    linear = {n for n, m in packaged.named_modules() if isinstance(m, torch.nn.Linear)}
    frozen = ("vae.", "vit_model.", "connector.")
    expected = {name for name in linear if not name.startswith(frozen)} - {"language_model.lm_head"}
    names = adapted_names(fit(packaged, target_modules="all-linear"))
    assert {name.removesuffix(".base_layer") for name in names} == expected


def test_vision_tower_gets_an_adapter_where_it_is_trained(packaged):
    names = adapted_names(fit(packaged, trains_vision_tower=True, target_modules=["q_proj"]))
    assert [name for name in names if name.startswith("vit_model.")]
    assert not [name for name in names if name.startswith("vae.")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["lm_head"]}, "target_modules names language_model.lm_head, which scores tokens"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["vae"]},
            r"\['vae'\] names only modules that are not trained",
        ),
        ({"target_modules": ["to_q"]}, r"target_modules=\['to_q'\] names only modules that are not trained \(vae"),
    ],
)
def test_configuration_that_asks_for_what_is_not_trained(packaged, settings, message):
    with pytest.raises(ValueError, match=message):
        fit(packaged, **settings)


def test_what_differs_is_said(packaged, caplog):
    with caplog.at_level("WARNING", logger="alphagrpo_ext.models.adapters"):
        fit_adapter_config(LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"), packaged)
    (record,) = caplog.records
    assert "task_type='CAUSAL_LM' is left out" in record.getMessage()
    assert "Not trained: vae, vit_model, connector." in record.getMessage()
