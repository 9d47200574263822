# SPDX-License-Identifier: Apache-2.0

"""Settings of a task: how `task_settings` is read, and which source of a setting wins."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphagrpo_ext.rollout.settings import SETTING_NAMES, TaskSettings, read_task_settings, resolve_settings
from alphagrpo_ext.rollout.task import TASKS


FLOATS = (
    "cfg_text_scale",
    "cfg_img_scale",
    "cfg_renorm_min",
    "timestep_shift",
    "refine_strength",
    "temperature",
    "top_p",
)
INTEGERS = ("num_timesteps", "ode_steps", "image_height", "image_width", "max_completion_length", "top_k")
STRINGS = ("cfg_renorm_type", "ode_solver")


def finite() -> st.SearchStrategy[float]:
    return st.floats(allow_nan=False, allow_infinity=False)


ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(FLOATS, finite() | st.integers(-100, 100)),
        **dict.fromkeys(INTEGERS, st.integers(-(2**40), 2**40)),
        **dict.fromkeys(STRINGS, st.text("abc_", max_size=5)),
        "cfg_interval": st.lists(finite(), min_size=2, max_size=2),
    },
)


def test_every_setting_is_in_a_list_above() -> None:
    assert {*FLOATS, *INTEGERS, *STRINGS, "cfg_interval"} == {*SETTING_NAMES}


@given(st.dictionaries(st.sampled_from(["reasoning_t2i", "self_reflection", "image_editing"]), ENTRIES))
def test_json_and_mapping_are_the_same(settings: dict[str, Any]) -> None:
    assert read_task_settings(json.dumps(settings), TASKS) == read_task_settings(settings, TASKS) == settings


@pytest.mark.parametrize("nothing", [None, "", " ", {}, "{}"])
def test_nothing_is_no_setting(nothing: Any) -> None:
    assert read_task_settings(nothing, TASKS) == {}


NO_NUMBERS = st.sampled_from([math.nan, math.inf, -math.inf, None, True, False, "4.0", [4.0], {"value": 4.0}])


@given(st.sampled_from(FLOATS), NO_NUMBERS)
def test_what_is_no_finite_number_is_refused(name: str, value: Any) -> None:
    for given_as in ({"reasoning_t2i": {name: value}}, json.dumps({"reasoning_t2i": {name: value}})):
        with pytest.raises(ValueError, match=f"task_settings of 'reasoning_t2i': '{name}' must be a finite number"):
            read_task_settings(given_as, TASKS)


@given(st.sampled_from(INTEGERS), NO_NUMBERS | st.sampled_from([4.0, 4.5]))
def test_what_is_no_integer_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"'{name}' must be an integer, but is"):
        read_task_settings({"self_reflection": {name: value}}, TASKS)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("cfg_text_scale=4", "task_settings is no JSON .*'cfg_text_scale=4'"),
        ("[1]", r"task_settings must map tasks to settings, e.g. .*, but is \[1\]"),
        (7, "task_settings must map tasks to settings, e.g. .*, but is 7"),
        ({"reasoning_t2j": {}}, "task_settings: unknown task 'reasoning_t2j'. Did you mean 'reasoning_t2i'"),
        ({3: {}}, "task_settings: unknown task '3'"),
        ({"reasoning_t2i": None}, "task_settings of 'reasoning_t2i' must map settings to values, but are None"),
        ({"reasoning_t2i": ["cfg_text_scale"]}, "must map settings to values, but are"),
        ({"reasoning_t2i": {"cfg_text_skale": 4}}, "unknown setting 'cfg_text_skale'. Did you mean 'cfg_text_scale'"),
        ({"reasoning_t2i": {"eval_temperature": 0.5}}, "unknown setting 'eval_temperature'. Did you mean"),
        ({"reasoning_t2i": {5: 1}}, "unknown setting 5"),
        ({"reasoning_t2i": {"learning_rate": 1.0}}, "'learning_rate' is a setting of the run.*as --learning_rate"),
        ({"reasoning_t2i": {"cfg_renorm_type": 3}}, "'cfg_renorm_type' must be a string, but is 3"),
        ({"reasoning_t2i": {"cfg_interval": [0.4]}}, r"'cfg_interval' takes two numbers, but is \[0.4\]"),
        ({"reasoning_t2i": {"cfg_interval": "01"}}, "'cfg_interval' takes two numbers, but is '01'"),
        ({"reasoning_t2i": {"cfg_interval": [0.4, math.nan]}}, "'cfg_interval' must be a finite number, but is nan"),
        ('{"reasoning_t2i": {"top_p": 1, "top_p": 0.5}}', "names 'top_p' twice"),
        ('{"reasoning_t2i": {}, "reasoning_t2i": {}}', "names 'reasoning_t2i' twice"),
    ],
)
def test_mistakes_are_named(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_task_settings(value, TASKS, run_names=["learning_rate", "temperature"])


DECLARED = TaskSettings(cfg_img_scale=2.0, cfg_interval=(0.0, 1.0))
DEFAULTS = {"cfg_text_scale": 4.0, "cfg_img_scale": 1.0, "num_timesteps": 16, "eval_num_timesteps": 50}


def test_task_wins_over_the_defaults_of_the_run() -> None:
    for is_main_task in (True, False):
        settings = resolve_settings(DECLARED, {}, DEFAULTS, {}, is_main_task)
        assert settings == {**DEFAULTS, "cfg_img_scale": 2.0, "cfg_interval": (0.0, 1.0)}


def test_what_was_given_for_the_run_is_about_its_own_task() -> None:
    run = {"cfg_img_scale": 1.5, "cfg_text_scale": 3.0, "eval_cfg_img_scale": 1.1, "eval_num_timesteps": 7}
    assert resolve_settings(DECLARED, run, DEFAULTS, {}).items() >= run.items()
    beside = resolve_settings(DECLARED, run, DEFAULTS, {}, is_main_task=False)
    assert beside["cfg_img_scale"] == 2.0 and "eval_cfg_img_scale" not in beside
    assert (beside["cfg_text_scale"], beside["eval_num_timesteps"]) == (3.0, 7)


def test_what_was_given_for_the_task_wins_over_all() -> None:
    own = {"cfg_img_scale": 1.2, "num_timesteps": 5}
    for is_main_task in (True, False):
        settings = resolve_settings(DECLARED, {"cfg_img_scale": 1.5}, DEFAULTS, own, is_main_task)
        assert (settings["cfg_img_scale"], settings["num_timesteps"]) == (1.2, 5)
