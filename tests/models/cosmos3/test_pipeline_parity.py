# SPDX-License-Identifier: Apache-2.0

"""
The whole Cosmos3 model, from a request to pixels, against Diffusers' pipeline and Transformers' reasoner.

[`test_parity`] compares the networks on ids and positions that the test makes. Here ids, positions, branches and the
path are made by the family.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import Cosmos3OmniPipeline
from PIL import Image

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.flow.timesteps import flow_timesteps
from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.models.pixels import image_to_tensor
from alphagrpo_ext.rollout.denoising import DenoisingConfig, denoise
from alphagrpo_ext.trajectory import DenoisingWindow, ImageSegment, Segment, TextSegment, Trajectory
from models.cosmos3.references import Row, composed_velocity, flat_forward, image_inputs, reasoner_logits, tokens_of
from models.cosmos3.tiny_cosmos3 import VARIANTS, References, write_released_folder


BOUND = 2e-5
SIZE, GRID = (64, 96), (2, 3)
SCALE, STEPS, SHIFT = 4.0, 6, 3.0


@dataclass
class Case:
    variant: str
    model: UnifiedModel
    processor: UnifiedProcessor
    references: References
    pipeline: Cosmos3OmniPipeline

    def context(self, prompt: str, size: tuple[int, int] = SIZE) -> list[Segment]:
        """What the policy is given for a prompt, without a request to think."""
        system = self.processor.system_segments(think=False, edits=False)
        return [*system, self.processor.request_segment(prompt, size)]

    def pipeline_ids(self, prompt: str, size: tuple[int, int] = SIZE) -> tuple[list[int], list[int]]:
        return self.pipeline.tokenize_prompt(prompt, num_frames=1, height=size[0], width=size[1])

    def velocities(
        self, contexts: Sequence[Sequence[Segment]], latents: Sequence[torch.Tensor], time: float
    ) -> list[torch.Tensor]:
        """Velocities by our cached path, all rows at once."""
        grid = (latents[0].shape[-2] // 2, latents[0].shape[-1] // 2)
        cache = self.model.prefill(contexts, capacity=self.model.image_slots(grid))
        tokens = torch.stack([tokens_of(item) for item in latents])
        return list(self.model.predict_velocity(cache, tokens, grid, torch.tensor([time])))


@pytest.fixture(params=VARIANTS, scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = Path(tmp_path_factory.mktemp("released") / request.param)
    references = write_released_folder(folder, request.param)
    model, processor = load_model(folder)
    pipeline = Cosmos3OmniPipeline.from_pretrained(folder, enable_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return Case(request.param, model, processor, references, pipeline)


def noise(seed: int, size: tuple[int, int] = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 16, 1, size[0] // 16, size[1] // 16, generator=generator)


PROMPTS = ("A red fox in the snow...", "", "zwei Füchse, {'a': 1}")


@torch.no_grad()
@pytest.mark.parametrize("size", [SIZE, (96, 32)])
def test_velocities_of_prompts_and_negative_prompts(case: Case, size: tuple[int, int]) -> None:
    """Contexts of different lengths in one batch."""
    full = [case.context(prompt, size) for prompt in PROMPTS]
    contexts = [*full, *(case.processor.branch_context("negative", context, size) for context in full)]
    ids = [case.pipeline_ids(prompt, size)[i] for i in (0, 1) for prompt in PROMPTS]
    latents = [noise(i, size) for i in range(len(ids))]
    for time in (0.95, 0.25):
        theirs = [
            flat_forward(case.pipeline.transformer, Row(row, [], [item], time))
            for row, item in zip(ids, latents, strict=True)
        ]
        ours = case.velocities(contexts, latents, time)
        assert max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True)) < BOUND
    # Without the size, which the request and the negative prompt name.
    other = case.velocities([case.context(PROMPTS[0], (64, 64))], latents[:1], 0.25)[0]
    assert (other - theirs[0]).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("ended", [True, False])
def test_velocity_after_a_thought(case: Case, ended: bool) -> None:
    """A thought stands between the header and the end of the turn. One that was cut off gets the end token."""
    tokenizer = case.processor.tokenizer
    thought = tokenizer.encode("Two foxes, é", add_special_tokens=False)
    prompt = case.pipeline_ids(PROMPTS[0])[0]
    row = Row([*prompt[:-2], *thought, *prompt[-2:]], [], [noise(0)], 0.5)
    sampled = [*thought, tokenizer.eos_token_id] if ended else thought
    context = [*case.context(PROMPTS[0]), TextSegment(sampled, sampled=True, ended=ended)]
    ours = case.velocities([context], row.items, 0.5)[0]
    assert (ours - flat_forward(case.pipeline.transformer, row)).abs().max() < BOUND
    assert (ours - flat_forward(case.pipeline.transformer, replace(row, ids=prompt))).abs().max() > 0.1


def picture(seed: int) -> torch.Tensor:
    """Random pixels of eight bits."""
    levels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    return image_to_tensor(Image.fromarray(levels))


def image_segment(case: Case, pixels: torch.Tensor) -> ImageSegment:
    return ImageSegment(case.model.encode_images(pixels[None])[0], GRID, pixels)


def as_item(tokens: torch.Tensor) -> torch.Tensor:
    """Latents `(1, channels, 1, height, width)` of tokens of an image of [`SIZE`]."""
    blocks = tokens.unflatten(0, GRID).unflatten(2, (2, 2, -1)).permute(4, 0, 2, 1, 3)
    return blocks.flatten(3).flatten(1, 2)[None, :, None]


def chat_ids(case: Case, text: str, num_images: int = 1, system: str = "", **options: bool) -> list[int]:
    """A user's turn with images of [`SIZE`] before a text, by the tokenizer's template."""
    tokenizer, num_tokens = case.processor.tokenizer, GRID[0] * GRID[1]
    content = [*[{"type": "image"}] * num_images, {"type": "text", "text": text}]
    chat = [{"role": "system", "content": system}] if system else []
    rendered = tokenizer.apply_chat_template(
        [*chat, {"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, **options
    )
    return tokenizer.encode(rendered.replace("<|image_pad|>", "<|image_pad|>" * num_tokens), add_special_tokens=False)


@torch.no_grad()
@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_greedy_reply(case: Case, num_images: int) -> None:
    """A reply to a question about images has the tokens and log-probabilities of Transformers' reasoner."""
    images = [picture(i) for i in range(num_images)]
    row = Row(chat_ids(case, "What is it?", num_images), images)
    inputs = image_inputs(case.variant, images) if images else {}
    theirs = case.references.reasoner.generate(
        input_ids=torch.tensor([row.ids]),
        attention_mask=torch.ones(1, len(row.ids), dtype=torch.long),
        mm_token_type_ids=(torch.tensor([row.ids]) == case.model.config.image_token_id).int(),
        **inputs,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=case.processor.tokenizer.eos_token_id,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = theirs.sequences[0, len(row.ids) :].tolist()
    context = [*(image_segment(case, image) for image in images), case.processor.text_segment("What is it?")]
    cache = case.model.prefill([context], capacity=case.model.text_slots(6))
    ours = case.model.sample_text(cache, torch.zeros(1, 6), temperature=0.0)
    assert ours.token_ids[0] == ids


@torch.no_grad()
def test_answers_about_an_image(case: Case) -> None:
    """The first token of an answer follows a header without a thought."""
    image, questions = picture(3), ("Is it red?", "Two of them, or more?")
    rows = [Row(chat_ids(case, question, enable_thinking=False), [image]) for question in questions]
    theirs = torch.stack([reasoner_logits(case.references.reasoner, row)[-1] for row in rows])
    ours = case.model.answer_logits(image, [case.processor.text_segment(question) for question in questions])
    assert (ours - theirs).abs().max() < BOUND


@torch.no_grad()
def test_log_probs_of_an_answer(case: Case) -> None:
    """A given answer has the log-probabilities that Transformers' reasoner gives it."""
    image, question, text = picture(3), "What is it?", "a red circle"
    answer = case.processor.text_segment(text)
    head = chat_ids(case, question, enable_thinking=False)
    logits = reasoner_logits(case.references.reasoner, Row([*head, *answer.token_ids], [image]))
    theirs = logits[len(head) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    context = [image_segment(case, image), case.processor.text_segment(question)]
    (ours,) = case.model.text_log_probs([context], [answer])
    assert (ours - theirs).abs().max() < BOUND


@torch.no_grad()
def test_velocity_after_an_image(case: Case) -> None:
    """A given image is read by the vision tower, and its latents are a clean item beside the noised one."""
    pixels = picture(4)
    segment = image_segment(case, pixels)
    request = case.processor.request_segment("make it blue", SIZE)
    text = case.processor.decode(request.token_ids)
    tokenizer = case.processor.tokenizer
    tail = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|vision_start|>")]
    row = Row([*chat_ids(case, text), *tail], [pixels], [as_item(segment.latents), noise(1)], 0.5)
    theirs = composed_velocity(case.references, row, case.model.config.image_token_id)
    ours = case.velocities([[segment, request]], [noise(1)], 0.5)[0]
    assert (ours - theirs).abs().max() < BOUND
    for other in (
        replace(segment, pixel_values=-pixels),
        replace(segment, latents=-segment.latents),
    ):
        assert (case.velocities([[other, request]], [noise(1)], 0.5)[0] - theirs).abs().max() > 0.1


THOUGHT, TIMES = "Two foxes", (0.9, 0.6, 0.2)


def trajectories(case: Case) -> list[Trajectory]:
    """A thought and an image after a prompt, and the same after a given image. Each has two trained steps."""
    tokenizer = case.processor.tokenizer
    thought = [*tokenizer.encode(THOUGHT, add_special_tokens=False), tokenizer.eos_token_id]
    given = image_segment(case, picture(4))
    request = case.processor.request_segment("make it blue", SIZE)
    edit = [*case.processor.system_segments(think=False, edits=True), given, request]
    contexts = [case.context(PROMPTS[0]), edit]
    result = []
    for i, context in enumerate(contexts):
        states = torch.stack([tokens_of(noise(10 * i + step)) for step in range(len(TIMES))])
        window = DenoisingWindow(states, torch.tensor(TIMES), 0, torch.zeros(len(TIMES) - 1))
        negative = {"negative": case.processor.branch_context("negative", context, SIZE)}
        image = ImageSegment(states[-1], GRID, sampled=True, window=window, guidance_contexts=negative)
        result.append(Trajectory([*context, TextSegment(thought, sampled=True), image]))
    return result


def rows_of(case: Case, trajectory: Trajectory) -> dict[str, Row]:
    """What the libraries read in each branch."""
    tokenizer = case.processor.tokenizer
    eos, start = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|vision_start|>")
    given = [segment for segment in trajectory.segments[:-1] if isinstance(segment, ImageSegment)]
    images, items = [image.pixel_values for image in given], [as_item(image.latents) for image in given]
    if given:
        texts = [segment for segment in trajectory.segments if isinstance(segment, TextSegment)]
        system = {"system": case.processor.decode(texts[0].token_ids)} if len(texts) == 3 else {}
        request, inverse = case.processor.decode(texts[-2].token_ids), "This image is not of 64x96 resolution."
        full, negative = ([*chat_ids(case, text, **system), eos, start] for text in (request, inverse))
    else:
        full, negative = case.pipeline_ids(PROMPTS[0])
    thought = tokenizer.encode(THOUGHT, add_special_tokens=False)
    return {
        "full": Row([*full[:-2], *thought, *full[-2:]], images, items),
        "negative": Row(negative, images, items),
    }


def library_velocity(case: Case, row: Row) -> torch.Tensor:
    if row.images:
        return composed_velocity(case.references, row, case.model.config.image_token_id)
    return flat_forward(case.references.transformer, row)


def test_packed_forward_and_its_gradients(case: Case) -> None:
    """
    Log-probabilities of thoughts and velocities of all copies, in both branches, and the gradient of every parameter of
    the decoder. The given image is read by both streams.
    """
    given = trajectories(case)
    guidance = GuidanceConfig(text_scale=SCALE, interval=(0.0, 1.0), renorm_min=1.0)
    batch = case.model.pack(given, guidance)
    case.model.zero_grad()
    output = case.model(**batch.inputs)
    # Diffusers' transformer, one sample after the other. Logits are those of its understanding stream.
    transformer, caught = case.references.transformer, []
    transformer.zero_grad()
    hook = transformer.norm.register_forward_hook(lambda module, args, states: caught.append(states))
    layout, velocities, streams = batch.velocities, [], {}
    for image, step, branch in zip(layout.image.tolist(), layout.step.tolist(), layout.branch.tolist(), strict=True):
        name = layout.branches[branch]
        row = rows_of(case, given[image])[name]
        noised = as_item(given[image].segments[-1].window.latents[step])
        velocities.append(library_velocity(case, replace(row, items=[*row.items, noised], time=TIMES[step])))
        streams[image, name] = row, caught[-1]
    hook.remove()
    log_probs = []
    for index in range(len(given)):
        row, states = streams[index, "full"]
        count = len(given[index].segments[-2].token_ids)
        targets = torch.tensor(row.ids[-1 - count : -1])
        scores = transformer.lm_head(states).log_softmax(dim=-1)[-2 - count : -2]
        log_probs.append(scores.gather(1, targets[:, None])[:, 0])
    assert len(velocities) == 8
    assert (output.velocities - torch.stack(velocities)).abs().max() < BOUND
    assert (output.log_probs - torch.cat(log_probs)).abs().max() < BOUND
    weights = torch.randn(output.velocities.shape, generator=torch.Generator().manual_seed(0))
    (output.log_probs.sum() + (output.velocities * weights).sum()).backward()
    (torch.cat(log_probs).sum() + (torch.stack(velocities) * weights).sum()).backward()
    ours = dict(case.model.transformer.named_parameters())
    trained = {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}
    assert trained.keys() == {name for name, p in ours.items() if p.grad is not None}
    assert max(((ours[n].grad - grad).norm() / grad.norm()).item() for n, grad in trained.items()) < 1e-4


class OurSchedule(UniPCMultistepScheduler):
    """The pipeline's scheduler as Euler's method, at exactly our times."""

    def set_timesteps(self, *args, **kwargs) -> None:
        super().set_timesteps(STEPS)
        self.sigmas = flow_timesteps(STEPS + 1, SHIFT)
        self.timesteps = self.sigmas[:-1] * 1000


@torch.no_grad()
def test_a_whole_image(case: Case) -> None:
    case.pipeline.scheduler = OurSchedule.from_config(
        case.pipeline.scheduler.config,
        solver_order=1,
        disable_corrector=list(range(STEPS)),
        use_karras_sigmas=False,
    )
    start = noise(5)
    arguments = {
        "prompt": PROMPTS[0],
        "num_frames": 1,
        "height": SIZE[0],
        "width": SIZE[1],
        "num_inference_steps": STEPS,
        "guidance_scale": SCALE,
    }
    latents = case.pipeline(**arguments, latents=start.clone(), output_type="latent").video.reshape(start.shape)
    pixels = case.pipeline(**arguments, latents=start.clone(), output_type="pt").video
    guidance = GuidanceConfig(text_scale=SCALE, interval=(0.0, 1.0), renorm_min=1.0)
    config = DenoisingConfig(STEPS + 1, SHIFT, guidance)
    full = case.context(PROMPTS[0])
    contexts = [full, case.processor.branch_context("negative", full, SIZE)]
    cache = case.model.prefill(contexts, capacity=case.model.image_slots(GRID))
    ours, _ = denoise(case.model, cache, tokens_of(start)[None], GRID, config)
    assert (ours[0] - tokens_of(latents)).abs().max() < 5e-5
    decoded = case.model.decode_latents(ours, GRID)
    assert ((decoded + 1) / 2 - pixels.reshape(decoded.shape)).abs().max() < 5e-5
