# SPDX-License-Identifier: Apache-2.0


from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.models.bagel.cache import BagelCache
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.rollout.generator import sample_generator
from alphagrpo_ext.trajectory import ImageSegment, TextSegment, Trajectory


PROMPTS = ("a red circle", "a blue square and a green circle")
GROUPS = [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4
CONFIG = RolloutConfig(
    height=24,
    width=24,
    max_new_tokens=12,
    denoising=DenoisingConfig(
        num_timesteps=6,
        timestep_shift=1.0,
        guidance=GuidanceConfig(text_scale=3.0, interval=(0.5, 1.0)),
        window_start=2,
        window_size=2,
    ),
    branches_per_thought=2,
)


@pytest.fixture(scope="module")
def model(make_shapes_bagel: Callable[[], BagelModel]) -> BagelModel:
    return make_shapes_bagel()


@pytest.fixture
def sample(model: BagelModel, shapes_processor: BagelProcessor) -> Callable[..., list[Trajectory]]:
    """Samples one trajectory a prompt, with the randomness of the given sample indices; by default, of 0, 1, 2 ..."""

    def sample(
        prompts: Sequence[str] = GROUPS,
        config: RolloutConfig = CONFIG,
        indices: Sequence[int] | None = None,
        task: str = "reasoning_t2i",
        image: Image.Image | None = None,
        **task_settings: Any,
    ) -> list[Trajectory]:
        task = TASKS.get(task)(**{"think": True, **task_settings})
        rows = [{"prompt": prompt, **({} if image is None else {"image": image})} for prompt in prompts]
        indices = range(len(prompts)) if indices is None else indices
        generate = RolloutGenerator(model, shapes_processor, task)
        return generate(rows, [sample_generator(0, 0, i) for i in indices], config)

    return sample


@pytest.fixture
def evaluations(model: BagelModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows of the cache and images of every evaluation of the network from now on."""
    seen = []
    predict_velocity = model.predict_velocity

    def recording(cache: BagelCache, latents: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append((cache.num_rows, len(latents)))
        return predict_velocity(cache, latents, *args)

    monkeypatch.setattr(model, "predict_velocity", recording)
    return seen


def assert_close(actual: Trajectory, expected: Trajectory) -> None:
    """Exact in what was decided; other batch shapes may round floating-point numbers differently."""
    assert [text.token_ids for text in actual.sampled_texts] == [text.token_ids for text in expected.sampled_texts]
    for image, other in zip(actual.sampled_images, expected.sampled_images, strict=True):
        torch.testing.assert_close(image.latents, other.latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(image.window.latents, other.window.latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(image.window.log_probs, other.window.log_probs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("think", [True, False])
def test_branches_share_thought_and_path_up_to_the_window(
    sample: Callable[..., list[Trajectory]], think: bool
) -> None:
    trajectories = sample(think=think)
    pairs = list(zip(trajectories[::2], trajectories[1::2], strict=True))
    for first, second in pairs:
        (image,), (other,) = first.sampled_images, second.sampled_images
        assert [t.token_ids for t in first.sampled_texts] == [t.token_ids for t in second.sampled_texts]
        assert [t.log_probs for t in first.sampled_texts] == [t.log_probs for t in second.sampled_texts]
        assert torch.equal(image.window.latents[0], other.window.latents[0])
        # Each state after it is its own.
        assert ((image.window.latents[1:] - other.window.latents[1:]).abs().amax(dim=(1, 2)) > 0.1).all()
        assert (image.latents - other.latents).abs().max() > 0.1
    starts = [first.sampled_images[0].window.latents[0] for first, _ in pairs]
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(starts) for b in starts[:i])
    if think:
        assert len({tuple(first.sampled_texts[0].token_ids) for first, _ in pairs}) == len(pairs)


@pytest.mark.invariant
def test_first_branch_is_the_sample_without_branches(sample: Callable[..., list[Trajectory]]) -> None:
    alone = sample(config=replace(CONFIG, branches_per_thought=1))
    for forks in (2, 4):
        branched = sample(config=replace(CONFIG, branches_per_thought=forks))
        for actual, expected in zip(branched[::forks], alone[::forks], strict=True):
            assert_close(actual, expected)


@pytest.mark.invariant
def test_branch_depends_on_its_own_seed_and_the_first_one_s_alone(sample: Callable[..., list[Trajectory]]) -> None:
    together = sample()
    # Another batch, other neighbours, and each branch's noise from its own generator.
    apart = [*sample([PROMPTS[1]] * 2, indices=[6, 7]), *sample([PROMPTS[0]] * 4, indices=[9, 8, 0, 1])]
    for actual, expected in ((apart[0], together[6]), (apart[1], together[7]), (apart[5], together[1])):
        assert_close(actual, expected)
    in_parts = sample(config=replace(CONFIG, batch_size=4))
    for actual, expected in zip(in_parts, together, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize(
    ("window_start", "expected"),
    [
        # Guidance doubles the rows of the first three of five steps, at times 1, .8 and .6.
        (2, [(8, 8), (8, 8), (8, 8), (4, 8), (4, 8)]),
        (0, [(8, 8), (8, 16), (8, 16), (4, 8), (4, 8)]),
    ],
)
def test_evaluations_up_to_the_window_are_shared(
    sample: Callable[..., list[Trajectory]],
    evaluations: list[tuple[int, int]],
    window_start: int,
    expected: list[tuple[int, int]],
) -> None:
    sample(config=replace(CONFIG, denoising=replace(CONFIG.denoising, window_start=window_start)))
    assert evaluations == expected


def test_thought_is_decoded_once_for_all_its_images(
    model: BagelModel, sample: Callable[..., list[Trajectory]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    sample_text = model.sample_text

    def recording(cache: BagelCache, uniforms: torch.Tensor, **sampling: Any) -> Any:
        shapes.append((cache.num_rows, len(uniforms)))
        return sample_text(cache, uniforms, **sampling)

    monkeypatch.setattr(model, "sample_text", recording)
    trajectories = sample()
    # Two branches of guidance, two groups, two thoughts in each.
    assert shapes == [(8, 4)]
    first, second = (trajectory.sampled_texts[0] for trajectory in trajectories[:2])
    assert first is not second
    assert first.token_ids is not second.token_ids


def test_forked_cache_equals_one_row_an_image(model: BagelModel) -> None:
    grid = (3, 3)
    contexts = [[TextSegment([20, 21, 22, 23])], [TextSegment([24])], []]
    latents = torch.randn(12, 9, model.latent_channels, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(6, 5, generator=torch.Generator().manual_seed(1))
    shared = model.prefill(contexts, group_size=2, capacity=7 + model.image_slots(grid))
    model.sample_text(shared, uniforms)
    rows = model.prefill(contexts, group_size=4, capacity=7 + model.image_slots(grid))
    model.sample_text(rows, uniforms.repeat_interleave(2, dim=0))
    t = torch.tensor(0.7)
    before = [keys.clone() for keys in shared.keys]
    actual = model.predict_velocity(shared, latents, grid, t)
    torch.testing.assert_close(actual, model.predict_velocity(rows, latents, grid, t), atol=1e-5, rtol=1e-4)
    assert all(torch.equal(keys, old) for keys, old in zip(shared.keys, before, strict=True))
    with pytest.raises(ValueError, match="8 images cannot share 6 rows"):
        model.predict_velocity(shared, latents[:8], grid, t)


def test_later_rounds_do_not_branch(sample: Callable[..., list[Trajectory]]) -> None:
    config = replace(CONFIG, branches_per_thought=4)
    trajectories = sample(
        [PROMPTS[0]] * 4,
        config,
        task="self_reflection",
        image=Image.new("RGB", (24, 24), "red"),
        num_reflection_rounds=2,
    )
    firsts, seconds = zip(*(trajectory.sampled_texts for trajectory in trajectories), strict=True)
    assert len({tuple(text.token_ids) for text in firsts}) == 1
    assert len({tuple(text.token_ids) for text in seconds}) == 4
    for trajectory in trajectories:
        first, second = trajectory.sampled_images
        assert torch.equal(first.window.latents[0], trajectories[0].sampled_images[0].window.latents[0])
        assert isinstance(second, ImageSegment)
        if trajectory is not trajectories[0]:
            assert not torch.equal(second.window.latents[0], trajectories[0].sampled_images[1].window.latents[0])


def test_impossible_branches_raise(sample: Callable[..., list[Trajectory]]) -> None:
    with pytest.raises(ValueError, match="branches_per_thought=2 does not divide .* 4, 3"):
        sample(GROUPS[:-1])
    with pytest.raises(ValueError, match="branches_per_thought=2 needs a stochastic window"):
        replace(CONFIG, denoising=replace(CONFIG.denoising, window_start=None, window_size=0))
    with pytest.raises(ValueError, match="branches_per_thought must be at least 1, but is 0"):
        replace(CONFIG, branches_per_thought=0)
    assert CONFIG.deterministic().branches_per_thought == 1
