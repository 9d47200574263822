# SPDX-License-Identifier: Apache-2.0

"""Arguments that recipes share about sampling."""

import json

import pytest

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.rollout import RolloutConfig
from alphagrpo_ext.rollout.arguments import SamplingArguments
from alphagrpo_ext.rollout.denoising import DenoisingConfig


def test_every_argument_reaches_the_rollout() -> None:
    arguments = SamplingArguments(
        num_timesteps=21,
        timestep_shift=3.0,
        ode_solver="ab2",
        ode_steps=5,
        refine_strength=0.9,
        cfg_text_scale=4.0,
        cfg_img_scale=2.0,
        cfg_interval=[0.1, 0.9],
        cfg_renorm_type="channel",
        max_new_tokens=7,
        temperature=0.3,
        top_p=0.8,
    )
    guidance = GuidanceConfig(4.0, 2.0, (0.1, 0.9), "channel")
    denoising = DenoisingConfig(21, 3.0, guidance, ode_solver="ab2", ode_steps=5, refine_strength=0.9)
    assert arguments.rollout(8, 16) == RolloutConfig(8, 16, 7, 0.3, top_p=0.8, denoising=denoising)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="cfg_interval takes two numbers"):
        SamplingArguments(cfg_interval=[1.0])
    with pytest.raises(ValueError, match="unknown.*rk4"):
        SamplingArguments(ode_solver="rk4").rollout(8, 8)


def test_tasks_take_what_is_not_given_from_what_they_declare() -> None:
    arguments = SamplingArguments(cfg_text_scale=4.0)
    painting, editing = GuidanceConfig(4.0), GuidanceConfig(4.0, 2.0, (0.0, 1.0), "text_channel")
    expected = {"reasoning_t2i": painting, "image_editing": editing, "self_reflection": editing}
    for task, guidance in expected.items():
        assert arguments.rollout(8, 16, task) == RolloutConfig(
            8, 16, 48, 0.0, denoising=DenoisingConfig(11, 1.0, guidance)
        )
    given = SamplingArguments(cfg_text_scale=4.0, cfg_interval=[0.2, 0.8])
    for task in expected:
        assert given.rollout(8, 16, task).denoising.guidance.interval == (0.2, 0.8)


@pytest.mark.parametrize("as_json", [False, True])
def test_settings_of_a_task_win_over_arguments(as_json: bool) -> None:
    own = {"self_reflection": {"cfg_img_scale": 1.5, "image_width": 24, "max_completion_length": 9, "top_k": 3}}
    arguments = SamplingArguments(cfg_img_scale=1.1, task_settings=json.dumps(own) if as_json else own)
    refining, painting = (arguments.rollout(8, 16, name) for name in ("self_reflection", "reasoning_t2i"))
    assert (refining.size, refining.max_new_tokens, refining.top_k) == ((8, 24), 9, 3)
    assert refining.denoising.guidance.image_scale == 1.5
    assert (painting.size, painting.max_new_tokens, painting.top_k) == ((8, 16), 48, 0)
    assert painting.denoising.guidance.image_scale == 1.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"self_reflection": {"num_timesteps": 1}}, "task 'self_reflection': num_timesteps must be at least 2"),
        ({"self_reflection": {"cfg_interval": [0.9, 0.1]}}, "task 'self_reflection': interval must be"),
        ({"self_reflection": {"temperature": -1}}, "task 'self_reflection': temperature must not be negative"),
        ({"self_reflection": {"top_p": 0}}, "task 'self_reflection': top_p must be in"),
        ({"self_reflection": {"top_k": -1}}, "task 'self_reflection': top_k must not be negative"),
        ({"self_reflection": {"timestep_shift": 0}}, "task 'self_reflection': .*shift must be positive"),
        ({"self_reflekt": {}}, "unknown task 'self_reflekt'. Did you mean 'self_reflection'"),
    ],
)
def test_bad_settings_of_a_task_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingArguments(task_settings=settings).rollout(8, 8, "self_reflection")
