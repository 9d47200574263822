# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.models.work import WorkCounter
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator
from alphagrpo_ext.rollout.denoising import DenoisingConfig, denoise
from alphagrpo_ext.rollout.generator import sample_generator
from alphagrpo_ext.trajectory import Trajectory


PROMPTS = ("a red circle", "a blue square and a green circle", "two yellow triangles")
GUIDANCE = GuidanceConfig(text_scale=3.0, interval=(0.4, 1.0))
CONFIG = RolloutConfig(
    height=24,
    width=24,
    max_new_tokens=12,
    denoising=DenoisingConfig(num_timesteps=6, timestep_shift=1.0, guidance=GUIDANCE, window_start=1, window_size=2),
)


@pytest.fixture(scope="module")
def model(make_shapes_bagel: Callable[[], BagelModel]) -> BagelModel:
    return make_shapes_bagel()


@pytest.fixture
def sample(model: BagelModel, shapes_processor: BagelProcessor) -> Callable[..., list[Trajectory]]:
    """Samples one trajectory a prompt, with the randomness of the given sample indices."""

    def sample(
        prompts: Sequence, indices: Sequence[int], config: RolloutConfig = CONFIG, think: bool = True
    ) -> list[Trajectory]:
        generate = RolloutGenerator(model, shapes_processor, TASKS.get("reasoning_t2i")(think=think))
        return generate([{"prompt": p} for p in prompts], [sample_generator(0, 0, i) for i in indices], config)

    return sample


class Calls:
    """Records the first argument of every call of a method."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: object, name: str) -> None:
        self.arguments: list = []
        method = getattr(target, name)

        def record(argument, *args, **kwargs):
            self.arguments.append(argument)
            return method(argument, *args, **kwargs)

        monkeypatch.setattr(target, name, record)


def assert_equal_samples(actual: Trajectory, expected: Trajectory) -> None:
    """Exact in what was decided; other batch shapes may round floating-point numbers differently."""
    for text, expected_text in zip(actual.sampled_texts, expected.sampled_texts, strict=True):
        assert text.token_ids == expected_text.token_ids
        assert text.ended == expected_text.ended
        assert text.log_probs == pytest.approx(expected_text.log_probs, abs=1e-4)
    for image, expected_image in zip(actual.sampled_images, expected.sampled_images, strict=True):
        torch.testing.assert_close(image.latents, expected_image.latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(image.window.latents, expected_image.window.latents, atol=1e-4, rtol=1e-4)


def test_context_is_prefilled_once_a_group(model: BagelModel, sample: Callable[..., list[Trajectory]]) -> None:
    work = WorkCounter()
    with work.of(model):
        trajectories = sample([PROMPTS[0]] * 3 + [PROMPTS[1]] * 3, range(6))
    first, second = trajectories[:3], trajectories[3:]
    for group in (first, second):
        assert all(t.segments[1] is group[0].segments[1] for t in group)
    assert first[0].segments[1].token_ids != second[0].segments[1].token_ids
    # System prompt and prompt with two delimiters each; the branch without text is a beginning of that.
    given = [segment for group in (first, second) for segment in group[0].segments[:2]]
    assert work.tokens["prefill"] == sum(len(segment.token_ids) + 2 for segment in given)
    assert work.evaluations["prefill"] == 1


def test_rows_keep_their_order(sample: Callable[..., list[Trajectory]], shapes_processor: BagelProcessor) -> None:
    prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[1], PROMPTS[2]]
    texts = [shapes_processor.decode(t.segments[1].token_ids) for t in sample(prompts, range(4))]
    assert texts == prompts


@pytest.mark.invariant
@pytest.mark.parametrize("think", [True, False])
def test_sample_depends_on_its_own_seed_alone(sample: Callable[..., list[Trajectory]], think: bool) -> None:
    (alone,) = sample([PROMPTS[0]], [3], think=think)
    group = sample([PROMPTS[0]] * 4, range(4), think=think)
    batch = sample([PROMPTS[1]] * 4 + [PROMPTS[0]] * 4, [9, 8, 7, 6, 0, 1, 2, 3], think=think)
    assert_equal_samples(group[3], alone)
    assert_equal_samples(batch[7], alone)
    assert not torch.allclose(group[0].sampled_images[0].latents, alone.sampled_images[0].latents, atol=1e-2)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batch_size_changes_nothing(sample: Callable[..., list[Trajectory]], batch_size: int) -> None:
    prompts = [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2 + [PROMPTS[2]] * 2
    expected = sample(prompts, range(6))
    actual = sample(prompts, range(6), replace(CONFIG, batch_size=batch_size))
    for trajectory, other in zip(actual, expected, strict=True):
        assert_equal_samples(trajectory, other)


def test_batch_size_cuts_between_groups(
    model: BagelModel, sample: Callable[..., list[Trajectory]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefills = Calls(monkeypatch, model, "prefill")
    sample([prompt for prompt in PROMPTS for _ in range(2)], range(6), replace(CONFIG, batch_size=4))
    branches = 2
    assert [len(contexts) for contexts in prefills.arguments] == [2 * branches, 1 * branches]


def test_unequal_groups_equal_separate_ones(sample: Callable[..., list[Trajectory]]) -> None:
    together = sample([PROMPTS[0]] * 4 + [PROMPTS[1]] * 2 + [PROMPTS[2]], range(7))
    separate = [
        *sample([PROMPTS[0]] * 4, range(4)),
        *sample([PROMPTS[1]] * 2, range(4, 6)),
        *sample([PROMPTS[2]], [6]),
    ]
    for trajectory, other in zip(together, separate, strict=True):
        assert_equal_samples(trajectory, other)


def test_without_thought_there_is_only_prompt_and_image(sample: Callable[..., list[Trajectory]]) -> None:
    (trajectory,) = sample([PROMPTS[0]], [0], think=False)
    prompt, image = trajectory.segments
    assert not prompt.sampled
    assert image.sampled
    assert trajectory.final_image is image.image
    assert image.guidance_contexts == {"text_dropped": []}


def test_truncated_thought_has_no_end_token(model: BagelModel, sample: Callable[..., list[Trajectory]]) -> None:
    texts = [t.sampled_texts[0] for t in sample([PROMPTS[0]] * 24, range(24), replace(CONFIG, max_new_tokens=8))]
    truncated, ended = [t for t in texts if not t.ended], [t for t in texts if t.ended]
    assert truncated and ended
    eos = model.config.eos_token_id
    for text in truncated:
        # The end token that was supplied to the network is no action.
        assert len(text.token_ids) == len(text.log_probs) == 8
        assert eos not in text.token_ids
        assert text.content_ids == text.token_ids
    for text in ended:
        assert len(text.token_ids) == len(text.log_probs) <= 8
        assert text.token_ids.index(eos) == len(text.token_ids) - 1
        assert text.content_ids == text.token_ids[:-1]


def test_thought_is_part_of_the_image_context(
    model: BagelModel, sample: Callable[..., list[Trajectory]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = sample([PROMPTS[0]], [0])
    sample_text = model.sample_text

    def other_thought(cache, uniforms, **sampling):
        return sample_text(cache, 1 - uniforms, **sampling)

    monkeypatch.setattr(model, "sample_text", other_thought)
    (actual,) = sample([PROMPTS[0]], [0])
    assert actual.sampled_texts[0].token_ids != expected.sampled_texts[0].token_ids
    # Same prompt, same noise: only the thought differs.
    difference = (actual.sampled_images[0].latents - expected.sampled_images[0].latents).abs().max()
    assert difference > 1e-3


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 22}, "height=22"),
        ({"width": 0}, "width must be at least 1, but is 0"),
        ({"width": 30}, "width=30"),
        ({"height": 48}, "48 x 24 pixels is larger than the model can paint"),
    ],
)
def test_impossible_sizes_raise(sample: Callable[..., list[Trajectory]], size: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample([PROMPTS[0]], [0], replace(CONFIG, **size))


def test_images_may_be_smaller_and_not_square(sample: Callable[..., list[Trajectory]]) -> None:
    (trajectory,) = sample([PROMPTS[0]], [0], replace(CONFIG, height=12, width=20))
    (image,) = trajectory.sampled_images
    assert image.grid == (3, 5)
    assert image.image.size == (20, 12)


@pytest.mark.parametrize(
    "conversation",
    [
        [{"role": "user", "content": PROMPTS[0]}],
        [{"role": "user", "content": [{"type": "text", "text": PROMPTS[0]}]}],
        [
            {"role": "user", "content": "two yellow triangles"},
            {"role": "assistant", "content": "."},
            {"role": "user", "content": PROMPTS[0]},
        ],
    ],
)
def test_conversation_equals_its_last_request(sample: Callable[..., list[Trajectory]], conversation: list) -> None:
    (expected,) = sample([PROMPTS[0]], [0])
    (actual,) = sample([conversation], [0])
    assert_equal_samples(actual, expected)


@pytest.mark.parametrize(
    "conversation",
    [
        [],
        [{"role": "assistant", "content": PROMPTS[0]}],
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"role": "user", "content": None}],
    ],
)
def test_prompt_without_text_raises(sample: Callable[..., list[Trajectory]], conversation: list) -> None:
    with pytest.raises(ValueError, match="no user message with text"):
        sample([conversation], [0])


@pytest.mark.parametrize(
    ("guidance", "branches"),
    [
        # Times of the five steps: 1, .8, .6, .4, .2; the lower bound is excluded.
        (GuidanceConfig(text_scale=3.0, interval=(0.4, 1.0)), [2, 2, 2, 1, 1]),
        (GuidanceConfig(text_scale=3.0, interval=(0.0, 0.8)), [1, 2, 2, 2, 2]),
        (GuidanceConfig(text_scale=3.0, image_scale=2.0, interval=(0.5, 0.9)), [1, 3, 3, 1, 1]),
        (GuidanceConfig(text_scale=1.0, image_scale=2.0, interval=(0.0, 1.0)), [1, 1, 1, 1, 1]),
    ],
)
def test_one_evaluation_a_step_for_the_branches_it_needs(
    model: BagelModel,
    sample: Callable[..., list[Trajectory]],
    monkeypatch: pytest.MonkeyPatch,
    guidance: GuidanceConfig,
    branches: list[int],
) -> None:
    evaluations = Calls(monkeypatch, model, "predict_velocity")
    config = replace(CONFIG, denoising=replace(CONFIG.denoising, guidance=guidance))
    sample([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, range(4), config)
    assert [cache.num_rows for cache in evaluations.arguments] == [4 * n for n in branches]


def test_window_holds_the_states_of_the_path(sample: Callable[..., list[Trajectory]]) -> None:
    (trajectory,) = sample([PROMPTS[0]], [0])
    window = trajectory.sampled_images[0].window
    assert window.start == 1
    torch.testing.assert_close(window.timesteps, torch.tensor([0.8, 0.6, 0.4]))
    assert window.latents.shape == (3, 36, 32)
    assert window.latents.dtype == torch.float32
    assert window.log_probs.shape == (2,)


def test_deterministic_path_has_no_window(sample: Callable[..., list[Trajectory]]) -> None:
    config = replace(CONFIG, denoising=replace(CONFIG.denoising, window_start=None, window_size=0))
    (trajectory,) = sample([PROMPTS[0]], [0], config)
    assert trajectory.sampled_images[0].window is None


def test_window_starts_from_the_deterministic_path(
    model: BagelModel, sample: Callable[..., list[Trajectory]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps before the window take no noise, so they are those of the deterministic path from the same noise."""
    (stochastic,) = sample([PROMPTS[0]], [0], think=False)
    cache = model.prefill([stochastic.segments[:1], []], group_size=1, capacity=model.image_slots((6, 6)))
    noise = torch.randn(1, 3, 36, 32, generator=sample_generator(0, 0, 0))[:, 0]
    states = []
    predict_velocity = model.predict_velocity

    def recording(cache, latents, *args):
        states.append(latents[:1])
        return predict_velocity(cache, latents, *args)

    monkeypatch.setattr(model, "predict_velocity", recording)
    denoise(model, cache, noise, (6, 6), replace(CONFIG.denoising, window_start=None, window_size=0))
    torch.testing.assert_close(stochastic.sampled_images[0].window.latents[0], states[1][0], atol=1e-5, rtol=1e-5)


def test_image_is_decoded_from_its_latents(model: BagelModel, sample: Callable[..., list[Trajectory]]) -> None:
    (trajectory,) = sample([PROMPTS[0]], [0])
    (image,) = trajectory.sampled_images
    with torch.no_grad():
        pixels = model.decode_latents(image.latents[None], image.grid)[0]
    expected = ((pixels + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy() * 255
    assert np.abs(np.asarray(image.image).astype(float) - expected).max() < 1.01


def test_sample_generators_differ_and_repeat() -> None:
    def draw(*key):
        return torch.rand(1, generator=sample_generator(*key)).item()

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), ("eval-0", 0, 0)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert [draw(*key) for key in keys] == [draw(*key) for key in keys]
