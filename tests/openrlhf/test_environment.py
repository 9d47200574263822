# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import fields

import pytest

from alphagrpo_ext.openrlhf.environment import SEEN_REQUEST, UNSEEN_REQUEST, PluginConfig, variable


def test_without_variables_everything_has_its_default() -> None:
    assert PluginConfig.from_environment({}) == PluginConfig()
    assert PluginConfig.from_environment({"ALPHAGRPO_TIMEOUT": "", "PATH": "/bin"}) == PluginConfig()


def test_variables_are_read() -> None:
    config = PluginConfig.from_environment(
        {
            "ALPHAGRPO_SERVER_URL": "https://rewards.example:9000/base",
            "ALPHAGRPO_SERVER_KEY": "hidden",
            "ALPHAGRPO_TIMEOUT": "2.5",
            "ALPHAGRPO_MAX_RETRIES": "0",
            "ALPHAGRPO_MAX_CONCURRENCY": "3",
            "ALPHAGRPO_SEED": "7",
            "ALPHAGRPO_NUM_REFLECTION_ROUNDS": "2",
            "ALPHAGRPO_RECTIFICATION": "off",
            "ALPHAGRPO_POLICY_SEES_IMAGES": "False",
            "ALPHAGRPO_IMAGE_PLACEHOLDER": "<image>",
            "ALPHAGRPO_FEEDBACK_TEMPLATE": r"\nUSER: {request}\nASSISTANT:",
            "ALPHAGRPO_END_OF_TURN": "</s>",
            "ALPHAGRPO_REFLECTION_REQUEST": "What is wrong?",
            "ALPHAGRPO_MAX_NEW_TOKENS": "64",
        }
    )
    assert config == PluginConfig(
        server_url="https://rewards.example:9000/base",
        server_key="hidden",
        timeout=2.5,
        max_retries=0,
        max_concurrency=3,
        seed=7,
        num_reflection_rounds=2,
        rectification="off",
        policy_sees_images=False,
        image_placeholder="<image>",
        feedback_template="\nUSER: {request}\nASSISTANT:",
        end_of_turn="</s>",
        reflection_request="What is wrong?",
        max_new_tokens=64,
    )
    assert config.request == "What is wrong?"


def test_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPHAGRPO_SEED", "11")
    assert PluginConfig.from_environment().seed == 11


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SERVER_URL", "127.0.0.1:8001"),
        ("TIMEOUT", "soon"),
        ("TIMEOUT", "0"),
        ("TIMEOUT", "nan"),
        ("TIMEOUT", "inf"),
        ("MAX_RETRIES", "-1"),
        ("MAX_RETRIES", "1.5"),
        ("MAX_CONCURRENCY", "0"),
        ("SEED", "x"),
        ("NUM_REFLECTION_ROUNDS", "-1"),
        ("RECTIFICATION", "zero"),
        ("POLICY_SEES_IMAGES", "maybe"),
        ("FEEDBACK_TEMPLATE", "{image}"),
        ("FEEDBACK_TEMPLATE", "{request}"),
        ("FEEDBACK_TEMPLATE", "{image}{image}{request}"),
        ("MAX_NEW_TOKENS", "0"),
    ],
)
def test_bad_value_names_the_variable(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"ALPHAGRPO_{name} must .*but is '?{value[:4]}"):
        PluginConfig.from_environment({f"ALPHAGRPO_{name}": value})


def test_misspelt_variable_is_an_error_and_a_foreign_one_is_not() -> None:
    with pytest.raises(ValueError, match="no environment variable ALPHAGRPO_SERVER_ULR; .*ALPHAGRPO_SERVER_URL?"):
        PluginConfig.from_environment({"ALPHAGRPO_SERVER_ULR": "http://localhost"})
    PluginConfig.from_environment({"ALPHAGRPO_GOLDEN_DIR": "/tmp"})


def test_text_only_policy_is_asked_without_an_image() -> None:
    assert PluginConfig().request == SEEN_REQUEST
    assert PluginConfig(policy_sees_images=False).request == UNSEEN_REQUEST


def test_key_is_not_shown() -> None:
    assert "hidden" not in repr(PluginConfig(server_key="hidden"))


def test_every_setting_is_documented() -> None:
    for setting in fields(PluginConfig):
        assert f"\n        {setting.name} (`" in PluginConfig.__doc__, variable(setting.name)
