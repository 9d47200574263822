# SPDX-License-Identifier: Apache-2.0

"""Presets of sampling: what they set, what wins over them, and that a fast rollout is trained exactly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alphagrpo_ext.trainer import AlphaGRPOConfig, AlphaGRPOTrainer


PAPER = {"ode_solver": "euler", "ode_steps": None, "branches_per_thought": 1}


def config(folder: Path, **settings: Any) -> AlphaGRPOConfig:
    return AlphaGRPOConfig(
        **{"output_dir": str(folder), "report_to": "none", "bf16": False, "use_cpu": True} | settings
    )


def sampling(args: AlphaGRPOConfig) -> dict[str, Any]:
    return {name: getattr(args, name) for name in PAPER}


def test_paper_is_the_default_and_changes_nothing(tmp_path: Path) -> None:
    args = config(tmp_path)
    assert args.preset == "paper"
    assert sampling(args) == args.preset_values == PAPER
    assert not args.changed_arguments & PAPER.keys()


@pytest.mark.parametrize(
    ("settings", "ode_steps", "branches"),
    [
        pytest.param({"num_timesteps": 40, "sde_window_size": 5, "sde_window_range": [0, 15]}, 12, 2, id="reflection"),
        pytest.param({}, 2, 2, id="text-to-image"),
        pytest.param({"num_timesteps": 13, "sde_window_range": [0, 12]}, 2, 2, id="a step on each side of the window"),
        pytest.param({"num_timesteps": 12, "sde_window_range": [0, 11]}, 1, 2, id="one step in all"),
        pytest.param({"num_timesteps": 11, "sde_window_range": [0, 10]}, None, 2, id="the window is the whole path"),
        # The path from the image has 29 of 39 steps.
        pytest.param(
            {
                **{"task": "self_reflection", "num_timesteps": 40, "sde_window_size": 5},
                **{"sde_window_range": [20, 30], "refine_strength": 0.9},
            },
            *(8, 2),
            id="from the image",
        ),
        pytest.param({"task": "visual_question_answering"}, 2, 1, id="nothing is painted"),
        pytest.param({"image_objective": "awm", "num_timesteps": 11}, 5, 1, id="no window"),
        pytest.param({"num_generations": 7, "per_device_train_batch_size": 7}, 2, 1, id="an odd group"),
        pytest.param({"num_generations": 2, "per_device_train_batch_size": 2}, 2, 1, id="one thought would be left"),
        pytest.param(
            {"num_generations": 14, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 14},
            2,
            2,
            id="one by one",
        ),
    ],
)
def test_fast_counts_the_steps_outside_the_window(
    tmp_path: Path, settings: dict[str, Any], ode_steps: int | None, branches: int
) -> None:
    args = config(tmp_path, preset="fast", **settings)
    assert sampling(args) == {"ode_solver": "ab2", "ode_steps": ode_steps, "branches_per_thought": branches}
    # Evaluations have their own solver.
    assert args.eval_rollout().denoising.ode_solver == "euler" and args.eval_rollout().denoising.ode_steps is None


def test_what_is_given_wins_and_is_not_said_to_be_the_presets(tmp_path: Path) -> None:
    args = config(tmp_path, preset="fast", ode_solver="dpmpp_2m", branches_per_thought=1)
    assert sampling(args) == {"ode_solver": "dpmpp_2m", "ode_steps": 2, "branches_per_thought": 1}
    assert args.preset_values == {"ode_steps": 2}
    args = config(tmp_path, preset="fast", task_settings={"reasoning_t2i": {"ode_steps": 4}})
    assert args.ode_steps == 4 and args.preset_values == {"ode_solver": "ab2", "branches_per_thought": 2}


def test_initial_images_are_painted_as_fast(tmp_path: Path) -> None:
    args = config(tmp_path, preset="fast", task="self_reflection", num_timesteps=40, sde_window_size=5)
    painting = args.for_task("reasoning_t2i")
    assert (painting.ode_solver, painting.ode_steps, painting.cfg_interval) == ("ab2", 12, [0.4, 1.0])


def test_unknown_preset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="preset must be one of paper, fast, but is 'quick'"):
        config(tmp_path, preset="quick")


@pytest.mark.invariant
@pytest.mark.parametrize(
    ("task", "objective"),
    [("reasoning_t2i", "flow_grpo"), ("self_reflection", "flow_grpo"), ("self_reflection", "awm")],
)
def test_a_fast_step_is_on_policy_with_fewer_evaluations(
    make_trainer: Callable[..., AlphaGRPOTrainer], task: str, objective: str
) -> None:
    logs = {}
    for preset in ("paper", "fast"):
        settings = {"task": task, "image_objective": objective, "num_timesteps": 13, "sde_window_range": [1, 8]}
        trainer = make_trainer(preset=preset, **settings)
        trainer.train()
        (logs[preset],) = [entry for entry in trainer.state.log_history if "image/ratio_mean" in entry]
    assert logs["fast"]["image/ratio_mean"] == 1.0 and logs["fast"]["grad_norm"] > 0
    tokens = {
        preset: sum(value for name, value in log.items() if name.startswith("work/denoise_tokens"))
        for preset, log in logs.items()
    }
    assert 0 < tokens["fast"] < tokens["paper"] / 1.8
