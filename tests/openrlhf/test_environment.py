# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
from pydantic import SecretStr

from alphagrpo_ext.openrlhf.environment import SEEN_REQUEST, UNSEEN_REQUEST, PluginConfig
from alphagrpo_ext.reward_client.settings import ClientSettings, variable


def test_without_variables_everything_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = PluginConfig()
    assert defaults.server_url == "http://127.0.0.1:8001" and defaults.timeout == 180.0
    for value in ("", " "):
        monkeypatch.setenv("ALPHAGRPO_TIMEOUT", value)
        assert PluginConfig() == defaults


def test_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "SERVER_URL": "https://rewards.example:9000/base",
        "SERVER_KEY": "hidden",
        "TIMEOUT": "2.5",
        "MAX_RETRIES": "0",
        "MAX_CONCURRENCY": "3",
        "SEED": "7",
        "NUM_REFLECTION_ROUNDS": "2",
        "RECTIFICATION": "off",
        "POLICY_SEES_IMAGES": "False",
        "IMAGE_PLACEHOLDER": "<image>",
        "FEEDBACK_TEMPLATE": r"\nUSER: {request}\nASSISTANT:",
        "END_OF_TURN": "</s>",
        "REFLECTION_REQUEST": "What is wrong?",
        "MAX_NEW_TOKENS": "64",
    }
    for name, value in variables.items():
        monkeypatch.setenv(f"ALPHAGRPO_{name}", value)
    config = PluginConfig()
    assert config.model_dump() == {
        "server_url": "https://rewards.example:9000/base",
        "server_key": SecretStr("hidden"),
        "timeout": 2.5,
        "max_retries": 0,
        "max_concurrency": 3,
        "seed": 7,
        "num_reflection_rounds": 2,
        "rectification": "off",
        "policy_sees_images": False,
        "image_placeholder": "<image>",
        "feedback_template": "\nUSER: {request}\nASSISTANT:",
        "end_of_turn": "</s>",
        "reflection_request": "What is wrong?",
        "max_new_tokens": 64,
    }
    assert config.request == "What is wrong?"


def test_arguments_win_over_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPHAGRPO_TIMEOUT", "soon")
    monkeypatch.setenv("ALPHAGRPO_SEED", "11")
    config = PluginConfig(timeout=3.0)
    assert (config.timeout, config.seed) == (3.0, 11)


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
def test_bad_value_names_the_variable(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ALPHAGRPO_{name}", value)
    with pytest.raises(ValueError, match=f"^ALPHAGRPO_{name} must .*but is '{value[:4]}"):
        PluginConfig()


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("POLICY_SEES_IMAGES", "maybe", "true or false"),
        ("RECTIFICATION", "zero", "'minimum' or 'off'"),
        ("MAX_CONCURRENCY", "0", "greater than or equal to 1"),
        ("SERVER_URL", "localhost", "start with http:// or https://"),
    ],
)
def test_bad_value_is_told_what_is_allowed(name: str, value: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ALPHAGRPO_{name}", value)
    with pytest.raises(ValueError, match=f"must .*{rule}"):
        PluginConfig()


def test_misspelt_variable_is_an_error_and_a_foreign_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPHAGRPO_GOLDEN_DIR", "/tmp")
    PluginConfig()
    monkeypatch.setenv("ALPHAGRPO_SERVER_ULR", "http://localhost")
    with pytest.raises(ValueError, match="no environment variable ALPHAGRPO_SERVER_ULR; .*ALPHAGRPO_SERVER_URL?"):
        PluginConfig()


def test_text_only_policy_is_asked_without_an_image() -> None:
    assert PluginConfig().request == SEEN_REQUEST
    assert PluginConfig(policy_sees_images=False).request == UNSEEN_REQUEST


def test_key_is_not_shown() -> None:
    config = PluginConfig(server_key="hidden")
    assert "hidden" not in f"{config!r} {config} {config.model_dump()}"
    for values in ({"server_key": 1234567}, {"server_key": "hidden", "timeout": 0}):
        with pytest.raises(ValueError) as error:
            PluginConfig(**values)
        assert "hidden" not in str(error.value) and "1234567" not in str(error.value)


def test_every_setting_is_documented() -> None:
    for name in PluginConfig.model_fields:
        assert f"\n        {name} (`" in ClientSettings.__doc__ + PluginConfig.__doc__, variable(name)
