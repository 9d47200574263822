# SPDX-License-Identifier: Apache-2.0

"""Packing, cache, processor and parameters of the family, beyond what the conformance suite asks of every family."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.adapters import freeze_parts
from alphagrpo_ext.models.cosmos3 import Cosmos3Model, Cosmos3Processor
from alphagrpo_ext.models.cosmos3.layout import ContextRow
from alphagrpo_ext.models.loading import load_model, load_processor
from alphagrpo_ext.models.saving import save_model
from alphagrpo_ext.models.work import WorkCounter
from alphagrpo_ext.rollout import TASKS
from alphagrpo_ext.trajectory import ImageSegment, TextSegment, Trajectory
from models.conformance import ON, FamilyCase
from models.cosmos3.test_conformance import make_case
from models.cosmos3.tiny_cosmos3 import VARIANTS, make_tiny_model, make_tiny_tokenizer
from reward_models.format import ThinkFormat
from reward_models.judges.policy import PolicyJudge
from support.trainers import make_trainer  # noqa: F401


@pytest.fixture(params=VARIANTS)
def case(request: pytest.FixtureRequest) -> FamilyCase:
    return make_case(request.param)


class TestPacking:
    def test_a_negative_context_is_one_row(self, case: FamilyCase) -> None:
        """All trajectories without an image share it; a source image makes another one, shared by its samples."""
        painted = case.model.pack(case.sample("reasoning_t2i"), ON)
        assert len(painted.inputs["input_ids"]) == 4 + 1
        edited = case.model.pack(case.sample("image_editing"), ON)
        assert len(edited.inputs["input_ids"]) == 4 + 2
        assert len(edited.inputs["pixels"]) == 2

    @torch.no_grad()
    def test_images_of_several_sizes_are_one_batch(self, case: FamilyCase) -> None:
        small, large = case.sample("image_editing"), FamilyCase(case.model, case.processor, (64, 64))
        trajectories = [small[0], *large.sample("image_editing")[:1], case.sample("reasoning_t2i")[2]]
        together = case.model.pack(trajectories, ON)
        velocities = case.model(**together.inputs).velocities[together.velocities.mask]
        alone = [case.model.pack([trajectory], ON) for trajectory in trajectories]
        parts = [case.model(**batch.inputs).velocities.flatten(0, 1) for batch in alone]
        torch.testing.assert_close(velocities, torch.cat(parts), atol=1e-5, rtol=1e-5)

    def test_all_parts_of_a_text_have_a_gradient(self, case: FamilyCase) -> None:
        """Without an image, a copy that nobody reads takes part in the backward of every layer."""
        trajectories = [Trajectory(t.segments[:-1]) for t in case.sample("reasoning_t2i")]
        inputs = case.model.pack(trajectories, ON).inputs
        output = case.model(**case.model.with_all_parts(inputs))
        assert output.velocities is None
        torch.testing.assert_close(output.log_probs, case.model(**inputs).log_probs)
        output.log_probs.sum().backward()
        missing = [name for name, p in case.model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing


class TestCache:
    @torch.no_grad()
    def test_a_later_turn_reads_only_what_is_new(self, case: FamilyCase) -> None:
        """It continues what was read and written, and gives what reading everything gives."""
        model, (trajectory,) = case.model, case.sample(samples=[(0, 0)])
        given, painted, request = trajectory.segments[:3], trajectory.segments[4], trajectory.segments[5]
        past = model.prefill([given], capacity=model.text_slots(5))
        text = model.sample_text(past, torch.rand(1, 5))
        thought = TextSegment(text.token_ids[0], sampled=True, ended=text.ended[0])
        context = [*given, thought, painted, request]
        known = past.rows[0].ids
        assert ContextRow.of(context, model.config).ids[: len(known)] == known
        counter = WorkCounter()
        with counter.of(model):
            continued = model.prefill([context], past=past)
            num_read = counter.tokens["prefill"]
            fresh = model.prefill([context])
        assert counter.tokens["prefill"] - num_read == num_read + len(known)
        latents = torch.randn(1, 2, model.latent_channels)
        velocities = [
            model.predict_velocity(cache, latents, (1, 2), torch.tensor(0.5)) for cache in (continued, fresh)
        ]
        torch.testing.assert_close(*velocities, atol=1e-5, rtol=1e-5)

    def test_two_texts_without_a_request_between_them_are_refused(self, case: FamilyCase) -> None:
        cache = case.model.prefill([[case.processor.text_segment("a cat")]], capacity=8)
        case.model.sample_text(cache, torch.rand(1, 2))
        with pytest.raises(ValueError, match="has just written a text"):
            case.model.sample_text(cache, torch.rand(1, 2))

    def test_uneven_forks_are_refused(self, case: FamilyCase) -> None:
        cache = case.model.prefill([[case.processor.text_segment("a cat")]], group_size=2)
        with pytest.raises(ValueError, match="evenly"):
            case.model.predict_velocity(cache, torch.randn(3, 2, 64), (1, 2), torch.tensor(0.5))


class TestProcessor:
    def test_requests_state_the_size(self, case: FamilyCase) -> None:
        processor = case.processor
        for prompt, expected in (
            ("a cat", "a cat. This image is of 32x64 resolution."),
            ("a cat...", "a cat. This image is of 32x64 resolution."),
            ("", "This image is of 32x64 resolution."),
        ):
            assert processor.decode(processor.request_segment(prompt, (32, 64)).token_ids) == expected

    def test_the_negative_branch_is_a_released_prompt_with_the_images(self) -> None:
        case = make_case("omni")
        processor = case.processor
        (trajectory,) = case.sample("self_reflection", samples=[(0, 0)])
        context = trajectory.segments[:6]
        system, first, second, request = processor.branch_context("negative", context, (32, 64))
        assert processor.decode(system.token_ids) == processor.editing_system_prompt
        assert (first, second) == (context[1], context[4])
        assert processor.decode(request.token_ids) == "This image is not of 32x64 resolution."
        with pytest.raises(ValueError, match="full, negative"):
            processor.branch_context("text_dropped", context, (32, 64))

    @pytest.mark.parametrize(("use_system_prompt", "num_system"), [(True, 1), (False, 0)])
    def test_system_prompts(self, use_system_prompt: bool, num_system: int) -> None:
        processor = Cosmos3Processor(make_tiny_tokenizer("omni"), use_system_prompt)
        assert len(processor.system_segments(think=False, edits=False)) == num_system
        (system,) = processor.system_segments(think=True, edits=True)
        shown = processor.decode(system.token_ids)
        assert shown.endswith(processor.thinking_prompt)
        assert shown.startswith(processor.editing_system_prompt) == use_system_prompt

    @pytest.mark.parametrize(
        ("thought", "caption", "request_text"),
        [
            ("a cat", "a cat", "a cat. This image is of 32x64 resolution."),
            ("a cat. ", "a cat. ", "a cat. This image is of 32x64 resolution."),
            ("<think>hm</think>a cat", "a cat", "a cat. This image is of 32x64 resolution."),
            ("why</think>no</think>", "", "This image is of 32x64 resolution."),
        ],
    )
    def test_a_thought_becomes_a_request_of_the_same_ids(self, thought: str, caption: str, request_text: str) -> None:
        case = make_case("omni")
        processor = case.processor.with_thought_context("rewrite")
        given = case.sample("image_editing", samples=[(0, 0)])[0].segments[:3]
        ids = processor.text_segment(thought).token_ids
        eos = processor.tokenizer.eos_token_id
        for sampled in (TextSegment([*ids, eos], sampled=True), TextSegment(ids, sampled=True, ended=False)):
            system, image, request = processor.painting_context(given, sampled, (32, 64))
            assert processor.decode(system.token_ids) == processor.editing_system_prompt
            assert image is given[1]
            kept = processor.text_segment(caption).token_ids
            assert request.token_ids[: len(kept)] == kept and not request.sampled
            assert processor.decode(request.token_ids) == request_text

    def test_images_are_painted_from_rewritten_thoughts(self, tmp_path: Path) -> None:
        case = make_case("omni")
        in_place = case.processor
        processor = in_place.with_thought_context("rewrite")
        assert (in_place.thought_context, processor.thought_context) == ("in_place", "rewrite")
        rewriting = FamilyCase(case.model, processor, case.size)
        trajectories = rewriting.sample(config=rewriting.config(branches_per_thought=2))
        for trajectory in trajectories:
            assert processor.decode(trajectory.segments[0].token_ids).endswith(processor.rewriting_prompt)
            for thought, image in zip(trajectory.sampled_texts, trajectory.sampled_images, strict=True):
                request = image.guidance_contexts["full"][-1]
                assert request.token_ids[: len(thought.content_ids)] == thought.content_ids
                assert set(image.guidance_contexts) == {"full", "negative"}
        # The second round goes on from what was said and painted in the first.
        first, second = trajectories[0].sampled_images
        assert [s for s in second.guidance_contexts["full"] if isinstance(s, ImageSegment)][1] is first
        painted = [t.sampled_images[0].latents for t in (*trajectories[:1], *case.sample(samples=[(0, 0)]))]
        assert not torch.allclose(*painted)
        # Without a thought there is nothing to rewrite.
        (plain,) = rewriting.sample("reasoning_t2i", think=False, samples=[(0, 0)])
        assert "full" not in plain.sampled_images[0].guidance_contexts
        processor.save_pretrained(tmp_path)
        assert Cosmos3Processor.from_pretrained(tmp_path).thought_context == "rewrite"

    def test_a_thought_that_the_header_opens_is_read_with_its_tag(self, case: FamilyCase) -> None:
        processor = case.processor
        opens = case.model.config.variant == "edge"
        ids = processor.text_segment("a cat</think>").token_ids
        text = TextSegment([*ids, processor.tokenizer.eos_token_id], sampled=True)
        assert processor.decode_sampled([text]) == ("<think>\na cat</think>" if opens else "a cat</think>")
        assert ThinkFormat().has_form(processor.decode_sampled([text])) == opens

    def test_unknown_thought_contexts_are_refused(self, case: FamilyCase) -> None:
        with pytest.raises(ValueError, match="Cosmos3Processor: in_place, rewrite"):
            case.processor.with_thought_context("rewritten")
        with pytest.raises(ValueError, match="must be one of in_place, rewrite, but is 'on'"):
            Cosmos3Processor(make_tiny_tokenizer("omni"), thought_context="on")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"vision_stride": float("nan")}, "vision_stride in Cosmos3Processor must be a whole number, but is nan"),
            ({"max_pixels": 0}, "max_pixels in Cosmos3Processor must be at least 1, but is 0"),
            ({"max_image_size": 31}, "max_image_size in Cosmos3Processor must be at least 32, but is 31"),
        ],
    )
    def test_impossible_sizes_are_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Cosmos3Processor(make_tiny_tokenizer("omni"), **settings)

    @pytest.mark.parametrize(
        ("size", "expected"), [((40, 50), (32, 64)), ((3000, 1000), (1024, 352)), ((10, 2000), (32, 1024))]
    )
    def test_input_images(self, case: FamilyCase, size: tuple[int, int], expected: tuple[int, int]) -> None:
        resized = case.processor.resize_image(Image.new("RGBA", size[::-1]))
        assert (resized.height, resized.width) == expected

    def test_small_images_are_enlarged_for_the_tower(self) -> None:
        processor = Cosmos3Processor(make_tiny_tokenizer("omni"))
        assert processor.look(Image.new("RGB", (64, 32))).shape == (3, 192, 384)


class TestParameters:
    def test_each_weight_of_the_decoder_belongs_to_one_stream(self, case: FamilyCase) -> None:
        family, layers = case.model.family, case.model.transformer.layers
        names = [name for name, _ in layers[0].named_parameters()]
        generation = [name for name in names if family.is_generation_parameter(f"module.transformer.layers.0.{name}")]
        has_second_norm = case.model.config.variant == "edge"
        assert len(generation) * 2 == len(names) + (3 if has_second_norm else 0)
        shared = [name for name, _ in case.model.named_parameters() if ".layers." not in name]
        own = [name.removeprefix("transformer.") for name in shared if family.is_generation_parameter(name)]
        kinds = {re.match(r"[a-z]+", name)[0] for name in own}
        assert kinds == {"proj", "time", "norm", "action"} | (set() if has_second_norm else {"audio"})
        assert "norm.weight" not in own and "embed_tokens.weight" not in own

    @pytest.mark.parametrize("preset", ["both", "generation", "understanding"])
    def test_adapters_are_put_on_the_decoder_alone(self, case: FamilyCase, preset: str) -> None:
        pattern = case.model.family.lora_target_modules(preset)
        chosen = {name for name, _ in case.model.named_modules() if re.fullmatch(pattern, name)}
        layers = case.model.transformer.layers
        linear = {f"transformer.layers.{name}" for name, m in layers.named_modules() if isinstance(m, nn.Linear)}
        is_generation = {name: case.model.family.is_generation_parameter(f"{name}.weight") for name in linear}
        wanted = {"generation": [True], "understanding": [False], "both": [True, False]}[preset]
        assert chosen == {name for name in linear if is_generation[name] in wanted}

    def test_a_frozen_tower(self, case: FamilyCase) -> None:
        case.model.family.freeze_vision_tower(case.model)
        assert not any(p.requires_grad for p in case.model.vision.parameters())
        assert any(p.requires_grad for p in case.model.transformer.parameters())


class TestWithoutVisionTower:
    @pytest.fixture(params=VARIANTS)
    def case(self, request: pytest.FixtureRequest) -> FamilyCase:
        processor = Cosmos3Processor(make_tiny_tokenizer(request.param))
        return FamilyCase(make_tiny_model(request.param, vision=False), processor, (32, 64))

    def test_it_paints_and_refuses_images(self, case: FamilyCase, tmp_path: Path) -> None:
        save_model(case.model, case.processor, tmp_path / "saved")
        model, processor = load_model(tmp_path / "saved")
        assert model.vision is None and model.vision_size(256, 256) is None
        loaded = FamilyCase(model.eval(), processor, case.size)
        trajectories = loaded.sample("reasoning_t2i")
        assert all(len(trajectory.sampled_images) == 1 for trajectory in trajectories)
        inputs = model.pack(trajectories, ON).inputs
        assert model.with_all_parts(inputs).keys() == inputs.keys()
        with pytest.raises(ValueError, match="no vision tower"):
            loaded.sample("image_editing")

    def test_its_adapters_leave_the_rest_frozen(self, case: FamilyCase) -> None:
        targets = case.model.family.lora_target_modules("both")
        adapted = get_peft_model(case.model, LoraConfig(r=2, target_modules=targets))
        freeze_parts(adapted)
        assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_positions_are_bounded(case: FamilyCase) -> None:
    """The bound that rows of a data set are checked by holds for every task, with and without images."""
    config = case.config()
    for name in ("reasoning_t2i", "self_reflection"):
        task = TASKS.get(name)(think=True, num_reflection_rounds=2)
        for trajectory in case.sample(name, config):
            row = ContextRow.of(trajectory.segments[:-1], case.model.config)
            bound = task.max_positions(
                {"prompt": "two blue squares on a white table"}, case.processor, case.model, config
            )
            assert row.tail().next_position + len(row.images) <= bound <= 4 * row.next_position
    assert case.model.max_positions == 32768 - 15001


def test_plain_guidance(case: FamilyCase) -> None:
    """The released formula, without renormalisation, which is refused where it is asked for."""
    full, negative = torch.randn(2, 1, 3, 4)
    expected = negative + 4.0 * (full - negative)
    for renorm_min in (0.0, 1.0):
        guidance = case.model.guidance(GuidanceConfig(4.0, renorm_min=renorm_min))
        torch.testing.assert_close(guidance.combine({"full": full, "negative": negative}), expected)
    with pytest.raises(ValueError, match="no renormalisation"):
        case.model.guidance(GuidanceConfig(4.0, renorm_min=0.5))


@pytest.mark.parametrize(("variant", "thought_context"), [("omni", None), ("edge", None), ("omni", "rewrite")])
def test_a_trainer_trains_both_streams(
    variant: str,
    thought_context: str | None,
    make_trainer: Callable,  # noqa: F811
    tmp_path: Path,
) -> None:
    case = make_case(variant)
    save_model(case.model, case.processor, tmp_path / "model")
    trainer = make_trainer(
        model=str(tmp_path / "model"),
        image_height=32,
        image_width=64,
        cfg_text_scale=2.0,
        thought_context=thought_context,
        max_steps=2,
        gradient_checkpointing=True,
        output_dir=str(tmp_path / "run"),
    )
    assert type(trainer.model) is Cosmos3Model
    trainer.train()
    ratios = [entry["image/ratio_mean"] for entry in trainer.state.log_history if "image/ratio_mean" in entry]
    assert ratios == pytest.approx([1.0] * 2, abs=1e-4)
    before = case.model.state_dict()
    unchanged = {name for name, value in trainer.model.state_dict().items() if torch.equal(value, before[name])}
    assert all(re.match(r"autoencoder\.|vision\.|transformer\.(action|audio)_", name) for name in unchanged)
    trainer.save_model()
    assert load_processor(tmp_path / "run").thought_context == (thought_context or "in_place")


def test_the_policy_is_its_own_judge(case: FamilyCase) -> None:
    """Of answers that its tokenizer has as single tokens."""
    variant, tokenizer = case.model.config.variant, case.processor.tokenizer
    tokenizer.add_tokens(["yes", "no"])
    sizes = case.model.config.transformer_config | {"vocab_size": max(tokenizer.get_vocab().values()) + 1}
    judge = PolicyJudge(make_tiny_model(variant, transformer_config=sizes), case.processor, min_answer_mass=0.0)
    red, blue = (Image.new("RGB", (64, 32), color) for color in ("red", "blue"))
    questions = ["is it red?", "is it blue?"]
    answers = [asyncio.run(judge.answer(image, questions)) for image in (red, blue)]
    assert len({answer for image in answers for answer in image}) == 4
    assert all(0 < answer < 1 for image in answers for answer in image)
