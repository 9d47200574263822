# SPDX-License-Identifier: Apache-2.0

"""BAGEL against the recorded tensors of its reference implementation, each within its own tolerance."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alphagrpo_ext.flow import solvers
from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.flow.transitions import ode_step
from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.models.bagel.cache import BagelCache
from alphagrpo_ext.models.bagel.checkpoint import load_released
from alphagrpo_ext.models.bagel.generation import append_sequences, prefill_sequences
from alphagrpo_ext.models.bagel.guidance import BRANCHES, BagelGuidance
from alphagrpo_ext.models.bagel.layout import (
    BagelSequence,
    Extent,
    collate_sequences,
    grid_position_ids,
    patchify,
    unpatchify,
)
from alphagrpo_ext.models.bagel.network import sinusoidal_time_embedding
from alphagrpo_ext.models.contract import SampledText
from alphagrpo_ext.models.pixels import tensor_to_image
from alphagrpo_ext.rollout.denoising import DenoisingConfig, denoise
from alphagrpo_ext.trajectory import TextSegment, Trajectory
from support.golden_io import Golden


EXCLUDED = {
    "schedule/": "of the flow package, and checked there",
    "unit/cfg/": "of the flow package, and checked there",
    "ode/t2i_taylorseer/": "TaylorSeer is not supported",
    "batched/global/": "the reference takes one norm over the batch, so that samples influence each other",
}
# The arguments of packed batches were not recorded; these are the ones that reproduce them.
BATCHED_CONFIG = DenoisingConfig(num_timesteps=4, guidance=GuidanceConfig(text_scale=4.0, interval=(0.0, 1.0)))


# The reference's names of the contexts of the guidance branches, in the order of `BRANCHES`.
CONTEXTS = ("gen", "cfg_text", "cfg_img")


class AccountedGolden(Golden):
    """Keeps account of the tensors that were read, be it as input or to compare with."""

    def __init__(self, root: Any):
        super().__init__(root)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> torch.Tensor:
        self.read.add(key)
        return super().__getitem__(key)


@pytest.fixture(scope="module")
def golden(golden: Golden) -> AccountedGolden:
    return AccountedGolden(golden.root)


@pytest.fixture(scope="module")
def released(golden: AccountedGolden) -> tuple[BagelModel, BagelProcessor]:
    return load_released(golden.checkpoint)


@pytest.fixture(scope="module")
def model(released: tuple[BagelModel, BagelProcessor]) -> BagelModel:
    return released[0]


@pytest.fixture(scope="module")
def processor(golden: AccountedGolden, released: tuple[BagelModel, BagelProcessor]) -> BagelProcessor:
    sizes = {
        f"{tower}_{name}": golden.config[f"{tower}_transform"][key]
        for tower in ("vae", "vit")
        for name, key in (("max_size", "max_image_size"), ("min_size", "min_image_size"), ("stride", "image_stride"))
    }
    return BagelProcessor(tokenizer=released[1].tokenizer, **sizes)


@contextmanager
def decoder_calls(model: BagelModel) -> Iterator[list[tuple[tuple, tuple]]]:
    """Collects `(und, gen)` before and after every call of the decoder."""
    calls = []
    hook = model.language_model.model.register_forward_hook(
        lambda module, args, output: calls.append((args[:2], output[:2]))
    )
    yield calls
    hook.remove()


def add_op(sequence: BagelSequence, op: dict[str, Any], model: BagelModel, golden: Golden, noise_key: str) -> None:
    """Append a recorded block to a sequence."""
    if op["op"] == "text":
        sequence.add_text(op["token_ids"][1:-1])
    elif op["op"] == "vit_image":
        sequence.add_pixels(golden.vit_pixels(op["image"]))
    else:
        latents = sampled_latents(model, golden.vae_pixels(op["image"])[None], golden[noise_key])
        sequence.add_latents(latents[0], tuple(op["grid_hw"]), op["timestep"])


def build_sequence(model: BagelModel, golden: Golden, folder: str, ops: list[dict[str, Any]]) -> BagelSequence:
    """A sequence of recorded blocks; `folder` holds the noise of their VAE posteriors."""
    sequence = BagelSequence(model.config)
    for i, op in enumerate(ops):
        add_op(sequence, op, model, golden, f"{folder}/op{i}/noise")
    return sequence


def block_places(sequence: BagelSequence, num_und: int | None = None) -> list[torch.Tensor]:
    """For every block, where its tokens are in `[und, gen]`, in the reference's order: start, latents, end."""
    num_und = len(sequence.input_ids) if num_und is None else num_und
    und = torch.arange(len(sequence.input_ids)).split(sequence.und.lengths)
    gen = (num_und + torch.arange(sum(sequence.gen.lengths))).split(sequence.gen.lengths)
    inner = dict(zip(sequence.gen.blocks, gen, strict=True))
    return [
        torch.cat([places[:1], inner[block], places[1:]]) if block in inner else places
        for block, places in zip(sequence.und.blocks, und, strict=True)
    ]


def join(und: torch.Tensor, gen: torch.Tensor | None) -> torch.Tensor:
    return und if gen is None else torch.cat([und, gen], dim=1)


@dataclass
class Context:
    """A context that was run: its sequences and cache, and what went into and came out of the decoder for every block."""

    sequences: list[BagelSequence]
    cache: BagelCache
    embeddings: list[torch.Tensor]
    hidden: list[torch.Tensor]
    slots: torch.Tensor


def run_context(
    model: BagelModel, golden: Golden, folder: str, ops: list[dict[str, Any]], in_one_pass: bool, capacity: int = 0
) -> Context:
    """Prefill all blocks at once, or start from nothing and append block by block."""
    with decoder_calls(model) as calls:
        if in_one_pass:
            sequences = [build_sequence(model, golden, folder, ops)]
            cache = prefill_sequences(model, sequences).with_slots(1, capacity)
        else:
            cache, sequences = model.prefill([[]], capacity=sum(len(op["position_ids"]) for op in ops) + capacity), []
            calls.clear()
            for i, op in enumerate(ops):
                sequences.append(BagelSequence(model.config, Extent(int(cache.positions), 0)))
                add_op(sequences[-1], op, model, golden, f"{folder}/op{i}/noise")
                append_sequences(model, cache, sequences[-1:])
    embeddings, hidden, slots = [], [], []
    start = 0 if in_one_pass else cache.prefix_mask.shape[1]
    for sequence, (before, after) in zip(sequences, calls, strict=True):
        before, after = join(*before)[0], join(*after)[0]
        for places in block_places(sequence):
            embeddings.append(before[places])
            hidden.append(after[places])
            slots.append(start + places)
        start += len(before)
    return Context(sequences, cache, embeddings, hidden, torch.cat(slots))


def check_cache(golden: Golden, folder: str, cache: BagelCache, sample: int, slots: torch.Tensor) -> None:
    """Compare keys and values of one sample; `slots` are its slots, prefix first, in the reference's order."""
    for key in golden.keys(f"{folder}/kv/"):
        kind, layer = re.fullmatch(r"([kv])(\d+)", key.rsplit("/", 1)[1]).groups()
        name = {"k": "keys", "v": "values"}[kind]
        states = getattr(cache, f"prefix_{name}")[int(layer)][sample // cache.group_size]
        own = getattr(cache, name)[int(layer)][sample, :, : cache.length]
        golden.check(key, torch.cat([states, own], dim=1).transpose(0, 1)[slots])


def check_blocks(model: BagelModel, golden: Golden, folder: str, ops: list[dict[str, Any]], context: Context) -> None:
    """Compare everything recorded of a context's blocks."""
    latents = iter([latents for sequence in context.sequences for latents in sequence.latents])
    pixels = iter([pixels for sequence in context.sequences for pixels in sequence.vit_pixels])
    for i, op in enumerate(ops):
        actual = {"input_embeds": context.embeddings[i], "hidden": context.hidden[i]}
        actual["logits"] = model.language_model.lm_head(context.hidden[i])
        if op["op"] == "vae_image":
            actual["latent_tokens"] = next(latents)
        elif op["op"] == "vit_image":
            patches = patchify(next(pixels), model.config.vision_config.patch_size)[None]
            position_ids = torch.tensor(op["vit_position_ids"])[None]
            vit_out = model.vit_model.vision_model(patches, position_ids, torch.ones_like(position_ids, dtype=bool))
            actual["vit_out"], actual["connector_out"] = vit_out[0], model.connector(vit_out)[0]
        for key in golden.keys(f"{folder}/op{i}/"):
            name = key.rsplit("/", 1)[1]
            if name != "noise":
                golden.check(key, actual[name])


def decode_greedily(model: BagelModel, cache: BagelCache, tokens: list[int]) -> torch.Tensor:
    """
    Decode, compare the tokens, and return the logits. The reference's list starts with the delimiter, and leaves out
    the last prediction, be it an end token or one too many.
    """
    text, logits = sample_with_logits(model, cache, torch.zeros(1, len(tokens)))
    assert text.token_ids[0][: len(tokens) - 1] == tokens[1:]
    return logits[0]


def sampled_latents(model: BagelModel, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Latents `(batch, tokens, channels)` sampled from the autoencoder's posterior, where the model takes the mean."""
    posterior = model.vae.encode(pixels).latent_dist
    latents = posterior.mean + posterior.std * noise - model.vae.config.shift_factor
    return patchify(model.vae.config.scaling_factor * latents, model.config.latent_patch_size)


def sample_with_logits(
    model: BagelModel, cache: BagelCache, uniforms: torch.Tensor
) -> tuple[SampledText, torch.Tensor]:
    """Greedy texts, and the logits `(batch, steps, vocabulary)` that they were sampled from."""
    logits = []
    hook = model.language_model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output))
    text = model.sample_text(cache, uniforms, temperature=0)
    hook.remove()
    return text, torch.stack(logits[: max(len(ids) for ids in text.token_ids)], dim=1)


def combine_at(t: float, settings: GuidanceConfig, velocities: torch.Tensor) -> torch.Tensor:
    """Guided velocity at one time, from those of all branches."""
    guidance = BagelGuidance(settings)
    return guidance.combine({name: velocities[BRANCHES.index(name)] for name in guidance.branches_at(t)})


def guidance_from(arguments: dict[str, Any]) -> GuidanceConfig:
    return GuidanceConfig(
        text_scale=arguments["cfg_text_scale"],
        image_scale=arguments["cfg_img_scale"],
        interval=tuple(arguments.get("cfg_interval", (0.0, 1.0))),
        renorm_type=arguments["cfg_renorm_type"],
        renorm_min=arguments["cfg_renorm_min"],
    )


def prefill_branches(
    model: BagelModel, golden: Golden, folder: str, contexts: dict[str, Any], capacity: int
) -> tuple[BagelCache, list[BagelSequence]]:
    """All guidance branches as samples of one cache. The images that branches share have the noise of the full one."""
    sequences = [build_sequence(model, golden, f"{folder}/ctx_gen", contexts[branch]["ops"]) for branch in CONTEXTS]
    cache = prefill_sequences(model, sequences).with_slots(1, capacity)
    return cache, sequences


class TestUnits:
    def test_time_embedding(self, golden, model):
        t = golden["unit/time/t"]
        golden.check("unit/time/sinusoid", sinusoidal_time_embedding(t, model.time_embedder.sinusoid_dim))
        golden.check("unit/time/embed", model.time_embedder(t))

    def test_rotary_embedding(self, golden, model):
        cos, sin = model.language_model.model.rotary_emb(torch.zeros(1), golden["unit/rope/position_ids"][None])
        golden.check("unit/rope/cos", cos[0])
        golden.check("unit/rope/sin", sin[0])

    @pytest.mark.parametrize("table", ["latent_pos_embed", "vit_pos_embed"])
    def test_position_tables(self, golden, model, table):
        actual = getattr(model, table).pos_embed
        for key in golden.keys(f"unit/{table}/"):
            sequences = re.search(r"rows_(\d+)_(\d+)$", key)
            golden.check(key, actual[int(sequences[1]) : int(sequences[2])] if sequences else actual)

    def test_position_ids(self, golden, model):
        case = golden.case("unit")
        for name, stride, side in (
            ("latent_position_ids", model.latent_downsample, model.config.max_latent_size),
            ("vit_position_ids", model.config.vision_config.patch_size, model.config.vision_patches_per_side),
        ):
            height, width = case[name]["hw"]
            assert grid_position_ids(height // stride, width // stride, side).tolist() == case[name]["ids"]

    def test_patchify(self, golden, model):
        latent, size = golden["unit/patchify/latent"], model.config.latent_patch_size
        tokens = patchify(latent, size)
        golden.check("unit/patchify/tokens", tokens)
        grid = (latent.shape[1] // size, latent.shape[2] // size)
        golden.check("unit/patchify/latent", unpatchify(tokens, grid, size))

    def test_images(self, golden, processor):
        for name in golden.images:
            raw = Image.fromarray(golden[f"image/{name}/raw_u8"].numpy())
            resized = processor.resize_image(raw)
            golden.check(f"image/{name}/resized_u8", torch.from_numpy(np.array(resized)))
            golden.check(f"image/{name}/vit_pixels", processor.vit_pixels(resized))


@torch.no_grad()
def test_autoencoder(golden, model):
    noise, size = golden["vae/noise"], model.config.latent_patch_size
    pixel_shape = [side * model.config.vae_downsample for side in noise.shape[-2:]]
    name = next(name for name, sizes in golden.images.items() if sizes["vae_chw"][1:] == pixel_shape)
    pixels = golden.vae_pixels(name)[None]
    grid = tuple(side // size for side in noise.shape[-2:])

    posterior = model.vae.encode(pixels).latent_dist
    golden.check("vae/mean", posterior.mean)
    golden.check("vae/logvar", posterior.logvar)
    sampled, mean = sampled_latents(model, pixels, noise), model.encode_images(pixels)
    golden.check("vae/z", unpatchify(sampled, grid, size))
    golden.check("vae/z_mean", unpatchify(mean, grid, size))
    decoded = model.decode_latents(sampled, grid)
    golden.check("vae/decode_z", decoded)
    golden.check("vae/decode_z_u8", torch.from_numpy(np.array(tensor_to_image(decoded[0]))))
    golden.check("vae/decode_z_mean", model.decode_latents(mean, grid))


@pytest.mark.parametrize("in_one_pass", [True, False], ids=["one_pass", "block_by_block"])
class TestContexts:
    """Every context twice: prefilled in one forward with a mask, and block by block through the cache."""

    @pytest.mark.parametrize("name", ["text", "text_two_turn", "und", "und_think", "vaectx"])
    @torch.no_grad()
    def test_context(self, golden, model, processor, name, in_one_pass):
        case = golden.case("text")["two_turn"] if name == "text_two_turn" else golden.case(name)
        for op in case["ops"]:
            if op["op"] == "text":
                assert processor.encode_text(op["text"]) == op["token_ids"][1:-1]
        tokens = case.get("greedy_tokens", [])
        context = run_context(model, golden, name, case["ops"], in_one_pass, capacity=len(tokens) + 2)
        check_blocks(model, golden, name, case["ops"], context)
        check_cache(golden, name, context.cache, 0, context.slots)
        assert context.cache.positions.tolist() == [case["rope"]]
        if tokens:
            golden.check(f"{name}/decode/step_logits", decode_greedily(model, context.cache, tokens))
        if "output_text" in case:
            assert processor.decode(tokens[1:]) == case["output_text"]

    @pytest.mark.parametrize("name", ["flow_t2i", "flow_edit"])
    @torch.no_grad()
    def test_context_of_image(self, golden, model, name, in_one_pass):
        for branch, recorded in golden.case(name)["contexts"].items():
            if recorded["ops"]:
                context = run_context(model, golden, f"{name}/ctx_gen", recorded["ops"], in_one_pass)
                check_blocks(model, golden, f"{name}/ctx_{branch}", recorded["ops"], context)
                check_cache(golden, f"{name}/ctx_{branch}", context.cache, 0, context.slots)
                assert context.cache.positions.tolist() == [recorded["rope"]]

    @torch.no_grad()
    def test_early_stop(self, golden, model, in_one_pass, monkeypatch):
        case = golden.case("text")
        tokens, end = case["early_stop"]["tokens"], case["early_stop"]["end_token_id"]
        context = run_context(model, golden, "text", case["ops"], in_one_pass, capacity=len(tokens) + 3)
        monkeypatch.setattr(model.config, "eos_token_id", end)
        text = model.sample_text(context.cache, torch.zeros(1, len(tokens) + 1), temperature=0)
        assert text.token_ids == [[*tokens[1:], end]]
        assert text.ended == [True]


@torch.no_grad()
def test_uncached_logits(golden, model):
    """Prompt and generated text in one packed forward, which also scores the generated tokens."""
    case = golden.case("text")
    prompt, generated = case["ops"][0]["token_ids"][1:-1], case["greedy_tokens"][1:]
    trajectory = Trajectory([TextSegment(prompt), TextSegment(generated, sampled=True, ended=False)])
    with decoder_calls(model) as calls:
        output = model(**model.pack([trajectory], GuidanceConfig()).inputs)
    expected = golden["text/full_logits"]
    und, _ = calls[0][1]
    golden.check("text/full_logits", model.language_model.lm_head(und[0, : len(expected)]))
    log_probs = expected[-len(generated) - 1 : -1].log_softmax(dim=-1)
    torch.testing.assert_close(output.log_probs, log_probs[range(len(generated)), generated], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["flow_t2i", "flow_edit"])
@torch.no_grad()
def test_velocities(golden, model, name):
    case = golden.case(name)
    grid = tuple(side // model.latent_downsample for side in case["image_shape"])
    cache, _ = prefill_branches(model, golden, name, case["contexts"], capacity=model.image_slots(grid))
    latents = golden[f"{name}/x_t"].expand(len(CONTEXTS), -1, -1)
    for i, t in enumerate(case["t"]):
        with decoder_calls(model) as calls:
            velocities = model.predict_velocity(cache, latents, grid, torch.tensor(t))
        und, gen = calls[0][0]
        golden.check(f"{name}/t{i}/input_embeds", torch.cat([und[0, :1], gen[0], und[0, 1:]]))
        for branch, velocity in zip(CONTEXTS, velocities, strict=True):
            golden.check(f"{name}/t{i}/v_{branch}", velocity)
        for combo in case["cfg_combos"]:
            key = f"{name}/t{i}/cfg/{combo['key']}"
            if key in golden:
                golden.check(key, combine_at(t, guidance_from(combo), velocities))


@torch.no_grad()
def test_images(golden, model, monkeypatch, subtests):
    """Whole paths, from a context, with a thought or without, to pixels."""
    states = []

    def recording_ode_step(latents, velocity, t, t_next):
        states.append((latents, velocity))
        return ode_step(latents, velocity, t, t_next)

    monkeypatch.setattr(solvers, "ode_step", recording_ode_step)
    for name in (name for name in golden.cases if name.startswith("ode/")):
        if not name.endswith("taylorseer"):
            states.clear()
            with subtests.test(name):
                check_image(model, golden, name, states)


def check_image(model: BagelModel, golden: Golden, name: str, states: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    case, folder = golden.case(name), f"{name}/ctx_gen"
    arguments, contexts = case["args"], {branch: dict(context) for branch, context in case["contexts"].items()}
    grid = tuple(side // model.latent_downsample for side in case["image_hw"])
    thought = case["think"]["greedy_tokens"] if "think" in case else []
    if thought:
        *ops, thought_op = contexts["gen"]["ops"]
        cache = prefill_sequences(model, [build_sequence(model, golden, folder, ops)]).with_slots(1, len(thought) + 2)
        golden.check(f"{name}/think_step_logits", decode_greedily(model, cache, thought))
        # The reference decodes and encodes the thought, which may change it; what was sampled stays in our cache.
        if thought_op["token_ids"][1:-1] == thought[1:]:
            contexts["gen"]["ops"] = ops
    capacity = len(thought) + 2 + model.image_slots(grid)
    cache, sequences = prefill_branches(model, golden, name, contexts, capacity)
    width = cache.prefix_mask.shape[1] - max(sum(sequence.gen.lengths) for sequence in sequences)
    slots = [torch.cat(block_places(sequence, width) or [torch.arange(0)]) for sequence in sequences]
    if contexts["gen"]["ops"] is not case["contexts"]["gen"]["ops"]:
        model.sample_text(cache, torch.zeros(1, len(thought) - 1), temperature=0)
        slots[0] = torch.cat([slots[0], cache.prefix_mask.shape[1] + torch.arange(cache.length)])
    for i, branch in enumerate(CONTEXTS):
        check_cache(golden, f"{name}/ctx_{branch}", cache, i, slots[i])
        assert cache.positions[i] == case["contexts"][branch]["rope"]

    config = DenoisingConfig(
        num_timesteps=arguments["num_timesteps"],
        timestep_shift=arguments["timestep_shift"],
        guidance=guidance_from(arguments),
    )
    latents, _ = denoise(model, cache, golden[f"{name}/init_noise"][None], grid, config)
    for key, states_or_velocities in zip(("x_t", "v_t"), zip(*states, strict=True), strict=True):
        if f"{name}/{key}" in golden:
            golden.check(f"{name}/{key}", torch.cat(states_or_velocities))
    if f"{name}/v_t_last" in golden:
        golden.check(f"{name}/v_t_last", states[-1][1][0])
    golden.check(f"{name}/latent", latents[0])
    golden.check(f"{name}/vae_latent", unpatchify(latents, grid, model.config.latent_patch_size))
    decoded = model.decode_latents(latents, grid)
    if f"{name}/decoded" in golden:
        golden.check(f"{name}/decoded", decoded)
    golden.check(f"{name}/image_u8", torch.from_numpy(np.array(tensor_to_image(decoded[0]))))


class TestBatch:
    """Two samples in one cache, with contexts of two texts each."""

    @pytest.fixture
    def sequences(self, golden, model):
        case = golden.case("batched")
        sequences = [BagelSequence(model.config) for _ in case["prompts"]]
        for turn in ("prompt_input", "prompt_input2"):
            texts = torch.tensor(case[turn]["packed_text_ids"]).split(case[turn]["text_token_lens"])
            for sequence, text in zip(sequences, texts, strict=True):
                sequence.add_text(text[1:-1].tolist())
        return sequences

    @pytest.fixture
    def images(self, golden, model):
        """Grid and initial noise of every sample."""
        stride = model.latent_downsample
        grids = [(height // stride, width // stride) for height, width in golden.case("batched")["image_shapes"]]
        return list(zip(grids, golden["batched/init_noise"].split([h * w for h, w in grids]), strict=True))

    def test_text(self, golden, model, sequences):
        tokens = golden.case("batched")["greedy_tokens"]
        steps = len(tokens[0])
        cache = prefill_sequences(model, sequences).with_slots(1, steps + 2)
        assert cache.positions.tolist() == golden.case("batched")["ropes2"]
        for key in golden.keys("batched/kv/"):
            kind, layer = key[-2:]
            states = {"k": cache.prefix_keys, "v": cache.prefix_values}[kind][int(layer)]
            golden.check(key, states.transpose(1, 2)[cache.prefix_mask])
        text, logits = sample_with_logits(model, cache, torch.zeros(len(sequences), steps))
        golden.check("batched/text_step_logits", logits.transpose(0, 1))
        assert [ids[: steps - 1] for ids in text.token_ids] == [ids[1:] for ids in tokens]

    def test_images(self, golden, model, sequences, images):
        config = replace(BATCHED_CONFIG, guidance=replace(BATCHED_CONFIG.guidance, renorm_type="channel"))
        for i, (grid, noise) in enumerate(images):
            cache = prefill_sequences(model, [sequences[i], BagelSequence(model.config)]).with_slots(
                1, model.image_slots(grid)
            )
            latents, _ = denoise(model, cache, noise[None], grid, config)
            golden.check(f"batched/channel/latent{i}", latents[0])

    def test_global_norm_does_not_couple_samples(self, model, sequences, images):
        config = replace(BATCHED_CONFIG, guidance=replace(BATCHED_CONFIG.guidance, renorm_type="global"))
        grid, noise = images[0]
        noise = torch.stack([noise * (i + 1) for i in range(len(sequences))])
        empty = BagelSequence(model.config)
        together = prefill_sequences(model, [*sequences, *[empty] * len(sequences)]).with_slots(
            1, model.image_slots(grid)
        )
        latents, _ = denoise(model, together, noise, grid, config)
        for i, sequence in enumerate(sequences):
            alone = prefill_sequences(model, [sequence, empty]).with_slots(1, model.image_slots(grid))
            expected, _ = denoise(model, alone, noise[i : i + 1], grid, config)
            torch.testing.assert_close(latents[i : i + 1], expected, rtol=0, atol=2e-5)


@dataclass
class TrainingBatch:
    """The reference's packed training samples, with the sequence, and the place in it, of everything that has a loss."""

    sequences: list[BagelSequence]
    tokens: list[tuple[int, int]]
    labels: list[int]
    images: list[tuple[int, int]]
    velocities: list[torch.Tensor]


def training_batch(
    model: BagelModel, golden: Golden, clean: torch.Tensor, times: torch.Tensor, noise: torch.Tensor
) -> TrainingBatch:
    """
    Args:
        clean (`torch.Tensor` of shape `(images, channels, height, width)`): Latents of padded images.
        times, noise (`torch.Tensor` of shape `(tokens,)` and `(tokens, channels)`):
            Times and noise of all images, one after the other.
    """
    case, size = golden.case("train"), model.config.latent_patch_size
    grids = [tuple(shape) for shape in case["input"]["patchified_vae_latent_shapes"]]
    lengths = [height * width for height, width in grids]
    latents = zip(grids, clean, times.split(lengths), noise.split(lengths), strict=True)
    batch = TrainingBatch([], [], [], [], [])
    for index, sample in enumerate(case["samples"]):
        sequence, texts, images = BagelSequence(model.config), iter(sample["text_ids"]), iter(sample["images"])
        for kind, has_loss in sample["plan"]:
            if kind == "text":
                ids = next(texts)
                start = sequence.add_text(ids)
                if has_loss:
                    batch.labels += [*ids, model.config.eos_token_id]
                    batch.tokens += [(index, start + i) for i in range(len(ids) + 1)]
                continue
            _, name = next(images)
            if kind == "vit_image":
                sequence.add_pixels(golden.vit_pixels(name))
                continue
            grid, image, time, epsilon = next(latents)
            image = patchify(image[:, : grid[0] * size, : grid[1] * size], size)
            state = (1 - time[:, None]) * image + time[:, None] * epsilon
            start = sequence.add_latents(state, grid, float(time[0]), noised=bool(has_loss))
            if has_loss:
                batch.images.append((index, start))
                batch.velocities.append(epsilon - image)
        batch.sequences.append(sequence)
    return batch


def test_training_forward(golden, model):
    """Losses and gradients of the reference's packed training batch, from the forward that scores trajectories."""
    case, vae_noise = golden.case("train"), golden["train/vae_noise"]
    names = [name for sample in case["samples"] for kind, name in sample["images"] if kind == "vae"]
    height, width = (side * model.config.vae_downsample for side in vae_noise.shape[-2:])
    padded = torch.zeros(len(names), 3, height, width)
    for canvas, name in zip(padded, names, strict=True):
        pixels = golden.vae_pixels(name)
        canvas[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    grid = (height // model.latent_downsample, width // model.latent_downsample)
    with torch.no_grad():
        clean = unpatchify(sampled_latents(model, padded, vae_noise), grid, model.config.latent_patch_size)
    golden.check("train/padded_latent", clean)

    times = golden["train/packed_timesteps_logit"].sigmoid()
    times = case["timestep_shift"] * times / (1 + (case["timestep_shift"] - 1) * times)
    batch = training_batch(model, golden, clean, times, golden["train/noise"])
    inputs = collate_sequences(batch.sequences, model.config)
    num_und, num_gen = inputs["input_ids"].shape[1], inputs["latents"].shape[1]
    places = [
        sequence * num_gen + start + torch.arange(len(target))
        for (sequence, start), target in zip(batch.images, batch.velocities, strict=True)
    ]
    with decoder_calls(model) as calls:
        output = model(
            **inputs,
            score_index=torch.tensor([sequence * num_und + place for sequence, place in batch.tokens]),
            score_targets=torch.tensor(batch.labels),
            velocity_index=torch.cat(places)[None],
        )
    hidden = join(*calls[0][1])
    orders = [torch.cat(block_places(sequence, num_und)) for sequence in batch.sequences]
    golden.check("train/last_hidden_state", torch.cat([states[o] for states, o in zip(hidden, orders, strict=True)]))

    squares = (output.velocities[0] - torch.cat(batch.velocities)).square()
    loss = squares.mean() - output.log_probs.mean()
    golden.check("train/mse", squares)
    golden.check("train/ce", -output.log_probs)
    golden.check("train/loss", loss[None])
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, [parameters[name] for name in case["grad_norm_names"]])
    golden.check("train/grad_norms", torch.stack([gradient.norm() for gradient in gradients]))


def test_every_recorded_tensor_is_used(golden, request):
    defined = set(re.findall(r"def (test_\w+)", Path(__file__).read_text(encoding="utf-8")))
    if defined - {item.originalname for item in request.session.items if item.path == request.path}:
        pytest.skip("only a part of this file runs")
    unused = set(golden.keys()) - golden.read
    assert [key for key in sorted(unused) if not key.startswith(tuple(EXCLUDED))] == []
