# SPDX-License-Identifier: Apache-2.0

"""
Attention of packed sequences: contexts attend to themselves, noised copies to their context and to themselves.

In a packed batch most pairs of tokens do not see each other, because nobody sees a noised copy of another image, step
or branch. A mask of all pairs would compute all of them: at 100 M parameters, attention took 1.7 s per layer under
such a mask and 0.5 s without it. Contexts therefore come first in a batch and copies behind them, so that slices tell
them apart, and each kind of attention runs on dense tensors. There are four kernels for copies:

- `eager` is written out,
- `sdpa` on a CPU is two calls of flash attention that share one softmax,
- `sdpa` elsewhere repeats the keys of the context for every copy,
- `flex_attention` runs whole sequences under a block mask, and skips the blocks of the mask that are empty.

Contexts and copies also run in passes of their own: copies then read the keys and values that the pass over contexts
returned. With detached contexts, the first pass has a gradient only if texts were sampled. Gradient checkpointing and
flex attention work with that. Sharded layers are gathered once per pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from alphagrpo_ext.models.bagel.layout import PADDING_BLOCK, sees, visibility_mask
from alphagrpo_ext.models.bagel.packing import NUM_DELIMITERS, Bucket


def additive_mask(mask: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A bool mask of any shape as what is added to scores: 0 where it is true, else the lowest number of `dtype`."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


@dataclass(frozen=True)
class BucketMasks:
    """
    Masks of the packed sequences of a [`Bucket`]. Understanding tokens come before latents in every context and every
    copy. Masks are bool until [`additive`] is called.

    Args:
        bucket ([`Bucket`]): Sizes.
        context_mask (`torch.Tensor` of shape `(sequences, context, context)`): Which tokens of the context see which.
        copy_context_mask (`torch.Tensor` of shape `(sequences, copies, context)`): What a copy sees of the context.
        copy_mask (`torch.Tensor` of shape `(sequences, copies, copy_tokens)`):
            What a copy sees of itself: all but padding.
    """

    bucket: Bucket
    context_mask: torch.Tensor
    copy_context_mask: torch.Tensor
    copy_mask: torch.Tensor

    @classmethod
    def from_attributes(
        cls, bucket: Bucket, contexts: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]
    ) -> BucketMasks:
        """
        Args:
            bucket ([`Bucket`]): Sizes.
            contexts (`Sequence[torch.Tensor]`): Positions, blocks and horizons of contexts, `(sequences, context)`.
            copies (`Sequence[torch.Tensor]`): The same of copies, `(sequences, copies, copy_tokens)`.
        """
        (_, context_blocks, _), (_, blocks, horizons) = contexts, copies
        # A copy's first token is a delimiter, which is never padding.
        horizon = horizons[:, :, :1] if bucket.copies else horizons.new_zeros(bucket.sequences, 0, 1)
        return cls(
            bucket,
            context_mask=visibility_mask(*contexts),
            copy_context_mask=context_blocks[:, None] < horizon,
            copy_mask=blocks != PADDING_BLOCK,
        )

    def additive(self, dtype: torch.dtype) -> BucketMasks:
        """With masks that are added to scores; see [`additive_mask`]."""
        names = ("context_mask", "copy_context_mask", "copy_mask")
        return replace(self, **{name: additive_mask(getattr(self, name), dtype) for name in names})

    @cached_property
    def token_context_mask(self) -> torch.Tensor:
        """`copy_context_mask` for every token of a copy, `(sequences, 1, copies * copy_tokens, context)`."""
        return self.copy_context_mask.repeat_interleave(self.bucket.copy_tokens, dim=1)[:, None]


@dataclass(frozen=True)
class PackedLayout:
    """
    How contexts and copies follow each other in a packed batch, as [`pack_trajectories`] lays them out: for each
    expert the contexts of every bucket, and then the copies of every bucket. A layout can also hold only contexts or
    only copies.

    Args:
        buckets (`tuple[BucketMasks, ...]`): Sizes and masks of every bucket.
        has_contexts, has_copies (`bool`, *optional*, defaults to `True`):
            What the batch holds. Without copies, layers return the keys and values of contexts; without contexts, they
            are given them.
    """

    buckets: tuple[BucketMasks, ...]
    has_contexts: bool = True
    has_copies: bool = True

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, torch.Tensor]) -> PackedLayout:
        """
        Args:
            inputs (`Mapping[str, torch.Tensor]`):
                `buckets` `(buckets, 5)`, and `positions`, `blocks` and `horizons` of all tokens, `(1, und + gen)`.
        """
        buckets = [Bucket(*sizes) for sizes in inputs["buckets"].tolist()]
        num_und = sum(sum(bucket.und_sizes) for bucket in buckets)
        attributes = [inputs[name].tensor_split([num_und], dim=1) for name in ("positions", "blocks", "horizons")]
        contexts, copies = zip(*(split_tokens(buckets, und, gen) for und, gen in attributes), strict=True)
        return cls(
            tuple(map(BucketMasks.from_attributes, buckets, zip(*contexts, strict=True), zip(*copies, strict=True)))
        )

    @property
    def num_und(self) -> int:
        """Tokens of the batch for the understanding expert."""
        return self._count([masks.bucket.und_sizes for masks in self.buckets])

    @property
    def num_gen(self) -> int:
        """Tokens of the batch for the generation expert."""
        return self._count([masks.bucket.gen_sizes for masks in self.buckets])

    def _count(self, sizes: Sequence[tuple[int, int]]) -> int:
        return sum(contexts * self.has_contexts + copies * self.has_copies for contexts, copies in sizes)

    @property
    def copy_mask(self) -> torch.Tensor:
        """False on padding, for every token of every copy, flattened."""
        return torch.cat([masks.copy_mask.flatten() for masks in self.buckets])

    def contexts_alone(self) -> PackedLayout:
        """The contexts of all buckets."""
        return replace(self, has_copies=False)

    def copies_alone(self) -> PackedLayout:
        """The copies of all buckets, over keys and values of contexts that were computed before."""
        return replace(self, has_contexts=False)

    def take(self, und: torch.Tensor, gen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What this layout holds of the tokens `(1, tokens, ...)` of a whole batch, for each expert."""
        if self.has_contexts:
            return und[:, : self.num_und], gen[:, : self.num_gen]
        return und[:, und.shape[1] - self.num_und :], gen[:, gen.shape[1] - self.num_gen :]

    def additive(self, dtype: torch.dtype) -> PackedLayout:
        """With masks that are added to scores."""
        return replace(self, buckets=tuple(masks.additive(dtype) for masks in self.buckets))

    def split(
        self, und: torch.Tensor, gen: torch.Tensor | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What [`split_tokens`] returns for this batch."""
        return split_tokens([masks.bucket for masks in self.buckets], und, gen, self.has_contexts, self.has_copies)

    def merge(
        self, contexts: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Inverse of [`split`].

        Args:
            contexts (`Sequence[torch.Tensor]`): Contexts `(sequences, context, channels)` of every bucket.
            copies (`Sequence[torch.Tensor]`):
                Copies `(sequences, copies, copy_tokens, channels)` of every bucket that has some.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Tokens `(1, tokens, channels)` of each expert.
        """
        und, gen = [], []
        for masks, context in zip(self.buckets if self.has_contexts else (), contexts, strict=True):
            und.append(context[:, : masks.bucket.context_und].flatten(0, 1))
            gen.append(context[:, masks.bucket.context_und :].flatten(0, 1))
        for copy in copies:
            und.append(copy[:, :, :NUM_DELIMITERS].flatten(0, 2))
            gen.append(copy[:, :, NUM_DELIMITERS:].flatten(0, 2))
        return _concatenate(und)[None], _concatenate(gen)[None]


def _concatenate(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """All parts as one tensor, without a copy if all others are empty."""
    filled = [part for part in parts if len(part)]
    return torch.cat(filled) if len(filled) > 1 else (filled or parts)[0]


def split_tokens(
    buckets: Sequence[Bucket],
    und: torch.Tensor,
    gen: torch.Tensor | None,
    has_contexts: bool = True,
    has_copies: bool = True,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """
    Split a packed batch into buckets, with the understanding tokens of every context and every copy before the
    latents.

    Args:
        buckets (`Sequence[Bucket]`): Sizes.
        und, gen (`torch.Tensor` of shape `(1, tokens, ...)`): Values of the tokens of each expert.
        has_contexts, has_copies (`bool`, *optional*, defaults to `True`): What the batch holds.

    Returns:
        `tuple[list[torch.Tensor], list[torch.Tensor]]`: Contexts `(sequences, context, ...)` and copies
        `(sequences, copies, copy_tokens, ...)` of every bucket. A list is empty if the batch does not hold them.
    """
    contexts = [((b.sequences,), b.context_und, b.context_gen) for b in buckets] if has_contexts else []
    copies = [((b.sequences, b.copies), NUM_DELIMITERS, b.copy_latents) for b in buckets] if has_copies else []
    parts, tail = [*contexts, *copies], und.shape[2:]
    gen = und[:, :0] if gen is None else gen
    und_parts = und[0].split([math.prod(shape) * num_und for shape, num_und, _ in parts])
    gen_parts = gen[0].split([math.prod(shape) * num_gen for shape, _, num_gen in parts])
    tokens = []
    for (shape, num_und, num_gen), und_part, gen_part in zip(parts, und_parts, gen_parts, strict=True):
        und_part, gen_part = und_part.view(*shape, num_und, *tail), gen_part.view(*shape, num_gen, *tail)
        # Without latents there is nothing to copy.
        tokens.append(torch.cat([und_part, gen_part], dim=len(shape)) if num_gen else und_part)
    return tokens[: len(contexts)], tokens[len(contexts) :]


class CopyStates(NamedTuple):
    """
    Rotated queries, rotated keys, and values of a bucket in one layer.

    Args:
        query (`torch.Tensor` of shape `(sequences, heads, copies * copy_tokens, head_dim)`): Queries of the copies.
        context_key, context_value (`torch.Tensor` of shape `(sequences, kv_heads, context, head_dim)`):
            Keys and values of the contexts.
        key, value (`torch.Tensor` of shape `(sequences, kv_heads, copies * copy_tokens, head_dim)`):
            Keys and values of the copies.
    """

    query: torch.Tensor
    context_key: torch.Tensor
    context_value: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def eager_copy_attention(states: CopyStates, masks: BucketMasks, scaling: float) -> torch.Tensor:
    """
    Attention of copies over their context and themselves, written out. It is the fastest on a CPU for about a hundred
    tokens.

    Args:
        states ([`CopyStates`]): Queries, keys and values.
        masks ([`BucketMasks`]): Additive masks.
        scaling (`float`): Factor of the scores.

    Returns:
        `torch.Tensor` of shape `(sequences, heads, copies * copy_tokens, head_dim)`.
    """
    query, context_key, context_value, key, value = states
    (num_sequences, heads, num_tokens, _), kv_heads = query.shape, key.shape[1]
    num_copies, context = masks.bucket.copies, context_key.shape[2]
    groups = (kv_heads, heads // kv_heads)
    query = query * scaling
    # Heads that share keys and values become further queries, so that no key is repeated.
    to_context = query.unflatten(1, groups).flatten(2, 3)
    to_itself = query.unflatten(1, groups).unflatten(3, (num_copies, -1))
    key, value = (x.unflatten(2, (num_copies, -1))[:, :, None] for x in (key, value))
    context_scores = (to_context @ context_key.transpose(-1, -2)).reshape(*to_itself.shape[:-1], context)
    scores = torch.cat(
        [
            context_scores + masks.copy_context_mask[:, None, None, :, None],
            to_itself @ key.transpose(-1, -2) + masks.copy_mask[:, None, None, :, None],
        ],
        dim=-1,
    )
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    output = (weights[..., :context].reshape(*to_context.shape[:-1], context) @ context_value).view_as(to_itself)
    output = output + weights[..., context:] @ value
    return output.reshape(num_sequences, heads, num_tokens, -1)


class _FlashCopyAttention(torch.autograd.Function):
    """
    Two calls of the CPU's flash attention, over the context and over the copy itself. Their outputs are weighted by
    the sums of their softmaxes. The backward is exact: for the gradient of a part, flash attention needs only the
    output and the softmax sum of the whole (FlashAttention, https://huggingface.co/papers/2205.14135, section B.4).
    """

    @staticmethod
    def forward(ctx, query, context_key, context_value, key, value, context_mask, mask, num_copies, scaling):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        own = [_copies_to_batch(x, num_copies) for x in (query, key, value)]
        output, log_sum = flash(query, context_key, context_value, attn_mask=context_mask, scale=scaling)
        own_output, own_log_sum = flash(*own, attn_mask=mask, scale=scaling)
        own_output, own_log_sum = (_batch_to_copies(x, num_copies) for x in (own_output, own_log_sum))
        total = torch.logaddexp(log_sum, own_log_sum)
        output = output * (log_sum - total).exp()[..., None] + own_output * (own_log_sum - total).exp()[..., None]
        output = output.to(query.dtype)
        ctx.save_for_backward(query, context_key, context_value, key, value, context_mask, mask, output, total)
        ctx.num_copies, ctx.scaling = num_copies, scaling
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, context_key, context_value, key, value, context_mask, mask, output, total = ctx.saved_tensors
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        by_query, by_context_key, by_context_value = backward(
            *(gradient, query, context_key, context_value, output, total, 0.0, False),
            attn_mask=context_mask,
            scale=ctx.scaling,
        )
        own = [_copies_to_batch(x, ctx.num_copies) for x in (gradient, query, key, value, output, total)]
        by_own = backward(*own, 0.0, False, attn_mask=mask, scale=ctx.scaling)
        by_own_query, by_key, by_value = (_batch_to_copies(x, ctx.num_copies) for x in by_own)
        return by_query + by_own_query, by_context_key, by_context_value, by_key, by_value, None, None, None, None


def _copies_to_batch(x: torch.Tensor, num_copies: int) -> torch.Tensor:
    """`(sequences, heads, copies * tokens, ...)` to `(sequences * copies, heads, tokens, ...)`."""
    return x.unflatten(2, (num_copies, -1)).transpose(1, 2).flatten(0, 1)


def _batch_to_copies(x: torch.Tensor, num_copies: int) -> torch.Tensor:
    """Inverse of [`_copies_to_batch`]."""
    return x.unflatten(0, (-1, num_copies)).transpose(1, 2).flatten(2, 3)


def sdpa_copy_attention(states: CopyStates, masks: BucketMasks, scaling: float) -> torch.Tensor:
    """[`eager_copy_attention`] that does not keep scores in memory."""
    dtype, repeats = states.value.dtype, states.query.shape[1] // states.key.shape[1]
    # Under autocast, queries and keys come out of their norms in fp32.
    query, *others = (x.to(dtype) for x in states)
    if repeats > 1:
        others = [x.repeat_interleave(repeats, dim=1) for x in others]
    attend = flash_copy_attention if query.device.type == "cpu" else concatenated_copy_attention
    return attend(CopyStates(query, *others), masks, scaling)


def flash_copy_attention(states: CopyStates, masks: BucketMasks, scaling: float) -> torch.Tensor:
    """[`sdpa_copy_attention`] on a CPU, for as many key heads as query heads and tensors of one data type."""
    mask = masks.copy_mask.flatten(0, 1)[:, None, None]
    return _FlashCopyAttention.apply(*states, masks.token_context_mask, mask, masks.bucket.copies, scaling)


def concatenated_copy_attention(states: CopyStates, masks: BucketMasks, scaling: float) -> torch.Tensor:
    """[`flash_copy_attention`] on any device. The context's keys are repeated before those of every copy."""
    num_copies = masks.bucket.copies
    query, key, value = (_copies_to_batch(x, num_copies) for x in (states.query, states.key, states.value))
    keys, values = (
        torch.cat([context.repeat_interleave(num_copies, dim=0), own], dim=2)
        for context, own in ((states.context_key, key), (states.context_value, value))
    )
    mask = torch.cat([masks.copy_context_mask, masks.copy_mask], dim=2).flatten(0, 1)[:, None, None]
    mask = mask.expand(-1, -1, masks.bucket.copy_tokens, -1)
    return _batch_to_copies(F.scaled_dot_product_attention(query, keys, values, mask, scale=scaling), num_copies)


def copy_attention(attn_implementation: str) -> Callable[..., torch.Tensor]:
    """The function for one of Transformers' names. All but `"eager"` use SDPA."""
    return eager_copy_attention if attn_implementation == "eager" else sdpa_copy_attention


def visibility_block_mask(
    positions: torch.Tensor, blocks: torch.Tensor, horizons: torch.Tensor, sequence_ids: torch.Tensor | None = None
) -> BlockMask:
    """
    [`visibility_mask`] as a block mask.

    Args:
        positions, blocks, horizons (`torch.Tensor` of shape `(batch, tokens)`): Attributes of every token.
        sequence_ids (`torch.Tensor` of shape `(batch, tokens)`, *optional*):
            The sequence of every token, where several sequences are concatenated.
    """
    batch, length = positions.shape
    sequence_ids = torch.zeros_like(blocks) if sequence_ids is None else sequence_ids

    def mask_mod(entry: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        attributes = (x[entry, query] for x in (positions, blocks, horizons))
        is_seen = sees(*attributes, positions[entry, key], blocks[entry, key])
        return is_seen & (sequence_ids[entry, query] == sequence_ids[entry, key])

    # Without compilation, this computes the mask of all pairs first.
    make = create_block_mask if positions.device.type == "cpu" else torch.compile(create_block_mask)
    return make(mask_mod, B=batch, H=None, Q_LEN=length, KV_LEN=length, device=positions.device)


def block_mask_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockMask,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attention under a block mask, with the interface of Transformers' attention functions. It is compiled on an
    accelerator and not on a CPU. Flex attention has no backward on a CPU, so training there uses SDPA with the mask of
    all pairs.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, tokens, head_dim)`): Rotated queries.
        key, value (`torch.Tensor` of shape `(batch, kv_heads, tokens, head_dim)`): Rotated keys, and values.
        mask (`BlockMask`): From [`visibility_block_mask`].
        scaling (`float`): Factor of the scores.

    Returns:
        `torch.Tensor` of shape `(batch, tokens, heads, head_dim)`, and `None`.
    """
    if query.device.type != "cpu":
        output, _ = flex_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
        return output, None
    if any(tensor.requires_grad for tensor in (query, key, value)):
        length = query.shape[2]
        dense = create_mask(mask.mask_mod, len(query), 1, length, length, device=query.device)
        return sdpa_attention_forward(module, query, key, value, dense, scaling=scaling, **kwargs)
    output = flex_attention(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None
