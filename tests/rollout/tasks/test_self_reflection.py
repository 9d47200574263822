# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from PIL import Image

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.flow.transitions import transition
from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.models.work import WorkCounter
from alphagrpo_ext.objectives import ImageScores
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.rollout.generator import sample_generator
from alphagrpo_ext.shapes.scene import Scene, SceneObject, render
from alphagrpo_ext.trajectory import ImageSegment, TextSegment, Trajectory


PROMPT = "a red circle on a white background"
FLAWED = render(Scene((SceneObject(0, 0, "circle", "blue"),), "white"))
OTHER = render(Scene((SceneObject(2, 1, "cross", "green"),), "black"))
GUIDANCE = GuidanceConfig(text_scale=3.0, image_scale=2.0, interval=(0.4, 1.0), renorm_type="text_channel")
CONFIG = RolloutConfig(
    height=24,
    width=24,
    max_new_tokens=8,
    denoising=DenoisingConfig(num_timesteps=6, timestep_shift=1.0, guidance=GUIDANCE, window_start=1, window_size=2),
)


@pytest.fixture(scope="module")
def model(make_shapes_bagel: Callable[[], BagelModel]) -> BagelModel:
    return make_shapes_bagel()


@pytest.fixture
def sample(model: BagelModel, shapes_processor: BagelProcessor) -> Callable[..., list[Trajectory]]:
    """Samples one trajectory an image, all for one prompt."""

    def sample(
        images: list[Image.Image], num_rounds: int = 1, task: str = "self_reflection", config: RolloutConfig = CONFIG
    ) -> list[Trajectory]:
        generate = RolloutGenerator(
            model, shapes_processor, TASKS.get(task)(think=True, num_reflection_rounds=num_rounds)
        )
        rows = [{"prompt": PROMPT, "image": image} for image in images]
        return generate(rows, [sample_generator(0, 0, i) for i in range(len(rows))], config)

    return sample


def layout(trajectory: Trajectory) -> list[str]:
    """`"text"`, `"text*"`, `"image"` or `"image*"` of every segment; sampled ones are starred."""
    kinds = {TextSegment: "text", ImageSegment: "image"}
    return [kinds[type(segment)] + "*" * segment.sampled for segment in trajectory.segments]


def test_a_round_is_system_image_request_reflection_image(
    sample: Callable[..., list[Trajectory]], shapes_processor: BagelProcessor
) -> None:
    (trajectory,) = sample([FLAWED])
    assert layout(trajectory) == ["text", "image", "text", "text*", "image*"]
    system, image, request = trajectory.segments[:3]
    assert shapes_processor.decode(system.token_ids) == shapes_processor.generation_system_prompt
    assert shapes_processor.decode(request.token_ids) == shapes_processor.reflection_request(PROMPT)
    assert image.pixel_values is not None
    contexts = trajectory.sampled_images[0].guidance_contexts
    assert contexts["text_dropped"] == [system, image]
    assert contexts["image_dropped"] == [system, request]


def test_rounds_look_at_the_image_before_them(sample: Callable[..., list[Trajectory]]) -> None:
    (trajectory,) = sample([FLAWED], num_rounds=3)
    assert layout(trajectory) == ["text", "image", *["text", "text*", "image*"] * 3]
    first, second, third = trajectory.sampled_images
    assert first.pixel_values is not None and second.pixel_values is not None
    assert third.pixel_values is None
    assert trajectory.final_image is third.image
    # Before the last request, and the requests alone.
    assert second.guidance_contexts["text_dropped"] == trajectory.segments[:5]
    kept = second.guidance_contexts["image_dropped"]
    assert [segment for segment in trajectory.segments[:6] if segment in kept] == kept
    assert all(isinstance(segment, TextSegment) and not segment.sampled for segment in kept)


def test_first_round_is_the_same_however_many_follow(sample: Callable[..., list[Trajectory]]) -> None:
    (one,), (two,) = sample([FLAWED]), sample([FLAWED], num_rounds=2)
    assert one.sampled_texts[0].token_ids == two.sampled_texts[0].token_ids
    torch.testing.assert_close(one.sampled_images[0].latents, two.sampled_images[0].latents, atol=1e-4, rtol=1e-4)


def test_equal_images_share_one_prefill(model: BagelModel, sample: Callable[..., list[Trajectory]]) -> None:
    """A dataset decodes the image of every row anew: equal pixels are one context all the same."""
    work, alone = WorkCounter(), WorkCounter()
    with work.of(model):
        sample([FLAWED.copy(), FLAWED.copy(), OTHER.copy(), OTHER.copy()])
    with alone.of(model):
        (trajectory,) = sample([FLAWED])
    system, _, request = trajectory.segments[:3]
    without_image = len(system.token_ids) + len(request.token_ids) + 4
    assert work.tokens["prefill"] == 2 * alone.tokens["prefill"] - without_image


def test_the_image_matters(sample: Callable[..., list[Trajectory]]) -> None:
    (first,), (second,) = sample([FLAWED]), sample([OTHER])
    difference = (first.sampled_images[0].latents - second.sampled_images[0].latents).abs().max()
    assert difference > 1e-3


def test_editing_asks_with_the_instruction_itself(
    sample: Callable[..., list[Trajectory]], shapes_processor: BagelProcessor
) -> None:
    (trajectory,) = sample([FLAWED], task="image_editing")
    assert layout(trajectory) == ["text", "image", "text", "text*", "image*"]
    assert shapes_processor.decode(trajectory.segments[2].token_ids) == PROMPT


def test_row_without_an_image_raises(model: BagelModel, shapes_processor: BagelProcessor) -> None:
    generate = RolloutGenerator(model, shapes_processor, TASKS.get("image_editing")(think=True))
    with pytest.raises(ValueError, match="needs an image in its column 'image'"):
        generate([{"prompt": PROMPT, "task": "image_editing"}], [sample_generator(0, 0, 0)], CONFIG)


@pytest.mark.invariant
@pytest.mark.parametrize(("num_rounds", "branches_per_thought"), [(3, 1), (3, 2)])
def test_packed_forward_equals_rollout(
    model: BagelModel, sample: Callable[..., list[Trajectory]], num_rounds: int, branches_per_thought: int
) -> None:
    config = replace(CONFIG, branches_per_thought=branches_per_thought)
    trajectories = sample([FLAWED, FLAWED, OTHER, OTHER], num_rounds, config=config)
    batch = model.pack(trajectories, GUIDANCE)
    with torch.no_grad():
        output = model(**batch.inputs)
    expected = [p for t in trajectories for text in t.sampled_texts for p in text.log_probs]
    assert output.log_probs.tolist() == pytest.approx(expected, abs=1e-4)
    scores = ImageScores.from_packed(trajectories, batch, output)
    replayed = transition(
        CONFIG.denoising.sde_type,
        scores.latents,
        scores.velocities,
        scores.t,
        scores.t_next,
        CONFIG.denoising.noise_level,
        next_latents=scores.next_latents,
    )
    recorded = torch.stack([image.window.log_probs for t in trajectories for image in t.sampled_images])
    torch.testing.assert_close(replayed.log_prob, recorded, atol=1e-5, rtol=0)


@pytest.fixture
def two_rounds(model: BagelModel, sample: Callable[..., list[Trajectory]]) -> tuple[Trajectory, GuidanceConfig]:
    config = replace(CONFIG, denoising=replace(CONFIG.denoising, guidance=GuidanceConfig(text_scale=1.0)))
    (trajectory,) = sample([FLAWED], num_rounds=2, config=config)
    return trajectory, config.denoising.guidance


def second_round(model: BagelModel, trajectory: Trajectory, guidance: GuidanceConfig, inputs: dict | None = None):
    """Log-probabilities and velocities of the second round."""
    batch = model.pack([trajectory], guidance)
    output = model(**(inputs or batch.inputs))
    first_length = len(trajectory.sampled_texts[0].token_ids)
    return output.log_probs[batch.score_column >= first_length], output.velocities[batch.velocities.image == 1]


@pytest.mark.invariant
def test_a_noised_copy_of_round_one_changes_nothing_in_round_two(
    model: BagelModel, two_rounds: tuple[Trajectory, GuidanceConfig]
) -> None:
    trajectory, guidance = two_rounds
    with torch.no_grad():
        expected = second_round(model, trajectory, guidance)
        window = trajectory.sampled_images[0].window
        window.latents[:-1] = 7 * torch.randn_like(window.latents[:-1])
        actual = second_round(model, trajectory, guidance)
    for value, reference in zip(actual, expected, strict=True):
        assert torch.equal(value, reference)


@pytest.mark.invariant
def test_round_two_reaches_round_one_through_the_clean_context_only(
    model: BagelModel, two_rounds: tuple[Trajectory, GuidanceConfig]
) -> None:
    trajectory, guidance = two_rounds
    batch = model.pack([trajectory], guidance)
    latents = batch.inputs["latents"].clone().requires_grad_()
    embeddings = []
    embed = model.get_input_embeddings()
    hook = embed.register_forward_hook(lambda module, args, output: embeddings.append(output))
    log_probs, velocities = second_round(model, trajectory, guidance, {**batch.inputs, "latents": latents})
    hook.remove()
    latent_grad, text_grad = torch.autograd.grad(
        log_probs.square().sum() + velocities.square().sum(), (latents, embeddings[0])
    )
    # In order: the given image, the clean copy of the first painted one, two noised copies of it, and two of the second.
    parts = latent_grad[0].split(36)
    reached = [bool(part.abs().max() > 0) for part in parts]
    assert reached == [True, True, False, False, True, True]
    first_text = slice(int(batch.inputs["score_index"][0]), int(batch.inputs["score_index"][0]) + 3)
    assert text_grad[0, first_text].abs().max() > 0


@pytest.mark.parametrize("num_rounds", [1, 3])
def test_positions_are_bounded_before_they_are_taken(
    model: BagelModel, sample: Callable[..., list[Trajectory]], shapes_processor: BagelProcessor, num_rounds: int
) -> None:
    (trajectory,) = sample([FLAWED], num_rounds)
    task = TASKS.get("self_reflection")(think=True, num_reflection_rounds=num_rounds)
    bound = task.max_positions({"prompt": PROMPT}, shapes_processor, model, CONFIG)
    taken = int(model.pack([trajectory], GUIDANCE).inputs["positions"].max()) + 1
    unused = sum(CONFIG.max_new_tokens - len(text.content_ids) for text in trajectory.sampled_texts)
    # The last image is noised copies only, which take one position of their two.
    assert taken + unused + 1 == bound
