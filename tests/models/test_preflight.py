# SPDX-License-Identifier: Apache-2.0

"""What is refused before memory is taken for weights: values of configurations, sizes, types and values of weights."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from alphagrpo_ext.models.adapters import save_adapter
from alphagrpo_ext.models.bagel.checkpoint import save_released
from alphagrpo_ext.models.bagel.configuration_bagel import FLOAT_RANGES, LORA_TARGET_MODULES, WHOLE_RANGES
from alphagrpo_ext.models.bagel.processing_bagel import BagelProcessor
from alphagrpo_ext.models.finite import check_finite_weights, is_finite, names_not_finite
from alphagrpo_ext.models.loading import PACKAGED_CHECKPOINTS, load_model, load_processor
from alphagrpo_ext.models.saving import save_model


PACKAGED = PACKAGED_CHECKPOINTS["bagel-shapes"]
WEIGHT = "language_model.model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PACKAGED, tmp_path / "model"))


def edit_json(path: Path, part: str, name: str, value: Any) -> None:
    config = json.loads(path.read_text())
    (config[part] if part else config)[name] = value
    path.write_text(json.dumps(config))


def edit_weights(path: Path, change: Any) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


CONFIG_FIELDS = sorted(
    {(part, name) for ranges in (WHOLE_RANGES, FLOAT_RANGES) for part, names in ranges.items() for name in names}
    - {("text_config", "rope_theta")}
)


@pytest.mark.parametrize(("part", "name"), CONFIG_FIELDS)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, 10**12, "8"], ids=str)
def test_impossible_value_of_a_configuration_is_named(saved: Path, part: str, name: str, value: Any) -> None:
    unbounded = (part, name) in {("text_config", "max_position_embeddings"), ("vae_config", "scaling_factor")}
    if (unbounded and value == 10**12) or (name == "shift_factor" and isinstance(value, int)):
        return
    edit_json(saved / "config.json", part, name, value)
    with pytest.raises(ValueError, match=rf"\b{name}\b.*config\.json|config\.json.*\b{name}\b"):
        load_model(saved)


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        (
            "text_config",
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 0.0},
            "rope_theta in .* must be above 1",
        ),
        ("text_config", "rope_parameters", {"rope_type": "linear", "factor": math.nan}, "rope_parameters.factor in"),
        ("text_config", "num_attention_heads", 3, "hidden_size=128 in .* is no multiple of num_attention_heads=3"),
        ("text_config", "num_key_value_heads", 3, "is no multiple of num_key_value_heads=3"),
        ("vae_config", "block_out_channels", [16, 33], r"block_out_channels in .* \[16, 33\]"),
        ("vae_config", "block_out_channels", [], "block_out_channels in"),
        ("vae_config", "norm_num_groups", 5, "multiples of norm_num_groups=5"),
        ("", "eos_token_id", 85, "eos_token_id=85 in .* is beyond the vocabulary of 85 tokens"),
        ("", "image_start_token_id", 10**6, "image_start_token_id=1000000 in .* is beyond"),
        # Two million times the weights of the file, which no machine has the memory for.
        ("text_config", "hidden_size", 2**20, r"has shape \(85, 128\) instead of \(85, 1048576\)"),
        ("text_config", "vocab_size", 10**7, r"has shape \(85, 128\) instead of \(10000000, 128\)"),
        ("vision_config", "num_hidden_layers", 900, r"describes a model of [\d,]+ weights, but its files hold"),
        ("text_config", "rms_norm_eps", "1e-6", "rms_norm_eps in .* must be a number, but is '1e-6'"),
        ("text_config", "layer_types", ["none"], "config.json: .*layer_types"),
    ],
)
def test_configuration_must_describe_the_weights(saved: Path, part: str, name: str, value: Any, message: str) -> None:
    edit_json(saved / "config.json", part, name, value)
    with pytest.raises(ValueError, match=message):
        load_model(saved)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_that_is_not_finite_is_named(saved: Path, dtype: torch.dtype, value: float) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights[WEIGHT] = weights[WEIGHT].to(dtype)
        weights[WEIGHT][3, 5] = value

    edit_weights(saved / "model.safetensors", spoil)
    with pytest.raises(ValueError, match=rf"{WEIGHT} in .*model.safetensors has values that are NaN or infinite"):
        load_model(saved)


@pytest.mark.parametrize("file", ["ema.safetensors", "ae.safetensors"])
@pytest.mark.parametrize("fault", ["nan", "int8"])
def test_released_weights_are_checked(tmp_path: Path, golden: Any, file: str, fault: str) -> None:
    folder = Path(shutil.copytree(golden.checkpoint, tmp_path / "released"))
    name = "llm2vae.bias" if file == "ema.safetensors" else "decoder.conv_in.bias"

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights[name] = weights[name] * math.nan if fault == "nan" else weights[name].to(torch.int8)

    edit_weights(folder / file, spoil)
    with pytest.raises(ValueError, match=rf"{name} in .*{file} (has values that are NaN|is of type I8)"):
        load_model(folder)


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("llm_config.json", "rms_norm_eps", math.nan),
        ("llm_config.json", "num_hidden_layers", 10**9),
        ("llm_config.json", "rope_theta", -1.0),
        ("vit_config.json", "layer_norm_eps", 2.0),
        ("vit_config.json", "hidden_size", -8),
    ],
)
def test_released_configuration_is_checked(tmp_path: Path, golden: Any, file: str, name: str, value: Any) -> None:
    folder = Path(shutil.copytree(golden.checkpoint, tmp_path / "released"))
    edit_json(folder / file, "", name, value)
    with pytest.raises(ValueError, match=rf"{name} in .*{file}"):
        load_model(folder)


@pytest.mark.parametrize("name", BagelProcessor.number_ranges)
def test_impossible_number_of_a_processor_is_named(saved: Path, name: str) -> None:
    tokenizer = load_processor(saved).tokenizer
    for value in (math.nan, math.inf, "24", -1, 12.5, True, None):
        edit_json(saved / "processor_config.json", "", name, value)
        with pytest.raises(ValueError, match=f"^{name} in {saved / 'processor_config.json'} must .*but is {value!r}"):
            load_processor(saved)
        with pytest.raises(ValueError, match=f"^{name} in BagelProcessor must .*but is {value!r}"):
            BagelProcessor(tokenizer, **{name: value})


def test_processor_of_a_released_folder_is_checked(saved: Path, tmp_path: Path, golden: Any) -> None:
    folder = Path(shutil.copytree(golden.checkpoint, tmp_path / "released"))
    shutil.copy(saved / "processor_config.json", folder)
    edit_json(folder / "processor_config.json", "", "vit_stride", math.nan)
    with pytest.raises(ValueError, match=f"^vit_stride in {folder / 'processor_config.json'} must be .*but is nan"):
        load_processor(folder)


def test_tokenizer_beyond_the_vocabulary_is_named(saved: Path) -> None:
    tokenizer = json.loads((saved / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["surplus"] = 400
    (saved / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="gives 'surplus' the id 400, but the model's vocabulary has 85 entries"):
        load_model(saved)


def test_damaged_configuration_is_named(saved: Path) -> None:
    (saved / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_model(saved)


@pytest.mark.parametrize("save", [save_model, save_released])
def test_nothing_that_is_not_finite_is_saved(tmp_path: Path, golden: Any, save: Callable[..., None]) -> None:
    model, processor = load_model(golden.checkpoint)
    with torch.no_grad():
        model.get_parameter(WEIGHT)[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="q_proj"):
        save(model, processor, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_adapter_that_is_not_finite_is_neither_saved_nor_loaded(tmp_path: Path) -> None:
    adapted = get_peft_model(load_model("bagel-shapes")[0], LoraConfig(r=2, target_modules=LORA_TARGET_MODULES))
    save_adapter(adapted, tmp_path / "good")
    edit_weights(
        tmp_path / "good" / "adapter_model.safetensors", lambda weights: weights[min(weights)].fill_(math.inf)
    )
    with pytest.raises(ValueError, match=r"lora_A.* in .*adapter_model.safetensors has values that are NaN"):
        load_model(tmp_path / "good")
    with torch.no_grad():
        next(p for p in adapted.parameters() if p.requires_grad)[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="the adapter is not saved"):
        save_adapter(adapted, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    value=st.sampled_from([0.0, 1.0, -6e4, math.nan, math.inf, -math.inf]),
    data=st.data(),
)
def test_finite_agrees_with_torch(shape: list[int], dtype: torch.dtype, value: float, data: st.DataObject) -> None:
    tensor = torch.randn(shape).to(dtype)
    if tensor.numel():
        tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = value
    assert bool(is_finite(tensor)) == bool(tensor.isfinite().all())


def test_first_names_are_listed() -> None:
    tensors = [(f"weight_{i}", torch.tensor([1.0, math.nan if i else 0.0])) for i in range(9)]
    assert names_not_finite(tensors) == [f"weight_{i}" for i in range(1, 9)]
    with pytest.raises(
        FloatingPointError, match="^no: values are NaN or infinite in weight_1, .*weight_5 and 3 more$"
    ):
        check_finite_weights(tensors, "no")
    check_finite_weights([("ids", torch.tensor([1, 2])), tensors[0]], "no")
