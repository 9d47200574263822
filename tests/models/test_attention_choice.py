# SPDX-License-Identifier: Apache-2.0

import pytest
from peft import LoraConfig, get_peft_model

from alphagrpo_ext.models.attention.choice import attention_implementations, choose_attention, set_attention
from alphagrpo_ext.models.contract import FAMILIES
from alphagrpo_ext.models.loading import load_model
from support.toy_family import ToyFamily


@pytest.mark.parametrize(
    ("family", "device_type", "name"),
    [
        ("bagel", "cpu", "eager"),
        ("cosmos3", "cpu", "eager"),
        ("bagel", "cuda", "flex_attention"),
        ("cosmos3", "cuda", "sdpa"),
        ("bagel", "mps", None),
        ("cosmos3", "xpu", None),
    ],
)
def test_choice_of_a_device(family: str, device_type: str, name: str | None) -> None:
    family = FAMILIES.get(family)()
    choice = choose_attention(family, device_type)
    assert choice.name == name
    assert choice.name is None or choice.name in attention_implementations(family)
    for given in attention_implementations(family):
        assert str(choose_attention(family, device_type, given)) == f"{given} (given)"


def test_a_family_that_was_not_measured_keeps_its_attention() -> None:
    assert str(choose_attention(ToyFamily(), "cpu")) == "as loaded (nothing was measured for this model on cpu)"


@pytest.mark.parametrize("has_adapter", [False, True])
def test_all_parts_of_a_model_get_the_choice(has_adapter: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = load_model("bagel-shapes")
    # As Transformers chooses.
    assert model.config.text_config._attn_implementation == "sdpa"
    policy = model
    if has_adapter:
        policy = get_peft_model(model, LoraConfig(r=2, target_modules=model.family.lora_target_modules("both")))
    for device_type, names in (("cuda", ("flex_attention", "flex_attention", "sdpa")), ("cpu", ("eager",) * 3)):
        assert set_attention(policy, device_type).name == names[0]
        configs = (model.config, model.config.text_config, model.config.vision_config)
        assert tuple(config._attn_implementation for config in configs) == names
        assert model.language_model.model.layers[0].self_attn.config._attn_implementation == names[1]
    assert not caplog.records
