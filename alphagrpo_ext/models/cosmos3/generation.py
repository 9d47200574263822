# SPDX-License-Identifier: Apache-2.0

"""
Sampling with Cosmos3: read contexts into a cache, sample texts, and predict velocities from the cache.

The cache holds keys and values of the understanding stream, and the clean latents of images. Keys and values of clean
latents are in no cache, because their states change with the noised image beside them.

The tail that an image is painted from is written into the slots behind those in use. A text that is sampled afterwards
overwrites it and writes a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from alphagrpo_ext.models.contract import SampledText
from alphagrpo_ext.models.cosmos3.configuration_cosmos3 import Cosmos3Config
from alphagrpo_ext.models.cosmos3.layout import (
    ContextRow,
    LatentBlock,
    collate_contexts,
    collate_latents,
    latent_positions,
)
from alphagrpo_ext.models.cosmos3.network import Cosmos3Network
from alphagrpo_ext.models.cosmos3.transformer import StreamStates
from alphagrpo_ext.models.token_sampling import sample_tokens
from alphagrpo_ext.models.token_scores import score_tokens
from alphagrpo_ext.trajectory import ImageSegment, Segment, TextSegment


TAIL_SLOTS = 2
"""Slots of a tail: the end token, which is missing where a sampled text has ended, and `<|vision_start|>`."""


@dataclass
class Cosmos3Cache:
    """
    Contexts of samples, one row each. Samples that share a context have copies of it.

    Args:
        states ([`StreamStates`]): Keys and values of every slot.
        mask (`torch.Tensor` of shape `(samples, slots)`): True where a slot holds a token of the conversation.
        painting_mask (`torch.Tensor` of shape `(samples, slots)`): True where an image reads a slot, which includes the tail.
        length (`int`): Slots in use, without the tail.
        last_states (`torch.Tensor` of shape `(samples, hidden)`): State after the last token of every conversation.
        rows (`list[ContextRow]`): What every sample has read.
        clean (`dict[str, torch.Tensor]`): What [`collate_latents`] returns for the images in every context.
        start_times (`torch.Tensor` of shape `(samples,)`): Position in time of an image that is painted now, fp32.
    """

    states: StreamStates
    mask: torch.Tensor
    painting_mask: torch.Tensor
    length: int
    last_states: torch.Tensor
    rows: list[ContextRow]
    clean: dict[str, torch.Tensor]
    start_times: torch.Tensor

    @property
    def num_rows(self) -> int:
        """Number of samples."""
        return len(self.rows)

    def head(self, num_rows: int) -> Cosmos3Cache:
        """The first `num_rows` samples as views."""
        return replace(
            self,
            states=self.states.map(lambda layer: layer[:num_rows]),
            mask=self.mask[:num_rows],
            painting_mask=self.painting_mask[:num_rows],
            last_states=self.last_states[:num_rows],
            rows=self.rows[:num_rows],
            clean={name: tensor[:num_rows] for name, tensor in self.clean.items()},
            start_times=self.start_times[:num_rows],
        )

    def until(self, num_slots: int) -> StreamStates:
        """Keys and values of the first slots, as views."""
        return self.states.map(lambda layer: layer[:, :, :num_slots])

    def write(self, states: StreamStates, start: int) -> None:
        """Write keys and values of all samples into the slots from `start`."""
        sources = [states.keys, states.values]
        targets = [self.states.keys, self.states.values]
        if self.states.generation_keys is not self.states.keys:
            sources.append(states.generation_keys)
            targets.append(self.states.generation_keys)
        for own, new in zip(targets, sources, strict=True):
            for target, source in zip(own, new, strict=True):
                target[:, :, start : start + source.shape[2]] = source

    def place_images(self, config: Cosmos3Config) -> None:
        """Collect the clean latents of all samples, and where an image that is painted now stands."""
        device, tails = self.mask.device, [row.tail() for row in self.rows]
        blocks = [
            LatentBlock(tail.images, torch.empty(0, config.latent_channels), (0, 0), tail.next_position)
            for tail in tails
        ]
        self.clean = {name: tensor.to(device) for name, tensor in collate_latents(blocks, config).items()}
        times = [tail.next_position + config.latent_margin + len(tail.images) for tail in tails]
        self.start_times = torch.tensor(times, dtype=torch.float32, device=device)


def _consume(layers: list[torch.Tensor], function: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """Apply a function to a list of tensors, each of which is dropped before the next one is taken."""
    return [function(layers.pop(0)) for _ in range(len(layers))]


def _consume_states(states: StreamStates, function: Callable[[torch.Tensor], torch.Tensor]) -> StreamStates:
    """As [`StreamStates.map`], for states that are used up."""
    is_shared = states.generation_keys is states.keys
    keys = _consume(states.keys, function)
    return StreamStates(
        keys, keys if is_shared else _consume(states.generation_keys, function), _consume(states.values, function)
    )


@dataclass(frozen=True)
class ReadingPlan:
    """
    Rows to run, and what of them a past cache holds.

    Args:
        rows (`list[ContextRow]`): Different rows.
        indices (`list[int]`): Row of every context.
        samples (`list[int]`): For every row, the sample of the past cache that it continues.
        starts (`list[int]`): How many tokens it shares with that sample.
    """

    rows: list[ContextRow]
    indices: list[int]
    samples: list[int]
    starts: list[int]


def plan_reading(contexts: Sequence[ContextRow], past: Sequence[ContextRow]) -> ReadingPlan:
    """
    Decide what to run.

    Args:
        contexts (`Sequence[ContextRow]`): Rows that are needed, some of which may be equal.
        past (`Sequence[ContextRow]`): Rows of a past cache.
    """
    rows: list[ContextRow] = []
    indices = []
    for context in contexts:
        index = next((i for i, row in enumerate(rows) if row.equals(context)), len(rows))
        indices.append(index)
        if index == len(rows):
            rows.append(context)
    samples, starts = [], []
    for row in rows:
        # The last token is run in any case, because the next one is predicted from its state.
        shared = [min(row.num_common_tokens(other), len(row.ids) - 1) for other in past] or [0]
        starts.append(max(shared))
        samples.append(shared.index(starts[-1]))
    return ReadingPlan(rows, indices, samples, starts)


@torch.no_grad()
def read_conversations(
    model: Cosmos3Network,
    contexts: Sequence[Sequence[Segment]],
    group_size: int = 1,
    capacity: int = 0,
    past: Cosmos3Cache | None = None,
) -> Cosmos3Cache:
    """
    Read contexts, as [`UnifiedModel.prefill`] says. Equal contexts are read once, and what `past` holds is copied.
    """
    config, device = model.config, model.device
    plan = plan_reading([ContextRow.of(context, config) for context in contexts], [] if past is None else past.rows)
    past_states, past_mask = None, torch.zeros(len(plan.rows), 0, dtype=torch.bool, device=device)
    if any(plan.starts):
        samples, num_past = torch.tensor(plan.samples, device=device), past.length
        # Slots are in the order of tokens.
        tokens = past.mask[samples, :num_past].cumsum(dim=1)
        past_mask = past.mask[samples, :num_past] & (tokens <= torch.tensor(plan.starts, device=device)[:, None])
        past_states = _consume_states(past.states, lambda layer: layer[samples, :, :num_past])
    inputs = collate_contexts(plan.rows, [[row.tail()] for row in plan.rows], plan.starts)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    hidden, states = model.understand_contexts(inputs, past_states, past_mask)
    lengths = [len(row.ids) - start for row, start in zip(plan.rows, plan.starts, strict=True)]
    if model.work is not None:
        num_tails = int((inputs["forks"] > 0).sum())
        model.work.count("prefill", sum(lengths) + num_tails, inputs["input_ids"].numel())
    last_states = hidden[torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device) - 1]
    is_token, is_tail = inputs["horizons"] > 0, inputs["forks"] > 0
    expand = torch.tensor(plan.indices, device=device).repeat_interleave(group_size)
    num_free = capacity + TAIL_SLOTS
    length = past_mask.shape[1] + max(lengths)
    num_slots = length + num_free

    def to_slots(is_read: torch.Tensor) -> torch.Tensor:
        mask = torch.cat([past_mask, is_read], dim=1)[expand]
        return F.pad(mask, (0, num_slots - mask.shape[1]))

    cache = Cosmos3Cache(
        states=_join(past_states, states, expand, num_slots),
        mask=to_slots(is_token & ~is_tail),
        painting_mask=to_slots(is_token),
        length=length,
        last_states=last_states[expand],
        rows=[plan.rows[index].copy() for index in plan.indices for _ in range(group_size)],
        clean={},
        start_times=torch.empty(0),
    )
    cache.place_images(config)
    return cache


def _join(past: StreamStates | None, new: StreamStates, rows: torch.Tensor, num_slots: int) -> StreamStates:
    """Slots of past and new states, both of which are used up, for the samples that have the given `rows`."""

    def join(old_layers: list[torch.Tensor], new_layers: list[torch.Tensor]) -> list[torch.Tensor]:
        layers = []
        while new_layers:
            parts = [*([old_layers.pop(0)] if old_layers else []), new_layers.pop(0)]
            layer = parts[-1].new_zeros(len(rows), parts[-1].shape[1], num_slots, parts[-1].shape[3])
            start = 0
            for part in parts:
                layer[:, :, start : start + part.shape[2]] = part[rows]
                start += part.shape[2]
            layers.append(layer)
        return layers

    is_shared = new.generation_keys is new.keys
    old = past or StreamStates([], [], [])
    keys = join(old.keys, new.keys)
    generation_keys = keys if is_shared else join(old.generation_keys, new.generation_keys)
    return StreamStates(keys, generation_keys, join(old.values, new.values))


@torch.no_grad()
def write_replies(
    model: Cosmos3Network,
    cache: Cosmos3Cache,
    uniforms: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> SampledText:
    """
    Sample one text per sample and leave it in the cache with its end token, as [`UnifiedModel.sample_text`] says. The
    first token is drawn from the state of the last token of the reply's header.

    Raises:
        `ValueError`: If a context ends in a text of the policy.
    """
    batch, max_new_tokens = uniforms.shape
    samples = cache.head(batch)
    if any(row.turn != "reply" for row in samples.rows):
        raise ValueError(
            "the policy has just written a text: add a request to the context before it writes another one"
        )
    device, eos = model.device, model.config.eos_token_id
    uniforms = uniforms.to(device)
    positions = torch.tensor([row.next_position for row in samples.rows], dtype=torch.float32, device=device)
    is_open = torch.ones(batch, dtype=torch.bool, device=device)
    hidden = samples.last_states
    samples.painting_mask.copy_(samples.mask)
    sampled, log_probs, counted = [], [], []
    # One step for each token, and one for an end token where the limit cut a text off.
    for step in range(max_new_tokens + 1):
        if step < max_new_tokens:
            logits = model.transformer.lm_head(hidden)
            tokens, token_log_probs = sample_tokens(logits, uniforms[:, step], temperature, top_k, top_p)
            sampled.append(tokens)
            log_probs.append(token_log_probs)
            counted.append(is_open)
        else:
            tokens = torch.full_like(tokens, eos)
        hidden = _feed_tokens(model, samples, tokens, positions)
        samples.mask[:, samples.length] = samples.painting_mask[:, samples.length] = is_open
        samples.length += 1
        positions = positions + is_open
        is_open = is_open & (tokens != eos)
        if not is_open.any():
            break
    start = torch.full_like(tokens, model.config.vision_start_token_id)
    _feed_tokens(model, samples, start, positions)
    samples.painting_mask[:, samples.length] = True
    cache.length = samples.length
    text = SampledText.from_steps(sampled, log_probs, counted, eos)
    for row, ids, ended in zip(cache.rows, text.token_ids, text.ended, strict=False):
        row.add([TextSegment(ids, sampled=True, ended=ended)])
    cache.place_images(model.config)
    if model.work is not None:
        # Each text is followed by `<|vision_start|>`, and by an end token that it may lack.
        num_tokens = sum(len(ids) + (1 if ended else 2) for ids, ended in zip(text.token_ids, text.ended, strict=True))
        model.work.count("decode", num_tokens, (step + 2) * batch, step + 2)
    return text


@torch.no_grad()
def _feed_tokens(
    model: Cosmos3Network, cache: Cosmos3Cache, tokens: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """
    Read one token per sample, and write its keys and values behind the slots in use, which the caller claims.

    Args:
        model ([`Cosmos3Network`]): The model.
        cache ([`Cosmos3Cache`]): The contexts.
        tokens, positions (`torch.Tensor` of shape `(samples,)`): Token ids, and their positions.

    Returns:
        `torch.Tensor` of shape `(samples, hidden)`: States after the tokens.
    """
    mask = F.pad(cache.mask[:, : cache.length], (0, 1), value=True)[:, None, None]
    hidden, states = model.transformer.understand(
        model.transformer.embed(tokens[:, None]),
        positions.expand(3, -1)[..., None],
        mask,
        past=cache.until(cache.length),
    )
    cache.write(states, cache.length)
    return hidden[:, 0]


@torch.no_grad()
def denoise_images(
    model: Cosmos3Network, cache: Cosmos3Cache, latents: torch.Tensor, grid: tuple[int, int], timestep: torch.Tensor
) -> torch.Tensor:
    """
    Velocity of noised images, as [`UnifiedModel.predict_velocity`] says. The clean images in a context are run beside the
    noised one.

    Raises:
        `ValueError`: If the images do not share the rows of the cache evenly.
    """
    num_images, num_tokens, _ = latents.shape
    forks, rest = divmod(num_images, cache.num_rows)
    if rest:
        raise ValueError(f"{num_images} images cannot share {cache.num_rows} rows of a cache evenly")
    device = latents.device
    rows = torch.arange(cache.num_rows, device=device).repeat_interleave(forks)
    positions = latent_positions([grid], 0, device).expand(num_images, -1, -1).clone()
    positions[:, 0] += cache.start_times[rows, None]
    clean = {name: tensor[rows] for name, tensor in cache.clean.items()}
    noised = torch.ones(num_images, num_tokens, dtype=torch.bool, device=device)
    valid = torch.cat([clean["valid"], noised], dim=1)
    num_slots = cache.length + TAIL_SLOTS
    mask = torch.cat([cache.painting_mask[rows, :num_slots], valid], dim=1)[:, None, None]
    velocities = model.transformer.denoise(
        torch.cat([clean["latents"].to(latents.dtype), latents], dim=1),
        torch.cat([clean["noised"], noised], dim=1),
        timestep.reshape(1).expand(num_images),
        torch.cat([clean["latent_positions"], positions], dim=2).transpose(0, 1),
        cache.until(num_slots),
        mask.expand(-1, -1, valid.shape[1], -1),
        context_rows=rows if forks > 1 else None,
    )
    return velocities[:, -num_tokens:]


@torch.no_grad()
def start_answers(model: Cosmos3Network, pixel_values: torch.Tensor, questions: Sequence[TextSegment]) -> torch.Tensor:
    """
    Logits of the first token of an answer without a thought. Image and question are one user turn.

    Args:
        model ([`Cosmos3Network`]): The model.
        pixel_values (`torch.Tensor` of shape `(3, height, width)`): The image in [-1, 1].
        questions (`Sequence[TextSegment]`): Questions about it.

    Returns:
        `torch.Tensor` of shape `(questions, vocabulary)`.
    """
    device = model.device
    image = ContextRow(model.config).add([ImageSegment(torch.empty(0, model.latent_channels), (0, 0), pixel_values)])
    rows = [image.copy().add([question]).begin_reply(thinks=False) for question in questions]
    inputs = {name: tensor.to(device) for name, tensor in collate_contexts([image], [[]]).items()}
    _, states = model.understand_contexts(inputs)
    start = len(image.ids)
    inputs = collate_contexts(rows, [[]] * len(rows), [start] * len(rows))
    past = states.map(lambda layer: layer.expand(len(rows), -1, -1, -1))
    mask = torch.ones(len(rows), start, dtype=torch.bool, device=device)
    hidden, _ = model.understand_contexts({name: tensor.to(device) for name, tensor in inputs.items()}, past, mask)
    last = torch.tensor([len(row.ids) - start - 1 for row in rows], device=device)
    return model.transformer.lm_head(hidden[torch.arange(len(rows), device=device), last])


@torch.no_grad()
def score_answers(
    model: Cosmos3Network, contexts: Sequence[Sequence[Segment]], texts: Sequence[TextSegment]
) -> list[torch.Tensor]:
    """
    Log-probabilities of given texts as answers without a thought, as [`UnifiedModel.text_log_probs`] says. A packed forward
    would put the text into the thought that a reply of Edge begins with.
    """
    ids = [text.content_ids for text in texts]
    rows = [ContextRow(model.config).add(context).begin_reply(thinks=False) for context in contexts]
    starts = [len(row.ids) - 1 for row in rows]
    for row, text in zip(rows, texts, strict=True):
        row.add([TextSegment(list(text.content_ids), role="assistant")])
    inputs = collate_contexts(rows, [[]] * len(rows))
    hidden, _ = model.understand_contexts({name: tensor.to(model.device) for name, tensor in inputs.items()})
    # A token is predicted from the one before it.
    states = [row[start : start + len(own)] for row, start, own in zip(hidden, starts, ids, strict=True)]
    targets = torch.tensor([token_id for own in ids for token_id in own], device=model.device)
    head, size = model.transformer.lm_head, model.config.vocab_size
    log_probs, _ = score_tokens(head, torch.cat(states), targets, size)
    return list(log_probs.split([len(own) for own in ids]))
