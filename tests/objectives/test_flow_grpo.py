# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import replace

import pytest
import torch

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.flow.timesteps import flow_timesteps
from alphagrpo_ext.models.bagel.guidance import BRANCHES, BagelGuidance
from alphagrpo_ext.models.contract import PackedBatch, PackedOutput, VelocityLayout
from alphagrpo_ext.objectives import OBJECTIVES, ImageScores, ObjectiveConfig
from alphagrpo_ext.objectives.regularizers import score_transitions
from alphagrpo_ext.registry import UnknownNameError
from alphagrpo_ext.trajectory import DenoisingWindow, ImageSegment, Trajectory
from support.scalar_scores import (
    NUM_CHANNELS,
    NUM_IMAGES,
    NUM_STEPS,
    make_scores,
    near,
    scalar_divergence,
    scalar_log_prob,
)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kl_type", ["mean", "velocity"])
def test_loss_and_metrics_equal_scalar_arithmetic(kl_type: str, masked: bool) -> None:
    config = ObjectiveConfig(noise_level=0.6, epsilon=0.01, beta=0.3, kl_type=kl_type, advantage_clip=1.5)
    scores = make_scores(masked=masked)
    old, ref = near(scores.velocities, 0.1), near(scores.velocities, 0.5, seed=2)
    advantages = torch.tensor([4.0, -0.7, -3.0])
    output = OBJECTIVES.get("flow_grpo")(config)(scores, advantages, old, ref)

    losses, ratios, clipped, divergences = [], [], [], []
    for i in range(NUM_IMAGES):
        advantage = max(-1.5, min(1.5, advantages[i].item()))
        image_loss = 0.0
        for k in range(NUM_STEPS):
            log_ratio = scalar_log_prob(scores, scores.velocities, 0.6, i, k) - scalar_log_prob(scores, old, 0.6, i, k)
            ratio = math.exp(log_ratio)
            bounded = max(0.99, min(1.01, ratio))
            divergence = scalar_divergence(scores, ref, 0.6, kl_type, i, k)
            image_loss += -min(ratio * advantage, bounded * advantage) + 0.3 * divergence
            ratios.append(ratio)
            clipped.append(bounded * advantage < ratio * advantage)
            divergences.append(divergence)
        losses.append(image_loss / NUM_STEPS)

    assert output.loss.tolist() == pytest.approx(losses, rel=1e-4)
    assert output.metrics["ratio_mean"].item() == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert output.metrics["kl"].item() == pytest.approx(sum(divergences) / len(divergences), rel=1e-4)
    assert 0 < sum(clipped) < len(clipped)
    assert output.metrics["clip_ratio"].item() == pytest.approx(sum(clipped) / len(clipped))


@pytest.mark.invariant
def test_ratio_is_exactly_one_without_old_velocities() -> None:
    output = OBJECTIVES.get("flow_grpo")(ObjectiveConfig())(make_scores(), torch.tensor([1.0, -2.0, 0.5]))
    assert output.metrics["ratio_mean"].item() == 1.0
    assert output.metrics["clip_ratio"].item() == 0.0
    assert output.loss.tolist() == [-1.0, 2.0, -0.5]


def test_clipped_steps_have_no_gradient() -> None:
    scores = make_scores()
    old = near(scores.velocities, 0.5)
    objective = OBJECTIVES.get("flow_grpo")(ObjectiveConfig(epsilon=1e-6))
    advantages = torch.ones(NUM_IMAGES)
    objective(scores, advantages, old).loss.sum().backward()
    log_prob, old_log_prob = (
        score_transitions(scores, v, objective.config).log_prob for v in (scores.velocities, old)
    )
    log_ratio = log_prob - old_log_prob
    risen = (log_ratio > 1e-6).detach()
    assert risen.any() and not risen.all()
    moved = scores.velocities.grad.abs().amax(dim=(-2, -1)) > 0
    assert torch.equal(moved, ~risen)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("sde_type", ["flow_sde", "flow_cps"])
def test_a_gradient_step_follows_the_advantage(sde_type: str, sign: float) -> None:
    scores = make_scores()
    objective = OBJECTIVES.get("flow_grpo")(ObjectiveConfig(sde_type=sde_type))
    objective(scores, sign * torch.ones(NUM_IMAGES)).loss.sum().backward()
    before = score_transitions(scores, scores.velocities, objective.config).log_prob
    after = score_transitions(scores, scores.velocities - 0.1 * scores.velocities.grad, objective.config).log_prob
    assert (sign * (after - before) > 0).all()


def test_advantages_are_clamped() -> None:
    objective = OBJECTIVES.get("flow_grpo")(ObjectiveConfig(advantage_clip=2.0))
    output = objective(make_scores(), torch.tensor([7.0, -7.0, 1.0]))
    assert output.loss.tolist() == [-2.0, 2.0, -1.0]


def test_zero_advantage_has_zero_gradient() -> None:
    scores = make_scores()
    OBJECTIVES.get("flow_grpo")(ObjectiveConfig())(scores, torch.zeros(NUM_IMAGES)).loss.sum().backward()
    assert not scores.velocities.grad.any()


@pytest.mark.parametrize("kl_type", ["mean", "velocity"])
def test_regulariser_is_inside_the_graph(kl_type: str) -> None:
    scores = make_scores()
    ref = near(scores.velocities, 0.5)
    objective = OBJECTIVES.get("flow_grpo")(ObjectiveConfig(beta=1.0, kl_type=kl_type))
    objective(scores, torch.zeros(NUM_IMAGES), ref_velocities=ref).loss.sum().backward()
    closer = replace(scores, velocities=scores.velocities.detach() - 0.01 * scores.velocities.grad)
    before = objective(scores, torch.zeros(NUM_IMAGES), ref_velocities=ref).metrics["kl"]
    assert objective(closer, torch.zeros(NUM_IMAGES), ref_velocities=ref).metrics["kl"] < before


def test_unknown_names_raise() -> None:
    with pytest.raises(ValueError, match="unknown image_kl_type 'forward'.*mean, velocity"):
        OBJECTIVES.get("flow_grpo")(ObjectiveConfig(kl_type="forward"))
    with pytest.raises(UnknownNameError, match="Did you mean 'flow_grpo'"):
        OBJECTIVES.get("flow_gpro")


GRIDS = ((2, 2), (1, 3))


def make_packed(guidance: GuidanceConfig, seed: int = 0) -> tuple[list[Trajectory], PackedBatch, PackedOutput]:
    """Two trajectories with an image each, of different sizes, and one without an image between them."""
    generator = torch.Generator().manual_seed(seed)
    times = flow_timesteps(6)[:4]
    trajectories, copies = [], []
    for i, grid in enumerate(GRIDS):
        num_tokens = grid[0] * grid[1]
        window = DenoisingWindow(
            latents=torch.randn(4, num_tokens, NUM_CHANNELS, generator=generator),
            timesteps=times,
            start=0,
            log_probs=torch.zeros(3),
        )
        image = ImageSegment(window.latents[-1], grid, sampled=True, window=window)
        trajectories.append(Trajectory([image]))
        for step in range(3):
            branches = guidance.branches_at(times[step])
            copies += [(i, step, BRANCHES.index(name), num_tokens) for name in branches]
    trajectories.insert(1, Trajectory([]))
    # The order of copies is the packer's business.
    order = torch.randperm(len(copies), generator=generator).tolist()
    copies = [copies[i] for i in order]
    width = max(copy[3] for copy in copies)
    layout = VelocityLayout(
        image=torch.tensor([c[0] for c in copies]),
        step=torch.tensor([c[1] for c in copies]),
        branch=torch.tensor([c[2] for c in copies]),
        mask=torch.arange(width) < torch.tensor([c[3] for c in copies])[:, None],
        branches=BRANCHES,
    )
    nothing = torch.zeros(0, dtype=torch.long)
    batch = PackedBatch({}, nothing, nothing, layout, torch.tensor([0, 2]), guidance)
    velocities = torch.randn(len(copies), width, NUM_CHANNELS, generator=generator, requires_grad=True)
    return trajectories, batch, PackedOutput(torch.zeros(0), torch.zeros(0), velocities)


@pytest.mark.parametrize("renorm_type", ["global", "channel", "text_channel"])
@pytest.mark.parametrize("image_scale", [1.0, 2.0])
# The window is at 1, .8, .6.
@pytest.mark.parametrize("interval", [(0.7, 1.0), (0.0, 0.8), (0.0, 1.0), (0.0, 0.1)])
def test_guided_velocities_equal_a_loop_over_steps(
    interval: tuple[float, float], image_scale: float, renorm_type: str
) -> None:
    guidance = BagelGuidance(GuidanceConfig(3.0, image_scale, interval, renorm_type))
    trajectories, batch, output = make_packed(guidance)
    scores = ImageScores.from_packed(trajectories, batch, output)
    assert scores.trajectory.tolist() == [0, 2]
    layout = batch.velocities
    for i, trajectory in enumerate((trajectories[0], trajectories[2])):
        window = trajectory.sampled_images[0].window
        num_tokens = window.latents.shape[1]
        for k in range(window.num_steps):
            parts = {}
            for name in guidance.branches_at(window.timesteps[k]):
                chosen = (layout.image == i) & (layout.step == k) & (layout.branch == BRANCHES.index(name))
                (velocity,) = output.velocities[chosen]
                parts[name] = velocity[:num_tokens]
            torch.testing.assert_close(scores.velocities[i, k, :num_tokens], guidance.combine(parts))
            assert torch.equal(scores.latents[i, k, :num_tokens], window.latents[k])
            assert torch.equal(scores.next_latents[i, k, :num_tokens], window.latents[k + 1])
            assert scores.t[i, k] == window.timesteps[k]
            assert scores.t_next[i, k] == window.timesteps[k + 1]
            assert scores.mask[i, 0].sum() == num_tokens


def test_every_branch_gets_a_gradient() -> None:
    guidance = BagelGuidance(GuidanceConfig(3.0, 2.0, (0.7, 1.0)))
    trajectories, batch, output = make_packed(guidance)
    scores = ImageScores.from_packed(trajectories, batch, output)
    objective = OBJECTIVES.get("flow_grpo")(ObjectiveConfig())
    objective(scores, torch.ones(2)).loss.sum().backward()
    gradient = output.velocities.grad
    assert (gradient.abs().amax(dim=(1, 2)) > 0).all()
    assert not gradient[~batch.velocities.mask].any()


def test_images_without_window_are_not_scored() -> None:
    guidance = BagelGuidance(GuidanceConfig())
    trajectories, batch, output = make_packed(guidance)
    assert ImageScores.from_packed(trajectories, replace(batch, velocities=None), output) is None


def test_windows_of_different_lengths_raise() -> None:
    guidance = BagelGuidance(GuidanceConfig())
    trajectories, batch, output = make_packed(guidance)
    window = trajectories[0].sampled_images[0].window
    window.timesteps = window.timesteps[:-1]
    with pytest.raises(ValueError, match="same number of steps"):
        ImageScores.from_packed(trajectories, batch, output)
