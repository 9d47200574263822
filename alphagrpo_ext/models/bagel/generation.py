# SPDX-License-Identifier: Apache-2.0

"""
Sampling with BAGEL: read contexts into a cache, sample texts, and predict velocities from the cache.

Every function takes the model, and [`BagelModel`] has a method of the same name for what the contract asks for.

A turn reads only what is new. Where a context begins another one, keys and values are copied instead of computed, and
a later turn continues what an earlier one has read. A thought is read once: each sampled token is fed to the network
to predict the next one, and so is the end token, so that the cache holds the exact ids with their delimiters when the
image begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alphagrpo_ext.models.bagel.cache import BagelCache, ForkedCache
from alphagrpo_ext.models.bagel.configuration_bagel import BagelConfig
from alphagrpo_ext.models.bagel.context_tree import ContextTree, longest_paths
from alphagrpo_ext.models.bagel.layout import (
    PADDING_BLOCK,
    BagelSequence,
    Extent,
    collate_sequences,
    grid_position_ids,
    visibility_mask,
)
from alphagrpo_ext.models.bagel.network import BagelNetwork
from alphagrpo_ext.models.contract import SampledText
from alphagrpo_ext.models.token_sampling import sample_tokens
from alphagrpo_ext.trajectory import Segment, TextSegment


@dataclass(frozen=True)
class PrefillPlan:
    """
    Sequences to run, and where contexts are found in them.

    Args:
        sequences (`list[BagelSequence]`): What is run, without the beginnings that a past cache holds.
        past_samples (`list[int]`): For every sequence, the sample of the past cache that it continues.
        past_blocks (`list[int]`): How many blocks of that sample it sees. 0 if it begins anew.
        indices (`list[int]`): For every context, the sequence that begins with it.
        extents (`list[Extent]`): For every context, where it ends.
    """

    sequences: list[BagelSequence]
    past_samples: list[int]
    past_blocks: list[int]
    indices: list[int]
    extents: list[Extent]


def plan_prefill(
    contexts: Sequence[Sequence[Segment]], past: Sequence[Sequence[Segment]], config: BagelConfig
) -> PrefillPlan:
    """
    Decide which sequences to run. [`ContextTree`] says which contexts are equal.

    Args:
        contexts (`Sequence[Sequence[Segment]]`): The contexts that are needed. Some may be equal, or begin others.
        past (`Sequence[Sequence[Segment]]`): What each sample of a past cache has read.
        config ([`BagelConfig`]): Sizes and delimiters.
    """
    tree = ContextTree()
    paths = [tree.add(context) for context in contexts]
    past_samples = {node: i for i, segments in enumerate(past) for node in tree.add(segments)[1:]}
    longest = longest_paths(paths)
    # Only contexts that begin no other one are run.
    whole = {longest[path[-1]]: BagelSequence(config) for path in paths}
    sequences, starts = [], []
    for i, sequence in whole.items():
        for segment in contexts[i]:
            sequence.add_segment(segment)
        length = max((n for n, node in enumerate(paths[i]) if node in past_samples), default=0)
        start = sequence.extents[length]
        sequences.append(BagelSequence.from_segments(contexts[i][length:], config, start) if length else sequence)
        starts.append((past_samples[paths[i][length]] if length else 0, start.num_blocks))
    indices = {i: index for index, i in enumerate(whole)}
    return PrefillPlan(
        sequences=sequences,
        past_samples=[sample for sample, _ in starts],
        past_blocks=[num_blocks for _, num_blocks in starts],
        indices=[indices[longest[path[-1]]] for path in paths],
        extents=[whole[longest[path[-1]]].extents[len(path) - 1] for path in paths],
    )


@torch.no_grad()
def prefill(
    model: BagelNetwork,
    contexts: Sequence[Sequence[Segment]],
    group_size: int = 1,
    capacity: int = 0,
    past: BagelCache | None = None,
) -> BagelCache:
    """
    Read contexts, as [`UnifiedModel.prefill`] says. What another context begins with, and what `past` holds, is not
    computed again.
    """
    plan = plan_prefill(contexts, [] if past is None or past.segments is None else past.segments, model.config)
    if any(plan.past_blocks):
        inputs = _collate(model, plan.sequences)
        num_slots = inputs["blocks"].shape[1]
        cache = past.continue_samples(plan.past_samples, plan.past_blocks, num_slots)
        _append(model, cache, plan.sequences, inputs)
        cache = cache.as_prefix()
    else:
        cache = prefill_sequences(model, plan.sequences)
        num_slots = cache.prefix_blocks.shape[1]
    if model.work is not None:
        num_tokens = sum(sequence.num_tokens for sequence in plan.sequences)
        model.work.count("prefill", num_tokens, len(plan.sequences) * num_slots)
    cache = cache.select_prefixes(plan.indices, plan.extents).with_slots(group_size, capacity)
    cache.segments = [list(context) for context in contexts for _ in range(group_size)]
    return cache


@torch.no_grad()
def prefill_sequences(model: BagelNetwork, sequences: Sequence[BagelSequence]) -> BagelCache:
    """Run sequences. Returns a cache without slots that has each of them as a prefix."""
    inputs = _collate(model, sequences)
    cache = BagelCache.without_slots(inputs["blocks"], *_ends(model, sequences))
    mask = visibility_mask(inputs["positions"], inputs["blocks"], inputs["horizons"])
    model.language_model.model(*model.embed_sequences(inputs), inputs["positions"], mask, cache, prefill=True)
    return cache


@torch.no_grad()
def append_sequences(model: BagelNetwork, cache: BagelCache, sequences: Sequence[BagelSequence]) -> None:
    """Read one sequence for every sample of a cache, each laid out from the sample's position, into its slots."""
    _append(model, cache, sequences, _collate(model, sequences))


def _append(
    model: BagelNetwork, cache: BagelCache, sequences: Sequence[BagelSequence], inputs: dict[str, torch.Tensor]
) -> None:
    mask = cache.visibility(visibility_mask(inputs["positions"], inputs["blocks"], inputs["horizons"]))
    model.language_model.model(*model.embed_sequences(inputs), inputs["positions"], mask, cache)
    cache.commit(inputs["blocks"], *_ends(model, sequences))
    cache.segments = None


def _collate(model: BagelNetwork, sequences: Sequence[BagelSequence]) -> dict[str, torch.Tensor]:
    """What [`collate_sequences`] returns, on the model's device."""
    device = model.language_model.lm_head.weight.device
    return {name: tensor.to(device) for name, tensor in collate_sequences(sequences, model.config).items()}


def _ends(model: BagelNetwork, sequences: Sequence[BagelSequence]) -> torch.Tensor:
    """Rotary positions and numbers of blocks after sequences, `(2, sequences)`."""
    ends = torch.tensor([sequence.extent for sequence in sequences])
    return ends.T.to(model.language_model.lm_head.weight.device)


@torch.no_grad()
def sample_text(
    model: BagelNetwork,
    cache: BagelCache,
    uniforms: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> SampledText:
    """
    Sample one text per sample and leave it in the cache between its delimiters, as [`UnifiedModel.sample_text`] says.

    Args:
        model ([`BagelNetwork`]): The model.
        cache ([`BagelCache`]): Its first `batch` samples are continued. It has `max_new_tokens + 2` free slots.
        uniforms (`torch.Tensor` of shape `(batch, max_new_tokens)`): Random numbers in [0, 1), one per token.
        temperature, top_k, top_p: See [`sample_tokens`].
    """
    batch, max_new_tokens = uniforms.shape
    eos = model.config.eos_token_id
    samples = cache.head(batch)
    device = cache.positions.device
    uniforms = uniforms.to(device)
    tokens = torch.full((batch,), model.config.bos_token_id, device=device)
    is_reading = torch.ones(batch, dtype=torch.bool, device=device)
    is_sampling = is_reading
    sampled, log_probs, counted = [], [], []
    # One step for each token, one for the start delimiter, and one for an end token where the limit cut a text off.
    for step in range(max_new_tokens + 2):
        is_last = not bool(is_sampling.any())
        logits = feed_tokens(model, samples, tokens, is_reading)
        is_reading = is_sampling
        if is_last:
            break
        if step < max_new_tokens:
            tokens, token_log_probs = sample_tokens(logits, uniforms[:, step], temperature, top_k, top_p)
            sampled.append(tokens)
            log_probs.append(token_log_probs)
            counted.append(is_sampling)
            is_sampling = is_sampling & (tokens != eos)
        else:
            tokens = torch.full_like(tokens, eos)
            is_sampling = torch.zeros_like(is_sampling)
    cache.length = samples.length
    cache.positions[:batch] = samples.positions
    cache.num_blocks[:batch] += 1
    text = SampledText.from_steps(sampled, log_probs, counted, eos)
    for segments, ids, ended in zip(cache.segments or [], text.token_ids, text.ended, strict=False):
        segments.append(TextSegment(ids, sampled=True, ended=ended))
    if model.work is not None:
        num_delimiters = sum(1 if ended else 2 for ended in text.ended)
        num_tokens = num_delimiters + sum(len(ids) for ids in text.token_ids)
        model.work.count("decode", num_tokens, (step + 1) * batch, step + 1)
    return text


@torch.no_grad()
def feed_tokens(
    model: BagelNetwork, cache: BagelCache, tokens: torch.Tensor, is_reading: torch.Tensor
) -> torch.Tensor:
    """
    Read one token per sample.

    Args:
        model ([`BagelNetwork`]): The model.
        cache ([`BagelCache`]): Takes the tokens into its slots.
        tokens (`torch.Tensor` of shape `(samples,)`): Token ids.
        is_reading (`torch.Tensor` of shape `(samples,)`, bool): False for samples that leave no trace in the cache.

    Returns:
        `torch.Tensor` of shape `(samples, vocabulary)`: Logits of the next tokens.
    """
    und = model.language_model.model.embed_tokens(tokens)[:, None]
    mask = cache.visibility(torch.ones(1, 1, 1, dtype=torch.bool, device=und.device))
    und, *_ = model.language_model.model(und, None, cache.positions[:, None], mask, cache)
    blocks = torch.where(is_reading, cache.num_blocks, PADDING_BLOCK)
    cache.commit(blocks[:, None], cache.positions + is_reading.long(), cache.num_blocks)
    return model.language_model.lm_head(und[:, 0])


@torch.no_grad()
def predict_velocity(
    model: BagelNetwork, cache: BagelCache, latents: torch.Tensor, grid: tuple[int, int], timestep: torch.Tensor
) -> torch.Tensor:
    """
    Velocity of noised images, as [`UnifiedModel.predict_velocity`] says. Only spare slots of the cache are written.

    Args:
        model ([`BagelNetwork`]): The model.
        cache ([`BagelCache`]): The contexts.
        latents (`torch.Tensor` of shape `(images, tokens, channels)`):
            The same number of consecutive images for every sample of the cache.
        grid (`tuple[int, int]`): Rows and columns of tokens.
        timestep (`torch.Tensor` with one element): Time in [0, 1] of all images.

    Returns:
        `torch.Tensor` of shape `(images, tokens, channels)`.
    """
    num_images, num_tokens, _ = latents.shape
    forks, rest = divmod(num_images, cache.num_rows)
    if rest:
        raise ValueError(f"{num_images} images cannot share {cache.num_rows} rows of a cache evenly")
    cache = cache if forks == 1 else ForkedCache(cache, forks)
    device = latents.device
    # Made on the device: a copy from the host would wait for it in every step, and a CUDA graph cannot hold such a copy.
    delimiters = (model.config.image_start_token_id, model.config.image_end_token_id)
    ids = torch.cat([torch.full((1,), token_id, device=device) for token_id in delimiters])
    und = model.language_model.model.embed_tokens(ids).expand(num_images, 2, -1)
    position_ids = grid_position_ids(*grid, model.config.max_latent_size, device)
    gen = model.embed_latents(latents, position_ids, model.time_embedder(timestep.reshape(1, 1)))
    positions = cache.positions[:, None].expand(num_images, num_tokens + 2)
    mask = cache.visibility(torch.ones(1, num_tokens + 2, num_tokens + 2, dtype=torch.bool, device=device))
    _, gen, _ = model.language_model.model(und, gen, positions, mask, cache)
    return model.llm2vae(gen)


@torch.no_grad()
def answer_logits(model: BagelNetwork, pixel_values: torch.Tensor, questions: Sequence[TextSegment]) -> torch.Tensor:
    """
    Logits of the first token of an answer, in the order of BAGEL's understanding mode: image, question, answer.

    Args:
        model ([`BagelNetwork`]): The model.
        pixel_values (`torch.Tensor` of shape `(3, height, width)`): The image in [-1, 1], for the vision tower.
        questions (`Sequence[TextSegment]`): Questions about it.

    Returns:
        `torch.Tensor` of shape `(questions, vocabulary)`.
    """
    image = BagelSequence(model.config)
    image.add_pixels(pixel_values)
    sequences = [BagelSequence.from_segments([question], model.config, image.extent) for question in questions]
    num_slots = max(len(sequence.input_ids) for sequence in sequences) + 1
    cache = prefill_sequences(model, [image]).with_slots(len(questions), num_slots)
    append_sequences(model, cache, sequences)
    start = torch.full((len(questions),), model.config.bos_token_id, device=cache.positions.device)
    return feed_tokens(model, cache, start, torch.ones_like(start, dtype=torch.bool))
