# SPDX-License-Identifier: Apache-2.0

import pytest
from peft import LoraConfig, get_peft_model

from alphagrpo_ext.models.attention.choice import (
    LONG_IMAGE,
    attention_implementations,
    choose_attention,
    set_attention,
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
        ("bagel", "cuda", {}, "flex_attention"),
        ("bagel", "cuda", {"trained_image_tokens": LONG_IMAGE}, "flex_attention"),
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
    set_attention(model, choice)
    assert model.config._attn_implementation == before == choice.name == "eager"


@pytest.mark.parametrize("has_adapter", [False, True])
def test_all_parts_of_a_model_get_the_choice(has_adapter: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = load_model("bagel-shapes")
    # As Transformers chooses.
    assert model.config.text_config._attn_implementation == "sdpa"
    policy = model
    if has_adapter:
        policy = get_peft_model(model, LoraConfig(r=2, target_modules=model.family.lora_target_modules("both")))
    for device_type, names in (("cuda", ("flex_attention", "flex_attention", "sdpa")), ("cpu", ("eager",) * 3)):
        set_attention(policy, choose_attention(policy.family, device_type))
        configs = (model.config, model.config.text_config, model.config.vision_config)
        assert tuple(config._attn_implementation for config in configs) == names
        assert model.language_model.model.layers[0].self_attn.config._attn_implementation == names[1]
    assert not caplog.records
