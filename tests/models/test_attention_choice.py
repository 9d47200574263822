# SPDX-License-Identifier: Apache-2.0

import pytest
from peft import LoraConfig, get_peft_model

from alphagrpo_ext.models.attention.choice import (
    LONG_IMAGE,
    attention_implementations,
    choose_attention,
)
from alphagrpo_ext.models.contract import FAMILIES
from alphagrpo_ext.models.loading import load_model
from support.toy_family import ToyConfig, ToyFamily, ToyModel


@pytest.mark.parametrize(
    ("family", "device_type", "workload", "name"),
    [
        ("bagel", "cpu", {}, "eager"),
        ("cosmos3", "cpu", {}, "eager"),
        ("bagel", "cpu", {"is_fp32": False}, "eager"),
        ("bagel", "cpu", {"trained_image_tokens": LONG_IMAGE - 1}, "eager"),
        ("bagel", "cpu", {"trained_image_tokens": LONG_IMAGE}, "sdpa"),
        ("cosmos3", "cpu", {"trained_image_tokens": 2 * LONG_IMAGE}, "sdpa"),
        ("bagel", "cpu", {"is_fp32": False, "trained_image_tokens": LONG_IMAGE}, "eager"),
        ("bagel", "cuda", {}, "sdpa"),
        ("bagel", "cuda", {"is_fp32": False, "trained_image_tokens": LONG_IMAGE}, "sdpa"),
        ("cosmos3", "cuda", {"is_fp32": False}, "sdpa"),
        ("bagel", "mps", {}, "sdpa"),
        ("cosmos3", "xpu", {}, "sdpa"),
    ],
)
def test_choice_of_a_workload(family: str, device_type: str, workload: dict, name: str) -> None:
    family = FAMILIES.get(family)()
    choice = choose_attention(family, device_type, **workload)
    assert choice.name == name
    assert choice.name in attention_implementations(family)
    for given in attention_implementations(family):
        assert str(choose_attention(family, device_type, given, **workload)) == f"{given} (given)"


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "mps"])
def test_a_model_gets_an_attention_that_it_has(device_type: str) -> None:
    model = ToyModel(ToyConfig())
    choice = choose_attention(ToyFamily(), device_type, trained_image_tokens=LONG_IMAGE)
    before = model.config._attn_implementation
    model.set_attn_implementation(choice.name)
    assert model.config._attn_implementation == before == choice.name == "eager"


@pytest.mark.parametrize("has_adapter", [False, True])
def test_all_parts_of_a_model_are_switched(has_adapter: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = load_model("bagel-shapes")
    # As Transformers chooses.
    assert model.config.text_config._attn_implementation == "sdpa"
    policy = model
    if has_adapter:
        policy = get_peft_model(model, LoraConfig(r=2, target_modules=model.family.lora_target_modules("both")))
    for name, names in (("flex_attention", ("flex_attention", "flex_attention", "sdpa")), ("eager", ("eager",) * 3)):
        policy.set_attn_implementation(name)
        configs = (model.config, model.config.text_config, model.config.vision_config)
        assert tuple(config._attn_implementation for config in configs) == names
        assert model.language_model.model.layers[0].self_attn.config._attn_implementation == names[1]
    assert not caplog.records
