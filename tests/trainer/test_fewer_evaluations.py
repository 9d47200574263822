# SPDX-License-Identifier: Apache-2.0


from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alphagrpo_ext.flow.transitions import transition
from alphagrpo_ext.trainer import AlphaGRPOConfig, AlphaGRPOTrainer


MakeTrainer = Callable[..., AlphaGRPOTrainer]
SOLVER = {"ode_solver": "ab2", "ode_steps": 2}
BRANCHES = {"branches_per_thought": 2}


def history(trainer: AlphaGRPOTrainer, metric: str) -> list[float]:
    return [entry[metric] for entry in trainer.state.log_history if metric in entry]


def count_evaluations(trainer: AlphaGRPOTrainer) -> list[int]:
    """Images of every evaluation of the network at rollout, from now on."""
    counts = []
    policy = trainer.accelerator.unwrap_model(trainer.model)
    predict_velocity = policy.predict_velocity

    def counting(cache: Any, latents: torch.Tensor, *args: Any) -> torch.Tensor:
        counts.append(len(latents))
        return predict_velocity(cache, latents, *args)

    policy.predict_velocity = counting
    return counts


@pytest.mark.invariant
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(SOLVER, id="solver"),
        pytest.param(SOLVER | {"ode_solver": "dpmpp_2m", "ode_steps": 4, "sde_type": "flow_cps"}, id="more steps"),
        pytest.param(BRANCHES, id="branches"),
        pytest.param(SOLVER | BRANCHES, id="both"),
        pytest.param(BRANCHES | {"think": False, "sde_window_range": [0, 3]}, id="branches from the noise"),
        pytest.param(
            SOLVER | {"branches_per_thought": 4, "task": "self_reflection", "num_reflection_rounds": 2},
            id="two rounds of reflection",
        ),
        pytest.param(
            SOLVER | BRANCHES | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
            id="batches of 1",
        ),
    ],
)
def test_first_update_is_on_policy(make_trainer: MakeTrainer, settings: dict[str, Any]) -> None:
    """Every ratio is exactly 1, and the packed forward scores the window as the rollout did."""
    trainer = make_trainer(**settings)
    trainer.train()
    assert history(trainer, "image/ratio_mean") == [1.0]
    assert history(trainer, "image/clip_ratio") == [0.0]
    assert history(trainer, "clip_ratio/region_mean") == [0.0]
    assert history(trainer, "grad_norm")[0] > 0
    for update in trainer.recorder.updates:
        scores = update.images
        log_probs = transition(
            trainer.args.sde_type,
            scores.latents,
            scores.velocities,
            scores.t,
            scores.t_next,
            trainer.args.noise_level,
            next_latents=scores.next_latents,
            mask=scores.mask,
        ).log_prob
        expected = [image.window.log_probs for t in update.trajectories for image in t.sampled_images]
        torch.testing.assert_close(log_probs, torch.stack(expected), atol=1e-5, rtol=0)
        for i, trajectory in enumerate(update.trajectories):
            sampled = [p for text in trajectory.sampled_texts for p in text.log_probs]
            assert update.log_probs[i, : len(sampled)].tolist() == pytest.approx(sampled, abs=1e-4)


def test_trained_steps_are_those_of_the_schedule(make_trainer: MakeTrainer) -> None:
    """The same windows at the same times with and without the settings, but fewer evaluations."""
    windows, images = [], []
    for settings in ({}, SOLVER | BRANCHES):
        trainer = make_trainer(num_timesteps=12, sde_window_size=3, sde_window_range=[1, 8], **settings)
        counts = count_evaluations(trainer)
        trainer.train()
        images.append(sum(counts))
        (update,) = trainer.recorder.updates
        starts = [trainer.args.train_rollout(step).denoising.window_start for step in range(8)]
        times = [trajectory.sampled_images[0].window.timesteps.tolist() for trajectory in update.trajectories]
        windows.append((starts, times))
    assert windows[0] == windows[1]
    assert len(set(windows[0][0])) > 1
    assert images[1] < images[0] / 2


def test_images_of_a_thought_have_advantages_of_their_own_and_the_thought_their_mean(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer(branches_per_thought=2)
    trainer.train()
    (update,) = trainer.recorder.updates
    texts = [tuple(trajectory.sampled_texts[0].token_ids) for trajectory in update.trajectories]
    assert len(set(texts)) == 2
    assert sorted(texts.count(text) for text in texts) == [2, 2, 2, 2]
    images = update.inputs["image_advantages"]
    assert len(set(images.tolist())) == 4
    means = [images[[other == text for other in texts]].mean() for text in texts]
    torch.testing.assert_close(update.inputs["advantages"], torch.stack(means))


def test_initial_images_have_no_branches_and_as_many_steps(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        task="self_reflection", cfg_text_scale=1.0, num_initial_images=2, branches_per_thought=4, **SOLVER
    )
    counts = count_evaluations(trainer)
    trainer.train()
    # Two initial images of one prompt in 3 + 2 steps; then one path up to the window, and four from there on.
    assert counts == [2] * 5 + [1, 1, 4, 4, 4]


def test_evaluation_has_a_solver_of_its_own(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        cfg_text_scale=1.0, eval_ode_solver="ab2", eval_ode_steps=2, eval_timestep_shift=2.0, branches_per_thought=4
    )
    counts = count_evaluations(trainer)
    trainer.evaluate()
    assert len(counts) % 2 == 0
    assert set(counts) == {4}
    evaluation, training = trainer.args.eval_rollout().denoising, trainer.args.train_rollout(0).denoising
    assert (evaluation.ode_solver, training.ode_solver) == ("ab2", "euler")
    assert (evaluation.timestep_shift, training.timestep_shift) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ode_solver": "rk45"}, "unknown ODE solver 'rk45'"),
        ({"eval_ode_solver": "dpm"}, "in evaluation: unknown ODE solver 'dpm'.*eval_ode_solver=dpm"),
        # Most windows of the range lie inside the path, so there are two stretches.
        ({"ode_steps": 1}, r"ode_steps=1: .* sde_window_range=\[0, 11\]"),
        ({"eval_ode_steps": 0}, "eval_ode_steps must be at least 1, but is 0"),
        ({"branches_per_thought": 0}, "branches_per_thought must be at least 1, but is 0"),
        ({"branches_per_thought": 4}, "branches_per_thought=4 must divide num_generations 14"),
    ],
)
def test_impossible_settings_raise(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlphaGRPOConfig(**{"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, **settings})


def test_images_of_a_thought_stay_on_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "num_generations": 6}
    monkeypatch.setattr(AlphaGRPOConfig, "world_size", 2)
    config = AlphaGRPOConfig(per_device_train_batch_size=9, branches_per_thought=3, **settings)
    assert config.generation_batch_size == 18
    with pytest.raises(ValueError, match="branches_per_thought=2 must divide .* the samples of a process, 9"):
        AlphaGRPOConfig(per_device_train_batch_size=9, branches_per_thought=2, **settings)
