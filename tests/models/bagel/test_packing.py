# SPDX-License-Identifier: Apache-2.0

"""The packed forward against the cached rollout: same log-probabilities, same visibility, and gradients that reach."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.flow.transitions import transition
from alphagrpo_ext.models.bagel import BagelModel
from alphagrpo_ext.models.bagel.guidance import BRANCHES
from alphagrpo_ext.models.contract import PackedBatch, PackedOutput
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.trajectory import ImageSegment, TextSegment, Trajectory


TASKS = ("t2i", "think", "edit", "two_rounds")
TEXT_GUIDANCE = GuidanceConfig(text_scale=3.0, interval=(0.0, 1.0))
# The schedule below has two times of its window inside this interval, and one outside it.
GUIDANCES = {
    "none": GuidanceConfig(text_scale=1.0),
    "text": TEXT_GUIDANCE,
    "text_and_image": replace(TEXT_GUIDANCE, image_scale=1.5, renorm_type="text_channel"),
    "part_of_window": replace(TEXT_GUIDANCE, image_scale=1.5, interval=(0.8, 0.95)),
}


def painting(guidance: GuidanceConfig, **kwargs) -> DenoisingConfig:
    settings = {"num_timesteps": 7, "guidance": guidance, "window_start": 1, "window_size": 3, **kwargs}
    return DenoisingConfig(**settings)


CONFIG = painting(GUIDANCES["text_and_image"])


def painted_images(trajectories: Sequence[Trajectory]) -> list[ImageSegment]:
    """The sampled images with a window, in packing order."""
    return [image for t in trajectories for image in t.sampled_images if image.window is not None]


def guided_velocities(
    batch: PackedBatch, output: PackedOutput, trajectories: Sequence[Trajectory]
) -> list[torch.Tensor]:
    """For every painted image, its guided velocities `(steps, tokens, channels)`."""
    layout = batch.velocities
    branches: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    for row, key in enumerate(zip(layout.image.tolist(), layout.step.tolist(), strict=True)):
        velocity = output.velocities[row, layout.mask[row]]
        branches.setdefault(key, {})[BRANCHES[layout.branch[row]]] = velocity
    guided = []
    for i, image in enumerate(painted_images(trajectories)):
        steps = []
        for step, t in enumerate(image.window.timesteps[:-1]):
            assert branches[i, step].keys() == set(batch.guidance.branches_at(t))
            steps.append(batch.guidance.combine(branches[i, step]))
        guided.append(torch.stack(steps))
    return guided


def score(
    model: Callable[..., PackedOutput], batch: PackedBatch, trajectories: Sequence[Trajectory], config: DenoisingConfig
) -> tuple[list[list[float]], list[torch.Tensor]]:
    """Log-probabilities of the sampled tokens of every trajectory, and of the transitions of every painted image."""
    with torch.no_grad():
        output = model(**batch.inputs)
    texts = [[] for _ in trajectories]
    rows = zip(batch.score_trajectory.tolist(), batch.score_column.tolist(), output.log_probs.tolist(), strict=True)
    for trajectory, column, log_prob in rows:
        assert column == len(texts[trajectory])
        texts[trajectory].append(log_prob)
    transitions = []
    velocities = guided_velocities(batch, output, trajectories)
    for image, velocity in zip(painted_images(trajectories), velocities, strict=True):
        window = image.window
        latents, t = window.latents, window.timesteps
        scored = transition(
            config.sde_type, latents[:-1], velocity, t[:-1], t[1:], config.noise_level, next_latents=latents[1:]
        )
        transitions.append(scored.log_prob)
    return texts, transitions


def check_on_policy(
    model: BagelModel,
    trajectories: Sequence[Trajectory],
    config: DenoisingConfig,
    forward: Callable[..., PackedOutput] | None = None,
) -> None:
    batch = model.pack(trajectories, config.guidance)
    texts, transitions = score(forward or model, batch, trajectories, config)
    for trajectory, log_probs in zip(trajectories, texts, strict=True):
        expected = [value for text in trajectory.sampled_texts for value in text.log_probs]
        torch.testing.assert_close(torch.tensor(log_probs), torch.tensor(expected), rtol=0, atol=1e-4)
    for image, log_probs in zip(painted_images(trajectories), transitions, strict=True):
        torch.testing.assert_close(log_probs, image.window.log_probs, rtol=0, atol=1e-5)


@pytest.mark.invariant
class TestOnPolicy:
    """Freshly sampled trajectories score as they did when they were sampled, so that every ratio is 1."""

    @pytest.mark.parametrize("task", TASKS)
    @pytest.mark.parametrize("guidance", GUIDANCES)
    def test_scores_equal_the_rollout(self, tiny_bagel, rollout, task, guidance):
        config = painting(GUIDANCES[guidance])
        trajectories = rollout(tiny_bagel, task, config)
        rounds = 2 if task == "two_rounds" else 1
        assert all(len(trajectory.sampled_images) == rounds for trajectory in trajectories)
        check_on_policy(tiny_bagel, trajectories, config)
        check_on_policy(tiny_bagel, trajectories[-1:], config)

    @pytest.mark.parametrize("sde_type", ["flow_sde", "flow_cps"])
    @pytest.mark.parametrize("window_start", [0, 2])
    def test_transitions(self, tiny_bagel, rollout, sde_type, window_start):
        config = painting(GUIDANCES["text"], sde_type=sde_type, window_start=window_start)
        check_on_policy(tiny_bagel, rollout(tiny_bagel, "think", config), config)

    def test_temperature_and_filters(self, tiny_bagel, rollout):
        """The temperature belongs to the policy, top-p and top-k do not."""
        trajectories = rollout(tiny_bagel, "think", CONFIG, temperature=0.6, top_p=0.8, top_k=10)
        check_on_policy(tiny_bagel, trajectories, CONFIG, forward=partial(tiny_bagel, temperature=0.6))

    def test_of_a_mixed_batch(self, tiny_bagel, rollout):
        trajectories = [
            trajectory
            for i, (task, grid) in enumerate(zip(TASKS, ((2, 3), (4, 2), (3, 3), (1, 2)), strict=True))
            for trajectory in rollout(tiny_bagel, task, CONFIG, grid=grid, seed=i, max_new_tokens=8)
        ]
        ended = {text.ended for trajectory in trajectories for text in trajectory.sampled_texts}
        assert ended == {True, False}
        check_on_policy(tiny_bagel, trajectories, CONFIG)

    def test_deterministic_images_have_no_velocities(self, tiny_bagel, rollout):
        config = painting(GUIDANCES["text"], window_start=None, window_size=0)
        trajectories = rollout(tiny_bagel, "two_rounds", config)
        batch = tiny_bagel.pack(trajectories, config.guidance)
        assert batch.velocities is None
        assert len(batch.image_trajectory) == 0
        output = tiny_bagel(**batch.inputs)
        assert output.velocities is None
        expected = [value for t in trajectories for text in t.sampled_texts for value in text.log_probs]
        torch.testing.assert_close(output.log_probs, torch.tensor(expected), rtol=0, atol=1e-4)


def test_blank_image_runs_the_vision_tower_and_changes_nothing(tiny_bagel, rollout):
    trajectories = rollout(tiny_bagel, "think", CONFIG)
    inputs = tiny_bagel.pack(trajectories, CONFIG.guidance).inputs
    assert "vit_patches" not in inputs
    ran = []
    handle = tiny_bagel.vit_model.vision_model.register_forward_hook(lambda *_: ran.append(True))
    with torch.no_grad():
        expected = tiny_bagel(**inputs)
        assert not ran
        actual = tiny_bagel(**tiny_bagel.with_all_parts(inputs))
    handle.remove()
    assert ran
    assert torch.equal(actual.log_probs, expected.log_probs)
    assert torch.equal(actual.velocities, expected.velocities)
    inputs = tiny_bagel.pack(rollout(tiny_bagel, "edit", CONFIG), CONFIG.guidance).inputs
    assert tiny_bagel.with_all_parts(inputs) is inputs


@pytest.mark.invariant
def test_neighbours_change_nothing(tiny_bagel, rollout):
    """A sample packed alone and the same sample padded to longer neighbours."""
    short, *_ = rollout(tiny_bagel, "t2i", CONFIG, grid=(1, 2))
    thinking = rollout(tiny_bagel, "think", CONFIG, grid=(2, 2))[:2]
    long = rollout(tiny_bagel, "two_rounds", CONFIG, grid=(3, 4), max_new_tokens=10)[:1]
    trajectories = [short, *long, *thinking, *rollout(tiny_bagel, "edit", CONFIG)[:1]]
    batch = tiny_bagel.pack(trajectories, CONFIG.guidance)
    together = tiny_bagel(**batch.inputs)
    guided = guided_velocities(batch, together, trajectories)
    for i, trajectory in enumerate(trajectories):
        batch_alone = tiny_bagel.pack([trajectory], CONFIG.guidance)
        alone = tiny_bagel(**batch_alone.inputs)
        own = batch.score_trajectory == i
        torch.testing.assert_close(together.log_probs[own], alone.log_probs, rtol=0, atol=5e-6)
        torch.testing.assert_close(together.entropies[own], alone.entropies, rtol=0, atol=5e-6)
        expected = guided_velocities(batch_alone, alone, [trajectory])
        images = (batch.image_trajectory == i).nonzero().flatten().tolist()
        assert len(images) == len(trajectory.sampled_images)
        for image, velocity in zip(images, expected, strict=True):
            torch.testing.assert_close(guided[image], velocity, rtol=0, atol=2e-5)


@pytest.mark.invariant
class TestVisibility:
    @pytest.fixture
    def trajectory(self, tiny_bagel, rollout) -> Trajectory:
        return rollout(tiny_bagel, "two_rounds", CONFIG)[-1]

    @pytest.fixture
    def batch(self, tiny_bagel, trajectory) -> PackedBatch:
        return tiny_bagel.pack([trajectory], CONFIG.guidance)

    @torch.no_grad()
    def test_noised_copies_are_seen_by_nobody(self, tiny_bagel, batch):
        expected = tiny_bagel(**batch.inputs)
        copies = range(len(expected.velocities))
        for copy in copies:
            latents = batch.inputs["latents"].clone()
            latents.flatten(0, 1)[batch.inputs["velocity_index"][copy]] += 1.0
            actual = tiny_bagel(**{**batch.inputs, "latents": latents})
            assert torch.equal(actual.log_probs, expected.log_probs)
            changed = [i for i in copies if not torch.equal(actual.velocities[i], expected.velocities[i])]
            assert changed == [copy]

    @torch.no_grad()
    def test_clean_copy_is_seen_by_later_segments_only(self, tiny_bagel, trajectory, batch):
        expected = tiny_bagel(**batch.inputs)
        first, second = (i for i, s in enumerate(trajectory.segments) if isinstance(s, ImageSegment))
        segments = list(trajectory.segments)
        segments[first] = replace(segments[first], latents=segments[first].latents + 1.0)
        actual = tiny_bagel(**tiny_bagel.pack([Trajectory(segments)], CONFIG.guidance).inputs)
        num_first_tokens = len(trajectory.sampled_texts[0].token_ids)
        assert torch.equal(actual.log_probs[:num_first_tokens], expected.log_probs[:num_first_tokens])
        assert (actual.log_probs[num_first_tokens:] != expected.log_probs[num_first_tokens:]).all()
        # The contexts of the second image's other branches are lists of their own, and keep the old picture.
        same = (batch.velocities.image == 0) | (batch.velocities.branch != 0)
        torch.testing.assert_close(actual.velocities[same], expected.velocities[same], rtol=0, atol=2e-5)
        difference = (actual.velocities[~same] - expected.velocities[~same]).abs()
        assert (difference.amax(dim=(1, 2)) > 1e-3).all()

        segments = list(trajectory.segments)
        segments[second] = replace(segments[second], latents=segments[second].latents + 1.0)
        actual = tiny_bagel(**tiny_bagel.pack([Trajectory(segments)], CONFIG.guidance).inputs)
        assert torch.equal(actual.velocities, expected.velocities)
        assert torch.equal(actual.log_probs, expected.log_probs)

    @torch.no_grad()
    def test_pictures_are_seen(self, tiny_bagel, trajectory, batch):
        """What the vision tower reads reaches the later texts."""
        expected = tiny_bagel(**batch.inputs)
        segments = [
            replace(s, pixel_values=-s.pixel_values) if isinstance(s, ImageSegment) else s for s in trajectory.segments
        ]
        actual = tiny_bagel(**tiny_bagel.pack([Trajectory(segments)], CONFIG.guidance).inputs)
        num_first_tokens = len(trajectory.sampled_texts[0].token_ids)
        assert torch.equal(actual.log_probs[:num_first_tokens], expected.log_probs[:num_first_tokens])
        assert (actual.log_probs[num_first_tokens:] != expected.log_probs[num_first_tokens:]).all()

    @torch.no_grad()
    def test_image_depends_on_its_thought(self, tiny_bagel, rollout):
        trajectory = rollout(tiny_bagel, "think", CONFIG)[0]
        batch = tiny_bagel.pack([trajectory], CONFIG.guidance)
        expected = tiny_bagel(**batch.inputs).velocities
        index = next(i for i, s in enumerate(trajectory.segments) if isinstance(s, TextSegment) and s.sampled)
        thought = trajectory.segments[index]
        segments = list(trajectory.segments)
        segments[index] = replace(thought, token_ids=[(thought.token_ids[0] + 1) % 20, *thought.token_ids[1:]])
        actual = tiny_bagel(**tiny_bagel.pack([Trajectory(segments)], CONFIG.guidance).inputs).velocities
        full = batch.velocities.branch == 0
        assert ((actual - expected)[full].abs().amax(dim=(1, 2)) > 1e-3).all()
        assert torch.equal(actual[~full], expected[~full])


class TestGradients:
    def test_velocity_reaches_prompt_and_thought(self, tiny_bagel, rollout):
        trajectory = rollout(tiny_bagel, "think", CONFIG)[0]
        batch = tiny_bagel.pack([trajectory], CONFIG.guidance)
        embedded = []

        def keep(module, args, output):
            output.retain_grad()
            embedded.append(output)

        hook = tiny_bagel.get_input_embeddings().register_forward_hook(keep)
        output = tiny_bagel(**batch.inputs)
        hook.remove()
        output.velocities[batch.velocities.branch == 0].square().sum().backward()
        gradient = embedded[0].grad[0].norm(dim=-1)
        num_context = sum(len(s.content_ids) + 2 for s in trajectory.segments if isinstance(s, TextSegment))
        assert (gradient[:num_context] > 1e-4).all()
        # Delimiters of this branch's copies; what follows them are those of the other branch.
        num_contexts = int(batch.inputs["buckets"][:, :2].prod(dim=1).sum())
        end = num_contexts + 2 * int((batch.velocities.branch == 0).sum())
        assert (gradient[num_contexts:end] > 0).all()
        assert end < len(gradient)
        assert (gradient[end:] == 0).all()

    def test_copies_share_the_gradient_of_their_context(self, tiny_bagel, rollout):
        """The gradient of all steps at once is the sum of the gradients of each."""
        trajectory = rollout(tiny_bagel, "edit", CONFIG)[0]
        batch = tiny_bagel.pack([trajectory], CONFIG.guidance)
        weight = tiny_bagel.get_input_embeddings().weight

        def gradient(copies: slice) -> torch.Tensor:
            loss = tiny_bagel(**batch.inputs).velocities[copies].square().sum()
            return torch.autograd.grad(loss, weight)[0]

        parts = sum(gradient(slice(i, i + 1)) for i in range(len(batch.velocities.step)))
        torch.testing.assert_close(gradient(slice(None)), parts, rtol=1e-4, atol=1e-4)
