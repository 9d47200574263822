# SPDX-License-Identifier: Apache-2.0

"""Prefill computes only what is new, and the result does not depend on what was reused."""

import pytest
import torch

from alphagrpo_ext.models.bagel import BagelModel
from alphagrpo_ext.models.bagel.cache import BagelCache
from alphagrpo_ext.models.bagel.generation import append_sequences, plan_prefill
from alphagrpo_ext.models.work import WorkCounter
from alphagrpo_ext.trajectory import ImageSegment, Segment, TextSegment


GRID = (2, 3)
A, B, C = TextSegment([1, 2, 3]), TextSegment([4]), TextSegment([5, 6, 7, 8])


@pytest.fixture
def model(tiny_bagel: BagelModel) -> BagelModel:
    return tiny_bagel


@pytest.fixture
def image(model: BagelModel) -> ImageSegment:
    generator = torch.Generator().manual_seed(3)
    patch = model.config.vision_config.patch_size
    pixels = torch.rand(3, 2 * patch, 2 * patch, generator=generator) * 2 - 1
    return ImageSegment(torch.randn(6, model.latent_channels, generator=generator), GRID, pixel_values=pixels)


def velocities(model: BagelModel, cache: BagelCache) -> torch.Tensor:
    """Velocities of one noised image after a text, for every sample of a cache."""
    model.sample_text(cache, torch.full((cache.num_rows, 3), 0.4))
    noise = torch.randn(1, 6, model.latent_channels, generator=torch.Generator().manual_seed(1))
    return model.predict_velocity(cache, noise.expand(cache.num_rows, -1, -1), GRID, torch.tensor(0.6))


def prefill(model: BagelModel, contexts: list[list[Segment]], past: BagelCache | None = None, group: int = 1):
    """The cache, and the tokens that were run."""
    work = WorkCounter()
    with work.of(model):
        cache = model.prefill(contexts, group, capacity=5 + model.image_slots(GRID), past=past)
    return cache, work.tokens["prefill"]


def one_by_one(model: BagelModel, contexts: list[list[Segment]]) -> torch.Tensor:
    return torch.cat([velocities(model, prefill(model, [context])[0]) for context in contexts])


def test_plan_runs_what_begins_no_other_context(model: BagelModel) -> None:
    again = TextSegment(list(A.token_ids))
    plan = plan_prefill([[A, B], [A], [], [C], [again, B]], [], model.config)
    assert [sequence.num_tokens for sequence in plan.sequences] == [5 + 3, 6]
    assert plan.indices == [0, 0, plan.indices[2], 1, 0]
    assert plan.extents == [(8, 2), (5, 1), (0, 0), (6, 1), (8, 2)]
    assert plan.past_blocks == [0, 0]


def test_plan_goes_on_from_the_longest_beginning(model: BagelModel, image: ImageSegment) -> None:
    past = [[A], [A, image, B], [C]]
    plan = plan_prefill([[A, image, B, C], [A, image, C], [B]], past, model.config)
    assert plan.past_samples[:2] == [1, 1]
    # An image is two blocks: one for each of its encoders.
    assert plan.past_blocks == [4, 3, 0]
    assert [sequence.num_tokens for sequence in plan.sequences] == [6, 6, 3]
    assert [sequence.und.blocks for sequence in plan.sequences] == [[4], [3], [0]]
    assert plan.extents[0] == (5 + 2 + 3 + 6, 5)


def test_equal_images_are_not_the_same_one(model: BagelModel, image: ImageSegment) -> None:
    other = ImageSegment(image.latents.clone(), GRID, pixel_values=image.pixel_values)
    assert len(plan_prefill([[image], [other]], [], model.config).sequences) == 2
    unseen = ImageSegment(image.latents, GRID)
    assert len(plan_prefill([[image], [unseen]], [], model.config).sequences) == 2


@pytest.mark.invariant
def test_beginnings_of_a_context_are_the_contexts_themselves(model: BagelModel, image: ImageSegment) -> None:
    contexts = [[A, image, B], [A, image], [A], [], [C], [A, image, B]]
    cache, num_tokens = prefill(model, contexts)
    alone = [prefill(model, [context]) for context in contexts]
    assert num_tokens == alone[0][1] + alone[4][1]
    assert cache.positions.tolist() == [int(one.positions[0]) for one, _ in alone]
    torch.testing.assert_close(velocities(model, cache), one_by_one(model, contexts), atol=2e-5, rtol=0)


@pytest.mark.invariant
@pytest.mark.parametrize("group", [1, 2])
def test_a_turn_after_another_reads_what_is_new(model: BagelModel, image: ImageSegment, group: int) -> None:
    """Some samples are continued twice, one not at all, and one context is new."""
    first, _ = prefill(model, [[A, image, B], [C, image], [A, B]], group=group)
    uniforms = torch.rand(2 * group, 3, generator=torch.Generator().manual_seed(0))
    text = model.sample_text(first, uniforms)
    thoughts = [
        TextSegment(ids, sampled=True, ended=ended) for ids, ended in zip(text.token_ids, text.ended, strict=True)
    ]
    painted = ImageSegment(image.latents + 1, GRID, pixel_values=image.pixel_values.flip(-1))
    histories = [[A, image, B, thoughts[0], painted], [C, image, thoughts[-1]]]
    contexts = [[*histories[0], C], histories[0], [*histories[0], B], [*histories[1], A], [A, B, C], [C, A], [A, C]]
    second, num_tokens = prefill(model, contexts, past=first)
    new = [[painted, C], [painted, B], [A], [C], [A], [C]]
    assert num_tokens == sum(prefill(model, [context])[1] for context in new)
    assert second.positions.tolist() == [int(prefill(model, [context])[0].positions[0]) for context in contexts]
    # A third turn goes on from the second in the same way.
    expected = one_by_one(model, contexts)
    torch.testing.assert_close(velocities(model, second), expected, atol=2e-5, rtol=0)
    thought = second.segments[3][-1]
    last = [[*contexts[3], thought, B], contexts[1], [*contexts[6], B]]
    third, num_tokens = prefill(model, last, past=second)
    assert num_tokens == 2 * 3
    torch.testing.assert_close(velocities(model, third), one_by_one(model, last), atol=2e-5, rtol=0)


def test_what_was_used_up_holds_nothing(model: BagelModel) -> None:
    """Two caches of a rollout are never in memory at once."""
    first, _ = prefill(model, [[A], [B]])
    prefill(model, [[A, C]], past=first)
    assert not (first.prefix_keys or first.prefix_values or first.keys or first.values)


def test_without_anything_in_common_a_past_changes_nothing(model: BagelModel) -> None:
    first, _ = prefill(model, [[A], [B]])
    second, num_tokens = prefill(model, [[C]], past=first)
    assert num_tokens == 6
    assert torch.equal(velocities(model, second), one_by_one(model, [[C]]))


def test_blocks_that_are_no_segments_are_no_past(model: BagelModel) -> None:
    first, _ = prefill(model, [[A]])
    append_sequences(model, first, plan_prefill([[A, B]], [[A]], model.config).sequences)
    assert first.segments is None
    _, num_tokens = prefill(model, [[A, B]], past=first)
    assert num_tokens == 5 + 3
