# SPDX-License-Identifier: Apache-2.0

"""
The conformance suite of model families. A family that passes it works with every task, objective and trainer setting.

Subclass [`FamilyConformance`] in a test file and give it a fixture `case`:

```python
class TestMyFamily(FamilyConformance):
    @pytest.fixture
    def case(self) -> FamilyCase:
        return FamilyCase(make_tiny_model().eval(), make_processor(), size=(16, 24))
```
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.flow.transitions import transition
from alphagrpo_ext.models.contract import PackedOutput, UnifiedModel, UnifiedProcessor
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.models.saving import save_model
from alphagrpo_ext.objectives import ImageScores
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.rollout.generator import sample_generator
from alphagrpo_ext.trainer.scoring.contexts import SharedContexts
from alphagrpo_ext.trainer.scoring.scores import PackedScores
from alphagrpo_ext.trainer.scoring.windows import join_window_steps, split_window_steps, with_stand_in
from alphagrpo_ext.trajectory import ImageSegment, TextSegment, Trajectory
from support.stopping import stop_after


PROMPTS = ("a red circle", "two blue squares on a white table")
OFF, ON = GuidanceConfig(text_scale=1.0), GuidanceConfig(text_scale=3.0, image_scale=1.5, interval=(0.0, 1.0))
# The window is at .8, .6 and .4, of which two are guided.
PARTLY = replace(ON, interval=(0.5, 1.0))
TEXT_TOLERANCE, IMAGE_TOLERANCE = 1e-4, 1e-5


@dataclass
class FamilyCase:
    """
    What the suite is run on.

    Args:
        model ([`UnifiedModel`]): A tiny model in fp32 and evaluation mode, with weights of a size at which all matter.
        processor ([`UnifiedProcessor`]): Its processor.
        size (`tuple[int, int]`): Height and width of painted images, in pixels.
        answers_begin_as_replies (`bool`): Whether an answer without a thought begins as what the policy writes in a rollout.
    """

    model: UnifiedModel
    processor: UnifiedProcessor
    size: tuple[int, int]
    answers_begin_as_replies: bool = True

    def config(self, guidance: GuidanceConfig = ON, **settings: Any) -> RolloutConfig:
        denoising = DenoisingConfig(6, 1.0, guidance, window_start=1, window_size=3)
        return RolloutConfig(*self.size, max_new_tokens=5, denoising=denoising, **settings)

    def picture(self, seed: int) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (*self.size, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def sample(
        self,
        task: str = "self_reflection",
        config: RolloutConfig | None = None,
        think: bool = True,
        samples: Sequence[tuple[int, int]] = ((0, 0), (0, 1), (1, 2), (1, 3)),
        stops: Sequence[str] = (),
    ) -> list[Trajectory]:
        """
        Trajectories of `samples`, which are pairs of a prompt and a seed. Self-reflection has two rounds, and ends after the
        texts `stops`.
        """
        made = stop_after(TASKS.get(task)(think=think, num_reflection_rounds=2), *stops)
        generate = RolloutGenerator(self.model, self.processor, made)
        rows: list[dict[str, Any]] = [{"prompt": PROMPTS[prompt]} for prompt, _ in samples]
        if generate.task.needs_image:
            rows = [row | {"image": self.picture(prompt)} for row, (prompt, _) in zip(rows, samples, strict=True)]
        return generate(rows, [sample_generator(0, 0, seed) for _, seed in samples], config or self.config())

    def score(
        self,
        trajectories: Sequence[Trajectory],
        guidance: GuidanceConfig = ON,
        forward: Any = None,
        **options: Any,
    ) -> tuple[PackedOutput, ImageScores | None]:
        """A packed forward, and the guided velocities."""
        batch = self.model.pack(trajectories, guidance)
        output = (forward or self.model)(**batch.inputs, **options)
        return output, ImageScores.from_packed(trajectories, batch, output)


def sampled_log_probs(trajectories: Sequence[Trajectory]) -> list[float]:
    return [p for t in trajectories for text in t.sampled_texts for p in text.log_probs]


def assert_on_policy(
    case: FamilyCase, trajectories: list[Trajectory], guidance: GuidanceConfig, forward: Any = None
) -> None:
    """Every ratio of the current policy to the one that sampled is 1."""
    with torch.no_grad():
        output, scores = case.score(trajectories, guidance, forward)
    assert output.log_probs.tolist() == pytest.approx(sampled_log_probs(trajectories), abs=TEXT_TOLERANCE)
    replayed = transition(
        "flow_sde", scores.latents, scores.velocities, scores.t, scores.t_next, 0.7, next_latents=scores.next_latents
    )
    recorded = torch.stack([image.window.log_probs for t in trajectories for image in t.sampled_images])
    torch.testing.assert_close(replayed.log_prob, recorded, atol=IMAGE_TOLERANCE, rtol=0)


def parameter_gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the parameters have gathered after the backward of a loss; it is cleared."""
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def norm(gradients: Iterable[torch.Tensor]) -> float:
    return torch.stack([gradient.norm() for gradient in gradients]).norm().item()


def assert_same_scores(actual: tuple[PackedOutput, ImageScores], expected: tuple[PackedOutput, ImageScores]) -> None:
    torch.testing.assert_close(actual[0].log_probs, expected[0].log_probs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual[1].velocities, expected[1].velocities, atol=1e-5, rtol=1e-5)


@pytest.mark.invariant
class FamilyConformance:
    """The suite. A subclass defines the fixture `case`."""

    @pytest.mark.parametrize("guidance", [OFF, PARTLY, ON], ids=["unguided", "partly guided", "guided"])
    @pytest.mark.parametrize("task", ["reasoning_t2i", "image_editing", "self_reflection"])
    def test_on_policy_ratio_is_one(self, case: FamilyCase, task: str, guidance: GuidanceConfig) -> None:
        trajectories = case.sample(task, case.config(guidance))
        assert_on_policy(case, trajectories, guidance)
        assert_on_policy(case, trajectories[-1:], guidance)

    @pytest.mark.parametrize(
        "settings", [{"think": False}, {"branches_per_thought": 2}], ids=["no thought", "shared thought"]
    )
    def test_on_policy_ratio_is_one_for_other_rollouts(self, case: FamilyCase, settings: dict[str, Any]) -> None:
        think = settings.pop("think", True)
        trajectories = case.sample("reasoning_t2i", case.config(**settings), think=think)
        assert_on_policy(case, trajectories, ON)

    def test_on_policy_ratio_is_one_with_an_adapter(self, case: FamilyCase) -> None:
        before = case.sample("reasoning_t2i")
        targets = case.model.family.lora_target_modules("both")
        adapted = get_peft_model(case.model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
        trajectories = case.sample("reasoning_t2i")
        assert sampled_log_probs(trajectories) != sampled_log_probs(before)
        assert_on_policy(case, trajectories, ON, adapted)

    @torch.no_grad()
    @pytest.mark.parametrize("num_copies", [1, 2])
    def test_some_stop(self, case: FamilyCase, num_copies: int) -> None:
        """Samples that end after a text change no others, and a packed forward scores both."""
        config = case.config(branches_per_thought=num_copies)
        everybody = case.sample(config=config)
        texts = [[case.processor.decode_sampled([text]) for text in t.sampled_texts] for t in everybody]
        stops = (texts[0][0], texts[-1][1])
        trajectories = case.sample(config=config, stops=stops)
        counts = [len(t.sampled_images) for t in trajectories]
        expected = [next((i for i, text in enumerate(written) if text in stops), 2) for written in texts]
        assert counts == expected and counts[0] == 0 and counts[-1] > 0
        for trajectory, other in zip(trajectories, everybody, strict=True):
            for image, other_image in zip(trajectory.sampled_images, other.sampled_images, strict=False):
                torch.testing.assert_close(image.latents, other_image.latents, atol=1e-4, rtol=1e-4)
        assert_on_policy(case, trajectories, ON)
        parts = case.model.pack_parts(trajectories, ON, 2)
        assert parts is None or [part.image_trajectory.tolist() for part in parts.copies] == [
            [i for i, count in enumerate(counts) for _ in range(count)]
        ] * len(parts.copies)

    def test_stand_in_reaches_all_parameters(self, case: FamilyCase) -> None:
        """Where nothing was painted, a packed forward still runs over every trained parameter."""
        trajectories = case.sample()
        num_steps = trajectories[0].num_trained_steps
        stopped = [replace(t, segments=t.segments[:-1]) for t in case.sample("image_editing")]
        assert with_stand_in(trajectories, case.model) == trajectories
        completed = with_stand_in(stopped, case.model)
        output, scores = case.score(completed)
        expected, _ = case.score(stopped)
        torch.testing.assert_close(output.log_probs, expected.log_probs, atol=1e-5, rtol=1e-5)
        assert scores.velocities.shape[:3] == (1, num_steps, 1)
        (output.log_probs.sum() + 0 * scores.velocities.sum()).backward()
        assert not [name for name, p in case.model.named_parameters() if p.requires_grad and p.grad is None]
        case.model.zero_grad()

    def test_every_branch_equals_the_cached_prediction(self, case: FamilyCase) -> None:
        """Each velocity of a packed forward is that of its branch's context, read anew into a cache."""
        trajectories = case.sample("image_editing")
        batch = case.model.pack(trajectories, ON)
        output, layout = case.model(**batch.inputs), batch.velocities
        assert {layout.branches[i] for i in layout.branch} == set(case.model.guidance(ON).branches)
        assert layout.branches == case.model.branches and layout.branches[0] == "full"
        found: dict[str, list[torch.Tensor]] = {}
        for row, (image_index, step, branch) in enumerate(zip(layout.image, layout.step, layout.branch, strict=True)):
            trajectory, name = trajectories[image_index], layout.branches[branch]
            (image,) = trajectory.sampled_images
            context = image.guidance_contexts.get(name, trajectory.segments[:-1])
            cache = case.model.prefill([context], capacity=case.model.image_slots(image.grid))
            latents, time = image.window.latents[step][None], image.window.timesteps[step]
            expected = case.model.predict_velocity(cache, latents, image.grid, time)[0]
            velocity = output.velocities[row, layout.mask[row]]
            torch.testing.assert_close(velocity, expected, atol=1e-4, rtol=1e-4)
            case.model.predict_velocity(cache, latents + 1, image.grid, time / 2)
            again = case.model.predict_velocity(cache, latents, image.grid, time)[0]
            assert torch.equal(again, expected), "predict_velocity must leave the cache as it is"
            found.setdefault(name, []).append(velocity)
        first, *others = (torch.stack(values) for values in found.values())
        assert all((first - other).abs().max() > 1e-3 for other in others), "branches must differ"

    @torch.no_grad()
    def test_neighbours_change_nothing(self, case: FamilyCase) -> None:
        trajectories = case.sample()
        together = case.score(trajectories)
        for i, trajectory in enumerate(trajectories):
            output, scores = case.score([trajectory])
            first = sum(len(text.token_ids) for t in trajectories[:i] for text in t.sampled_texts)
            log_probs = together[0].log_probs[first : first + len(output.log_probs)]
            torch.testing.assert_close(output.log_probs, log_probs, atol=1e-5, rtol=1e-5)
            velocities = together[1].velocities[together[1].trajectory == i]
            torch.testing.assert_close(scores.velocities, velocities, atol=1e-5, rtol=1e-5)

    def test_trajectories_have_guidance_and_temperature_of_their_own(self, case: FamilyCase) -> None:
        """A batch of several tasks is scored as its trajectories are alone."""
        trajectories = [case.sample()[0], *case.sample("reasoning_t2i")[1:3]]
        settings = [ON, PARTLY, OFF]
        temperatures = [0.5, 1.0, 2.0]
        batch = case.model.pack(trajectories, settings)
        output = case.model(**batch.inputs, temperature=torch.tensor(temperatures)[batch.score_trajectory])
        scores = ImageScores.from_packed(trajectories, batch, output)
        for i, (trajectory, guidance, temperature) in enumerate(
            zip(trajectories, settings, temperatures, strict=True)
        ):
            alone, alone_scores = case.score([trajectory], guidance, temperature=temperature)
            log_probs = output.log_probs[batch.score_trajectory == i]
            torch.testing.assert_close(log_probs, alone.log_probs, atol=1e-5, rtol=1e-5)
            velocities = scores.velocities[scores.trajectory == i]
            torch.testing.assert_close(velocities, alone_scores.velocities, atol=1e-5, rtol=1e-5)

    def test_samples_do_not_depend_on_their_batch(self, case: FamilyCase) -> None:
        samples = ((0, 0), (0, 1), (1, 2), (1, 3))
        together = case.sample("reasoning_t2i", samples=samples)
        for trajectory, sample in zip(together, samples, strict=True):
            (alone,) = case.sample("reasoning_t2i", samples=[sample])
            assert alone.sampled_texts[0].token_ids == trajectory.sampled_texts[0].token_ids
            latents = (alone.sampled_images[0].latents, trajectory.sampled_images[0].latents)
            torch.testing.assert_close(*latents, atol=1e-4, rtol=1e-4)

    @torch.no_grad()
    def test_rows_of_a_batch_are_multiplied_at_once(self, case: FamilyCase) -> None:
        """Where rows do not follow each other in memory, PyTorch multiplies every sequence with a copy of a frozen weight."""

        def refuse_gaps(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            inputs[0].view(-1, inputs[0].shape[-1])

        targets = re.compile(case.model.family.lora_target_modules("both"))
        layers = [layer for name, layer in case.model.named_modules() if targets.fullmatch(name)]
        assert layers
        for layer in layers:
            layer.register_forward_pre_hook(refuse_gaps)
        for task in ("reasoning_t2i", "self_reflection"):
            case.score(case.sample(task, case.config()), ON)

    @torch.no_grad()
    def test_target_never_reaches_its_context(self, case: FamilyCase) -> None:
        """The noised and the painted last image change neither a text nor another image or step."""
        trajectories = case.sample()
        before = case.score(trajectories)
        for trajectory in trajectories:
            image = trajectory.sampled_images[-1]
            image.latents = torch.randn_like(image.latents)
            image.window.latents[-2] = torch.randn_like(image.window.latents[-2])
        after = case.score(trajectories)
        assert torch.allclose(after[0].log_probs, before[0].log_probs, atol=1e-6)
        changed = (after[1].velocities - before[1].velocities).abs().amax(dim=(2, 3)) > 1e-6
        # Images are first and second round of each trajectory; the state that was replaced is the input of the last
        # step.
        assert changed.tolist() == [[False, False, False], [False, False, True]] * len(trajectories)

    @pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapter"])
    def test_gradient_reaches_every_trained_parameter(self, case: FamilyCase, lora: bool) -> None:
        model: torch.nn.Module = case.model
        trajectories = case.sample()
        if lora:
            targets = case.model.family.lora_target_modules("both")
            model = get_peft_model(case.model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        output, scores = case.score(trajectories, forward=model)
        (output.log_probs.sum() + scores.velocities.square().sum()).backward()
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        assert trained
        missing = [name for name, p in trained if p.grad is None or not p.grad.abs().sum() > 0]
        assert not missing

    def test_text_reaches_no_generation_parameter(self, case: FamilyCase) -> None:
        family = case.model.family
        trajectories = [Trajectory(t.segments[:-1]) for t in case.sample("reasoning_t2i")]
        assert all(not t.sampled_images for t in trajectories)
        output, scores = case.score(trajectories)
        assert scores is None
        output.log_probs.sum().backward()
        generation = [p for name, p in case.model.named_parameters() if family.is_generation_parameter(name)]
        assert generation and all(p.grad is None or not p.grad.any() for p in generation)

    def test_detached_context_has_the_same_values_and_another_gradient(self, case: FamilyCase) -> None:
        trajectories, gradients, outputs = case.sample("reasoning_t2i"), [], []
        parameters = [p for p in case.model.parameters() if p.requires_grad]
        for context_gradient in ("exact", "detached"):
            outputs.append(case.score(trajectories, context_gradient=context_gradient))
            loss = outputs[-1][1].velocities.square().sum()
            gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
        assert_same_scores(*outputs)
        pairs = [[torch.zeros(1) if g is None else g for g in pair] for pair in zip(*gradients, strict=True)]
        assert any((exact - detached).abs().max() > 1e-6 for exact, detached in pairs)

    @pytest.mark.parametrize(
        "task, lora, steps",
        [("reasoning_t2i", False, 2), ("self_reflection", True, 1)],
        ids=["all weights", "adapter"],
    )
    def test_parts_over_shared_contexts_have_the_gradient_of_one_forward(
        self, case: FamilyCase, task: str, lora: bool, steps: int
    ) -> None:
        """In a part of the window there is no guidance, so that the parts differ in their branches."""
        if case.model.pack_parts(case.sample(task)[:1], PARTLY, steps) is None:
            pytest.skip("this family runs contexts with every part")
        model: torch.nn.Module = case.model
        if lora:
            targets = case.model.family.lora_target_modules("both")
            model = get_peft_model(case.model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        trajectories = case.sample(task, case.config(PARTLY))
        whole = case.score(trajectories, PARTLY, model)
        loss = whole[0].log_probs.sum() + whole[1].velocities.square().sum()
        expected = parameter_gradients(model, loss)
        parts = case.model.pack_parts(trajectories, PARTLY, steps)
        contexts = model(**parts.contexts.inputs, keep_contexts=True)
        torch.testing.assert_close(contexts.log_probs, whole[0].log_probs, atol=1e-5, rtol=1e-5)
        shared = SharedContexts(PackedScores(contexts.log_probs, contexts.entropies, None), contexts, parts.copies)
        narrowed = split_window_steps(trajectories, steps)
        assert len(narrowed) == len(parts.copies) > 1
        scores, losses = {}, {}
        for index in reversed(range(len(narrowed))):
            part = shared.part(index)
            output = model(**part.batch.inputs, contexts=part.contexts)
            scores[index] = ImageScores.from_packed(narrowed[index], part.batch, output)
            losses[index] = scores[index].velocities.square().sum()
            if index:
                losses[index].backward()
        actual = parameter_gradients(model, losses[0] + output.log_probs.sum())
        joined = join_window_steps([scores[index] for index in range(len(narrowed))])
        torch.testing.assert_close(joined.velocities, whole[1].velocities, atol=1e-5, rtol=1e-5)
        assert actual.keys() == expected.keys()
        size = norm(expected.values())
        assert norm([actual[name] - gradient for name, gradient in expected.items()]) <= 1e-6 * size
        for name, gradient in expected.items():
            # One that is nothing but rounding, as that of the keys' biases, is measured by all of them.
            assert norm([actual[name] - gradient]) <= 1e-5 * max(norm([gradient]), 1e-3 * size), name

    @torch.no_grad()
    def test_all_parts_change_no_output(self, case: FamilyCase) -> None:
        for task in ("reasoning_t2i", "image_editing"):
            batch = case.model.pack(case.sample(task), ON)
            expected, actual = case.model(**batch.inputs), case.model(**case.model.with_all_parts(batch.inputs))
            torch.testing.assert_close(actual.log_probs, expected.log_probs)
            torch.testing.assert_close(actual.velocities, expected.velocities)

    @torch.no_grad()
    def test_saved_model_loads_by_name(self, case: FamilyCase, tmp_path: Path) -> None:
        trajectories = case.sample("image_editing")
        save_model(case.model, case.processor, tmp_path / "saved")
        model, processor = load_model(tmp_path / "saved")
        assert type(model) is type(case.model) and type(processor) is type(case.processor)
        trained = [[name for name, p in m.named_parameters() if p.requires_grad] for m in (model, case.model)]
        assert trained[0] == trained[1]
        loaded = FamilyCase(model.eval(), processor, case.size)
        assert_same_scores(loaded.score(trajectories), case.score(trajectories))
        again = loaded.sample("image_editing")
        assert sampled_log_probs(again) == pytest.approx(sampled_log_probs(trajectories), abs=TEXT_TOLERANCE)

    def test_other_data_type_keeps_what_stays_fp32(self, case: FamilyCase, tmp_path: Path) -> None:
        save_model(case.model, case.processor, tmp_path / "saved")
        model, _ = load_model(tmp_path / "saved", dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            expected = torch.float32 if model.family.keeps_fp32(name) else torch.bfloat16
            assert parameter.dtype == expected, name

    @torch.no_grad()
    def test_answers_do_not_depend_on_other_questions(self, case: FamilyCase) -> None:
        pixels = case.processor.question_pixels(case.picture(0))
        questions = [case.processor.text_segment(text) for text in PROMPTS]
        logits = case.model.answer_logits(pixels, questions)
        assert logits.ndim == 2 and len(logits) == 2
        for i, question in enumerate(questions):
            torch.testing.assert_close(
                case.model.answer_logits(pixels, [question])[0], logits[i], atol=1e-4, rtol=1e-4
            )
        other = case.model.answer_logits(case.processor.question_pixels(case.picture(1)), questions)
        assert (other - logits).abs().max() > 1e-4, "the image must matter"

    @torch.no_grad()
    def test_log_probs_of_given_texts(self, case: FamilyCase) -> None:
        """The first token is predicted as an answer to a question, and all of them as in a packed forward."""
        processor, request = case.processor, case.processor.text_segment(PROMPTS[1])
        pictures, texts = [case.picture(i) for i in range(2)], [processor.text_segment(text) for text in PROMPTS]
        seen = [
            processor.image_segment(picture, case.model)
            if processor.look(picture) is None
            else processor.looked_at(picture, case.model)
            for picture in pictures
        ]
        contexts = [[image, request] for image in seen]
        found = case.model.text_log_probs(contexts, texts)
        assert [len(values) for values in found] == [len(text.token_ids) for text in texts]
        for picture, text, values in zip(pictures, texts, found, strict=True):
            answers = case.model.answer_logits(processor.question_pixels(picture), [request])[0].log_softmax(-1)
            assert values[0].item() == pytest.approx(answers[text.token_ids[0]].item(), abs=TEXT_TOLERANCE)
        if case.answers_begin_as_replies:
            written = [TextSegment(list(text.token_ids), sampled=True, ended=False) for text in texts]
            packed = [Trajectory([*context, text]) for context, text in zip(contexts, written, strict=True)]
            torch.testing.assert_close(torch.cat(found), case.score(packed)[0].log_probs, atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_log_probs_of_a_text_depend_on_its_own_context_alone(self, case: FamilyCase) -> None:
        texts = [case.processor.text_segment(text) for text in (*PROMPTS, "")]
        contexts = [[case.processor.image_segment(case.picture(i), case.model)] for i in range(3)]
        together = case.model.text_log_probs(contexts, texts)
        assert len(together[2]) == 0
        for context, text, values in zip(contexts, texts, together, strict=True):
            (alone,) = case.model.text_log_probs([context], [text])
            torch.testing.assert_close(alone, values, atol=1e-5, rtol=1e-5)
        (other,) = case.model.text_log_probs([contexts[1]], [texts[0]])
        assert (other - together[0]).abs().max() > 1e-4, "the image must matter"
        (shorter,) = case.model.text_log_probs([contexts[0]], [TextSegment(texts[0].token_ids[:-1])])
        torch.testing.assert_close(shorter, together[0][:-1], atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_images_and_latents(self, case: FamilyCase) -> None:
        model, grid = case.model, case.model.latent_grid(*case.size)
        pixels = torch.rand(2, 3, *case.size) * 2 - 1
        latents = model.encode_images(pixels)
        assert latents.shape == (2, grid[0] * grid[1], model.latent_channels) and latents.dtype == torch.float32
        torch.testing.assert_close(model.encode_images(pixels[1:]), latents[1:], atol=1e-4, rtol=1e-4)
        assert model.decode_latents(latents, grid).shape == pixels.shape
        segment = case.processor.image_segment(case.picture(0), model)
        assert segment.latents.shape == (segment.grid[0] * segment.grid[1], model.latent_channels)
        assert model.num_positions([segment]) > 0
        for height, width in (
            (case.size[0] + 1, case.size[1]),
            (case.size[0], model.latent_downsample * (model.max_latent_size + 1)),
        ):
            with pytest.raises(ValueError, match="is too large|multiple of the model's"):
                model.latent_grid(height, width)

    def test_cache_head_is_its_first_rows(self, case: FamilyCase) -> None:
        contexts = [[case.processor.text_segment(text)] for text in PROMPTS]
        grid = case.model.latent_grid(*case.size)
        cache = case.model.prefill(contexts, group_size=2, capacity=case.model.image_slots(grid))
        assert (cache.num_rows, cache.head(2).num_rows) == (4, 2)
        latents = torch.randn(4, grid[0] * grid[1], case.model.latent_channels)
        whole = case.model.predict_velocity(cache, latents, grid, torch.tensor(0.5))
        head = case.model.predict_velocity(cache.head(2), latents[:2], grid, torch.tensor(0.5))
        torch.testing.assert_close(head, whole[:2], atol=1e-5, rtol=1e-5)

    def test_segments(self, case: FamilyCase) -> None:
        processor = case.processor
        assert processor.decode(processor.text_segment(PROMPTS[0]).token_ids) == PROMPTS[0]
        assert all(segment.role == "system" for segment in processor.system_segments(think=True, edits=True))
        request, stopping = (processor.reflection_request(PROMPTS[0], may_stop) for may_stop in (False, True))
        assert PROMPTS[0] in request and stopping.startswith(request)
        keep, repaint = processor.keep_verdict, processor.repaint_verdict
        assert [processor.is_done(t) for t in ("", keep, repaint, repaint + keep, keep + repaint)] == [0, 1, 0, 1, 0]
        look = processor.look(case.picture(0))
        assert look is None or (look.ndim == 3 and len(look) == 3)
        context = [processor.text_segment(PROMPTS[0]), ImageSegment(torch.zeros(1, 1), (1, 1)), TextSegment([0])]
        assert processor.branch_context("full", context, case.size) == context
