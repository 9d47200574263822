# SPDX-License-Identifier: Apache-2.0

"""Arguments that recipes share about sampling."""

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
        cfg_text_scale=4.0,
        cfg_img_scale=2.0,
        cfg_interval=[0.1, 0.9],
        cfg_renorm_type="channel",
        max_new_tokens=7,
        temperature=0.3,
        top_p=0.8,
    )
    guidance = GuidanceConfig(4.0, 2.0, (0.1, 0.9), "channel")
    denoising = DenoisingConfig(21, 3.0, guidance, ode_solver="ab2", ode_steps=5)
    assert arguments.rollout(8, 16) == RolloutConfig(8, 16, 7, 0.3, top_p=0.8, denoising=denoising)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="cfg_interval takes two numbers"):
        SamplingArguments(cfg_interval=[1.0])
    with pytest.raises(ValueError, match="unknown.*rk4"):
        SamplingArguments(ode_solver="rk4").rollout(8, 8)
