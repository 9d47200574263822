# SPDX-License-Identifier: Apache-2.0

"""
The networks of Cosmos3 against Diffusers and Transformers: random weights, fp32, on a CPU.

Every comparison has a counterpart that leaves out what it guards and must fail.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import Cosmos3OmniPipeline
from PIL import Image
from torch.utils.checkpoint import checkpoint

from alphagrpo_ext.models.pixels import image_to_tensor
from models.cosmos3.references import (
    Row,
    composed_velocity,
    context_positions,
    denoise,
    flat_forward,
    image_inputs,
    latent_positions,
    reasoner_logits,
    tokens_of,
    understand,
)
from models.cosmos3.tiny_cosmos3 import (
    AUTOENCODER,
    VARIANTS,
    Parts,
    References,
    make_parts,
    make_references,
    make_tiny_tokenizer,
)


BOUND = 2e-5
TIMES = (0.95, 0.5, 0.125)


@dataclass
class Case:
    variant: str
    references: References
    parts: Parts
    pipeline: Cosmos3OmniPipeline

    @property
    def ids(self) -> dict[str, int]:
        return self.pipeline.text_tokenizer.get_vocab()

    def image_ids(self, image: torch.Tensor) -> list[int]:
        count = (image.shape[-2] // 32) * (image.shape[-1] // 32)
        return [self.ids["<|vision_start|>"], *[self.ids["<|image_pad|>"]] * count, self.ids["<|vision_end|>"]]

    def text(self, text: str) -> list[int]:
        return self.pipeline.text_tokenizer(text, add_special_tokens=False).input_ids

    def contexts(self, prompt: str, height: int, width: int) -> tuple[list[int], list[int]]:
        """Ids of prompt and negative prompt, as the pipeline reads them."""
        return self.pipeline.tokenize_prompt(prompt, num_frames=1, height=height, width=width)

    def with_thought(self, ids: list[int], thought: str) -> list[int]:
        """A thought between the header and the end of the assistant's turn."""
        return [*ids[:-2], *self.text(thought), *ids[-2:]]


def scheduler(**settings) -> UniPCMultistepScheduler:
    shared = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "predict_x0": True}
    return UniPCMultistepScheduler(**{**shared, "flow_shift": 3.0, **settings})


@pytest.fixture(params=VARIANTS, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


def make_case(variant: str, seed: int = 0) -> Case:
    references = make_references(variant, seed)
    pipeline = Cosmos3OmniPipeline(
        references.transformer,
        make_tiny_tokenizer(variant),
        references.autoencoder,
        scheduler(),
        enable_safety_checker=False,
        default_use_system_prompt=variant == "omni",
        use_native_flow_schedule=variant == "edge",
    )
    pipeline.set_progress_bar_config(disable=True)
    return Case(variant, references, make_parts(references, variant), pipeline)


def picture(height: int, width: int, seed: int) -> torch.Tensor:
    """Random pixels of eight bits."""
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image_to_tensor(Image.fromarray(levels))


def latents(height: int, width: int, seed: int) -> torch.Tensor:
    """Random latents of an image of this size in pixels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, AUTOENCODER["z_dim"], 1, height // 16, width // 16, generator=generator)


def largest(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def text_rows(case: Case) -> list[Row]:
    """Prompt, negative prompt and a thought, of several sizes and times."""
    rows = []
    for i, time in enumerate(TIMES):
        size = (64 + 32 * i, 96)
        prompt, negative = case.contexts("A red fox in the snow..." if i else "", *size)
        for ids in (prompt, negative, case.with_thought(prompt, "Two foxes, é, {'a': 1}")):
            rows.append(Row(ids, [], [latents(*size, seed=len(rows))], time))
    return rows


def image_rows(case: Case) -> list[Row]:
    """Contexts with one and two images, before and between texts."""
    first, second = picture(64, 96, 0), picture(96, 32, 1)
    one = Row([*case.text("user\n"), *case.image_ids(first), *case.text("What is it?")], [first])
    two = Row([*one.ids, *case.text(" And this: "), *case.image_ids(second), *case.text("so be it")], [first, second])
    return [replace(row, items=[latents(64, 64, i)], time=TIMES[i]) for i, row in enumerate((one, two))]


def edit_rows(case: Case) -> list[Row]:
    """Contexts of texts whose generation stream has one and two clean images of other sizes before the noised one."""
    prompt, negative = case.contexts("make it blue", 64, 96)
    return [
        Row(prompt, [], [latents(64, 32, 7), latents(64, 96, 8)], 0.7),
        Row(negative, [], [latents(64, 32, 7), latents(64, 96, 8)], 0.7),
        Row(prompt, [], [latents(32, 64, 9), latents(64, 32, 7), latents(96, 64, 8)], 0.3),
    ]


@torch.no_grad()
def test_logits_of_texts(case: Case) -> None:
    rows = text_rows(case)
    theirs = [reasoner_logits(case.references.reasoner, row) for row in rows]
    assert max(logits.abs().max() for logits in theirs) > 2
    assert largest(understand(case.parts, rows).logits, theirs) < BOUND
    assert largest([understand(case.parts, [row]).logits[0] for row in rows], theirs) < BOUND


@torch.no_grad()
def test_logits_of_images(case: Case) -> None:
    rows = image_rows(case)
    theirs = [reasoner_logits(case.references.reasoner, row) for row in rows]
    assert largest(understand(case.parts, rows).logits, theirs) < BOUND


@torch.no_grad()
def test_logits_of_images_need_deepstack_and_three_positions(case: Case) -> None:
    rows = image_rows(case)
    theirs = [reasoner_logits(case.references.reasoner, row) for row in rows]
    flat = [torch.arange(len(row.ids)).expand(3, -1).float() for row in rows]
    assert largest(understand(case.parts, rows, positions=flat).logits, theirs) > 0.5
    if case.variant == "omni":
        assert largest(understand(case.parts, rows, deepstack=False).logits, theirs) > 0.5


@torch.no_grad()
def test_logits_through_a_cache(case: Case) -> None:
    """A row that is read in two parts and then token by token has the logits of a whole row."""
    row, transformer = image_rows(case)[1], case.parts.transformer
    theirs = reasoner_logits(case.references.reasoner, row)
    positions, _ = context_positions(row, transformer.config.image_token_id)
    features, added = case.parts.vision(row.images)
    ids = torch.tensor([row.ids])
    is_image = ids == transformer.config.image_token_id
    states = transformer.embed(ids).masked_scatter(is_image[..., None], features)
    end, past, logits = len(row.ids), None, []
    cuts = [0, end - 6, *range(end - 5, end + 1)]
    for start, stop in zip(cuts, cuts[1:], strict=False):
        mask = torch.ones(stop - start, stop, dtype=torch.bool).tril(start)[None, None]
        part = slice(start, stop)
        stack = (is_image[:, part], added) if is_image[:, part].any() else None
        output, new = transformer.understand(states[:, part], positions[:, None, part], mask, past, stack)
        logits.append(transformer.lm_head(output)[0])
        past = (
            new
            if past is None
            else type(new)(
                *(
                    [torch.cat(pair, dim=2) for pair in zip(getattr(past, name), getattr(new, name), strict=True)]
                    for name in ("keys", "generation_keys", "values")
                )
            )
        )
    assert (torch.cat(logits) - theirs).abs().max() < BOUND


@torch.no_grad()
def test_greedy_text(case: Case) -> None:
    """Six tokens after a text and an image, as `generate` of Transformers chooses them."""
    row = image_rows(case)[0]
    theirs = case.references.reasoner.generate(
        input_ids=torch.tensor([row.ids]),
        attention_mask=torch.ones(1, len(row.ids), dtype=torch.long),
        mm_token_type_ids=(torch.tensor([row.ids]) == case.ids["<|image_pad|>"]).int(),
        **image_inputs(case.variant, row.images),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(row.ids) :].tolist()
    ids = list(row.ids)
    for _ in range(6):
        ids.append(int(understand(case.parts, [replace(row, ids=ids)]).logits[0][-1].argmax()))
    assert ids[len(row.ids) :] == theirs


@torch.no_grad()
def test_velocities_after_texts(case: Case) -> None:
    rows = text_rows(case)
    theirs = [flat_forward(case.references.transformer, row) for row in rows]
    assert max(velocity.abs().max() for velocity in theirs) > 1
    assert largest(denoise(case.parts, rows, understand(case.parts, rows)), theirs) < BOUND
    alone = [denoise(case.parts, [row], understand(case.parts, [row]))[0] for row in rows]
    assert largest(alone, theirs) < BOUND


@torch.no_grad()
def test_velocities_of_rows_that_share_a_context(case: Case) -> None:
    """Several times and sizes after two contexts, each of which is read once."""
    contexts = text_rows(case)[:2]
    rows = [replace(contexts[i % 2], items=[latents(32 * (1 + i), 64, i)], time=0.9 - 0.2 * i) for i in range(4)]
    theirs = [flat_forward(case.references.transformer, row) for row in rows]
    understood = understand(case.parts, contexts)
    assert largest(denoise(case.parts, rows, understood, context_rows=[0, 1, 0, 1]), theirs) < BOUND
    assert largest(denoise(case.parts, rows, understood, context_rows=[1, 0, 1, 0]), theirs) > 0.1


@torch.no_grad()
def test_velocities_need_the_margin_and_the_second_key(case: Case) -> None:
    rows = text_rows(case)
    theirs = [flat_forward(case.references.transformer, row) for row in rows]
    understood = understand(case.parts, rows)
    assert largest(denoise(case.parts, rows, understood, margin=0), theirs) > 0.1
    if case.variant == "edge":
        understood.states.generation_keys = understood.states.keys
        assert largest(denoise(case.parts, rows, understood), theirs) > 0.1


@torch.no_grad()
def test_velocities_with_clean_images(case: Case) -> None:
    rows = edit_rows(case)
    theirs = [flat_forward(case.references.transformer, row) for row in rows]
    understood = understand(case.parts, rows)
    assert largest(denoise(case.parts, rows, understood), theirs) < BOUND
    assert largest(denoise(case.parts, rows, understood, is_all_noised=True), theirs) > 0.1
    other = [replace(row, items=[latents(64, 32, 1), *row.items[1:]]) for row in rows[:2]]
    velocities = denoise(case.parts, other, understand(case.parts, other))
    assert largest(velocities, theirs[:2]) > 0.1


@torch.no_grad()
def test_velocities_after_images(case: Case) -> None:
    """With images in the understanding stream, of which no pipeline makes use."""
    rows = image_rows(case)
    theirs = [composed_velocity(case.references, row, case.ids["<|image_pad|>"]) for row in rows]
    assert largest(denoise(case.parts, rows, understand(case.parts, rows)), theirs) < BOUND
    other = [replace(row, images=[-row.images[0], *row.images[1:]]) for row in rows]
    assert largest(denoise(case.parts, other, understand(case.parts, other)), theirs) > 0.1


@torch.no_grad()
def test_patch_rows_and_latent_tokens(case: Case) -> None:
    image = picture(64, 96, 3)
    rows = image_inputs(case.variant, [image])["pixel_values"]
    assert (case.parts.vision.patch_rows(image) - rows).abs().max() < 1e-6
    values = latents(64, 96, 0)
    theirs, _ = case.references.transformer._patchify_and_pack_latents([values])
    assert torch.equal(tokens_of(values), theirs)


@torch.no_grad()
def test_autoencoder(case: Case) -> None:
    images = torch.stack([picture(64, 96, 0), picture(64, 96, 1)])
    tokens = case.parts.autoencoder.encode(images)
    theirs = torch.cat([case.pipeline._encode_video(image[None, :, None]) for image in images])
    packed, _ = case.references.transformer._patchify_and_pack_latents(list(theirs[:, None]))
    assert (tokens.flatten(0, 1) - packed).abs().max() < 1e-5
    mean, std = (torch.tensor(AUTOENCODER[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    decoded = case.references.autoencoder.decode(theirs * std + mean).sample[:, :, 0]
    assert (case.parts.autoencoder.decode(tokens, (2, 3)) - decoded).abs().max() < 1e-5
    with pytest.raises(ValueError, match="multiples of 32 pixels"):
        case.parts.autoencoder.encode(images[..., :80])


STEPS = 6


def sample(case: Case, noise: torch.Tensor, prompt: str, scale: float, is_truncated: bool) -> torch.Tensor:
    """An image by Euler's method over our networks, at the sigmas that the pipeline has just used."""
    sigmas = case.pipeline.scheduler.sigmas.tolist()
    times = [int(sigma * 1000) / 1000 for sigma in sigmas] if is_truncated else sigmas
    contexts = case.contexts(prompt, 64, 96)
    state = noise
    understood = understand(case.parts, [Row(ids) for ids in contexts])
    for i in range(STEPS):
        rows = [Row(ids, [], [state], times[i]) for ids in contexts]
        full, negative = denoise(case.parts, rows, understood)
        velocity = negative + scale * (full - negative)
        grid = velocity.unflatten(0, (2, 3)).unflatten(2, (2, 2, -1)).permute(4, 0, 2, 1, 3)
        state = state + (sigmas[i + 1] - sigmas[i]) * grid.flatten(3).flatten(1, 2)[None, :, None]
    return state


@torch.no_grad()
def test_whole_image(case: Case) -> None:
    """
    The pipeline with a solver of first order, which is Euler's method. The pipeline truncates `1000 t` to a whole
    number, ours does not.
    """
    noise = latents(64, 96, 5)
    case.pipeline.scheduler = scheduler(solver_order=1, disable_corrector=list(range(STEPS)))
    theirs = case.pipeline(
        "a red fox",
        num_frames=1,
        height=64,
        width=96,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        latents=noise.clone(),
        output_type="latent",
    ).video
    theirs = theirs.reshape(noise.shape)
    assert (sample(case, noise, "a red fox", 4.0, is_truncated=True) - theirs).abs().max() < 5e-5
    assert (sample(case, noise, "a red fox", 4.0, is_truncated=False) - theirs).abs().max() < 1e-3
    assert (sample(case, noise, "a red fox", 3.5, is_truncated=True) - theirs).abs().max() > 1e-2


def loss(logits: Sequence[torch.Tensor], velocities: Sequence[torch.Tensor], rows: Sequence[Row]) -> torch.Tensor:
    """Log-probabilities of every next token, and velocities, each with a weight of its own."""
    total = torch.zeros(())
    for row, row_logits, velocity in zip(rows, logits, velocities, strict=True):
        chosen = row_logits[:-1].log_softmax(-1).gather(1, torch.tensor(row.ids[1:])[:, None])
        total = total + (chosen[:, 0] * torch.linspace(0.5, 1.5, len(chosen))).sum()
        total = total + (velocity * torch.linspace(-1, 1, velocity.numel()).view_as(velocity)).sum()
    return total


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def backward_by_libraries(case: Case, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Gradients of Diffusers' transformer, whose understanding stream's last states are caught for the logits."""
    transformer, caught = case.references.transformer, []
    transformer.zero_grad()
    hook = transformer.norm.register_forward_hook(lambda module, args, output: caught.append(output))
    velocities = [flat_forward(transformer, row) for row in rows]
    hook.remove()
    loss([transformer.lm_head(states) for states in caught], velocities, rows).backward()
    return gradients(transformer)


def backward_by_ours(case: Case, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    case.parts.transformer.zero_grad()
    understood = understand(case.parts, rows)
    loss(understood.logits, denoise(case.parts, rows, understood), rows).backward()
    return gradients(case.parts.transformer)


def relative_differences(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: ((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs}


def test_gradients(case: Case) -> None:
    """Of every parameter, through texts and images, of rows of different lengths in one batch."""
    rows = [*text_rows(case)[1:6:2], *edit_rows(case)]
    theirs = backward_by_libraries(case, rows)
    ours = backward_by_ours(case, rows)
    assert ours.keys() == theirs.keys()
    unused = {name for name in case.parts.transformer.state_dict() if name.startswith(("action_", "audio_"))}
    assert set(case.parts.transformer.state_dict()) - set(ours) == unused
    assert max(relative_differences(ours, theirs).values()) < 1e-4


def test_gradients_need_the_context(case: Case) -> None:
    rows = text_rows(case)[:2]
    theirs = backward_by_libraries(case, rows)
    case.parts.transformer.zero_grad()
    understood = understand(case.parts, rows)
    understood.states = understood.states.detach()
    loss(understood.logits, denoise(case.parts, rows, understood), rows).backward()
    name = "layers.0.self_attn.to_v.weight"
    ours = gradients(case.parts.transformer)
    assert relative_differences(ours, {name: theirs[name]})[name] > 0.01


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(case: Case, use_reentrant: bool) -> None:
    rows = [*text_rows(case)[:2], *edit_rows(case)[:1]]
    expected = {name: grad.clone() for name, grad in backward_by_ours(case, rows).items()}
    case.parts.transformer.train()
    for layer in case.parts.transformer.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=use_reentrant)
    ours = backward_by_ours(case, rows)
    for layer in case.parts.transformer.layers:
        layer.gradient_checkpointing = False
    case.parts.transformer.eval()
    assert max(relative_differences(ours, expected).values()) < 1e-5


def test_padding_gives_no_nan(case: Case) -> None:
    """A row of padding alone, which sees nothing, has finite states and gradients and changes no other row."""
    rows = text_rows(case)[:2]
    transformer = case.parts.transformer
    alone = denoise(case.parts, rows[:1], understand(case.parts, rows[:1]))[0]
    transformer.zero_grad()
    ids = torch.tensor([rows[0].ids, [0] * len(rows[0].ids)])
    count, tokens = ids.shape[1], tokens_of(rows[0].items[0])
    positions, start = context_positions(rows[0], -1)
    mask = torch.ones(count, count, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone()
    mask[1] = False
    states, context = transformer.understand(transformer.embed(ids), torch.stack([positions] * 2, dim=1), mask)
    seen = torch.ones(2, 1, len(tokens), count + len(tokens), dtype=torch.bool)
    seen[1] = False
    velocities = transformer.denoise(
        torch.stack([tokens, tokens]),
        torch.ones(2, len(tokens), dtype=torch.bool),
        torch.full((2,), rows[0].time),
        torch.stack([latent_positions(rows[0], start)] * 2, dim=1),
        context,
        seen,
    )
    assert velocities.isfinite().all() and states.isfinite().all()
    assert (velocities[0] - alone).abs().max() < BOUND
    (velocities.sum() + states.sum()).backward()
    assert all(grad.isfinite().all() for grad in gradients(transformer).values())


@torch.no_grad()
def test_bf16(case: Case) -> None:
    """Logits and velocities in bf16, with an embedding of time and positions that stay fp32."""
    rows = [*text_rows(case), *edit_rows(case)]
    exact = understand(case.parts, rows)
    velocities = denoise(case.parts, rows, exact)
    half = copy.deepcopy(case.parts)
    half.transformer.to(torch.bfloat16)
    times = torch.tensor([0.9973, 0.5012])
    cast = half.transformer.embed_times(times)
    half.transformer.time_embedder.float()
    assert torch.equal(half.transformer.embed_times(times), cast)
    half.transformer.time_embedder.load_state_dict(case.parts.transformer.time_embedder.state_dict())
    rounded = understand(half, rows)
    assert largest([logits.float() for logits in rounded.logits], exact.logits) < 0.15
    assert largest(denoise(half, rows, rounded), velocities) < 0.15


def test_autocast(case: Case) -> None:
    """Weights in fp32 and products in bf16, as in training: the values of bf16, and finite gradients of all parameters."""
    rows = [*text_rows(case)[:2], *edit_rows(case)[:1]]
    exact = backward_by_ours(case, rows)
    with torch.no_grad():
        understood = understand(case.parts, rows)
        velocities = denoise(case.parts, rows, understood)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = understand(case.parts, rows)
        cast = denoise(case.parts, rows, rounded)
        case.parts.transformer.zero_grad()
        loss(rounded.logits, cast, rows).backward()
    assert largest([logits.float() for logits in rounded.logits], understood.logits) < 0.15
    assert largest(cast, velocities) < 0.15
    assert gradients(case.parts.transformer).keys() == exact.keys()
    assert max(relative_differences(gradients(case.parts.transformer), exact).values()) < 0.1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_times_and_angles_are_fp32_under_autocast(case: Case, dtype: torch.dtype) -> None:
    transformer = case.parts.transformer
    times = torch.tensor([0.9973, 0.5012])
    positions = torch.tensor([[15257.0, 15258.0]]).expand(3, 1, -1)
    expected = transformer.embed_times(times), transformer.rotary(positions, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        actual = transformer.embed_times(times), transformer.rotary(positions, dtype)
    assert actual[0].dtype == torch.float32
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(actual[1], expected[1], strict=True))
    exact = 15258.0 * torch.tensor(1.0)
    # The first frequency is 1. In bf16 both positions would be 15232.
    assert (actual[1][0][0, 1, 0].float() - exact.cos()).abs() < 0.01
