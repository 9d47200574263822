# SPDX-License-Identifier: Apache-2.0

"""Attention of noised copies: each sees the context of its row and itself, so no mask of all pairs is needed.

A packed row is a context, and copies of images that nobody else sees. Computed as one sequence, most pairs of its tokens
would be masked out. Here the context attends to itself, and every copy to the context and to itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F

from alphagrpo_ext.models.bagel.layout import PADDING_BLOCK, visibility_mask
from alphagrpo_ext.models.bagel.packing import NUM_DELIMITERS, Bucket


def additive_mask(mask: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """0 where `mask` is true, else the lowest number of `dtype`."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


@dataclass
class ContextStates:
    """Keys and values of contexts, without gradient: `(rows, kv_heads, tokens, head_dim)`, a layer each."""

    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep what a layer computed. Under gradient checkpointing a layer runs twice; the second time changes nothing."""
        if layer == len(self.keys):
            self.keys.append(keys.detach())
            self.values.append(values.detach())

    def of_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer."""
        return self.keys[layer], self.values[layer]


@dataclass(frozen=True)
class BucketLayout:
    """
    Who sees whom among the rows of a [`Bucket`], understanding tokens before latents in every context and every copy.
    Masks are bool until [`additive`] is called.

    Args:
        bucket ([`Bucket`]): Sizes.
        context_mask (`torch.Tensor` of shape `(rows, context, context)`): Which tokens of the context see which.
        copy_context_mask (`torch.Tensor` of shape `(rows, copies, context)`): What a copy sees of the context.
        copy_mask (`torch.Tensor` of shape `(rows, copies, copy_tokens)`): What a copy sees of itself: all but padding.
    """

    bucket: Bucket
    context_mask: torch.Tensor
    copy_context_mask: torch.Tensor
    copy_mask: torch.Tensor

    @classmethod
    def of(cls, bucket: Bucket, contexts: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]) -> BucketLayout:
        """
        Args:
            bucket ([`Bucket`]): Sizes.
            contexts (`Sequence[torch.Tensor]`): Positions, blocks and horizons of contexts, `(rows, context)`.
            copies (`Sequence[torch.Tensor]`): The same of copies, `(rows, copies, copy_tokens)`.
        """
        (_, context_blocks, _), (_, blocks, horizons) = contexts, copies
        # A copy's first token is a delimiter, and none of those is padding.
        horizon = horizons[:, :, :1] if bucket.copies else horizons.new_zeros(bucket.rows, 0, 1)
        return cls(
            bucket,
            context_mask=visibility_mask(*contexts),
            copy_context_mask=context_blocks[:, None] < horizon,
            copy_mask=blocks != PADDING_BLOCK,
        )

    def additive(self, dtype: torch.dtype) -> BucketLayout:
        """With masks that are added to scores."""
        names = ("context_mask", "copy_context_mask", "copy_mask")
        return replace(self, **{name: additive_mask(getattr(self, name), dtype) for name in names})

    @cached_property
    def token_context_mask(self) -> torch.Tensor:
        """`copy_context_mask` for every token of a copy, `(rows, 1, copies * copy_tokens, context)`: once for all layers."""
        return self.copy_context_mask.repeat_interleave(self.bucket.copy_tokens, dim=1)[:, None]


@dataclass(frozen=True)
class PackedLayout:
    """
    A sequence of contexts and copies, as [`pack_trajectories`] lays it out: for each expert the contexts of every bucket,
    and then the copies of every bucket. A part of it holds only contexts, or only copies.

    Args:
        buckets (`tuple[BucketLayout, ...]`): Rows by their shape.
        has_contexts, has_copies (`bool`, *optional*, defaults to `True`): What the sequence holds.
        states (`tuple[ContextStates, ...]`, *optional*):
            Keys and values of every bucket's contexts: kept by a sequence without copies, and read by one without contexts.
    """

    buckets: tuple[BucketLayout, ...]
    has_contexts: bool = True
    has_copies: bool = True
    states: tuple[ContextStates, ...] | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, torch.Tensor]) -> PackedLayout:
        """
        Args:
            inputs (`Mapping[str, torch.Tensor]`): `buckets`, and `positions`, `blocks` and `horizons` of all tokens.
        """
        buckets = [Bucket(*sizes) for sizes in inputs["buckets"].tolist()]
        num_und = sum(sum(bucket.und_sizes) for bucket in buckets)
        names = ("positions", "blocks", "horizons")
        attributes = [split(buckets, inputs[name][:, :num_und], inputs[name][:, num_und:]) for name in names]
        contexts, copies = (zip(*of_all, strict=True) for of_all in zip(*attributes, strict=True))
        return cls(tuple(map(BucketLayout.of, buckets, contexts, copies)))

    @property
    def num_und(self) -> int:
        """The sequence's tokens for the understanding expert."""
        return self._count("und_sizes")

    @property
    def num_gen(self) -> int:
        """The same for the generation expert."""
        return self._count("gen_sizes")

    def _count(self, name: str) -> int:
        sizes = [getattr(layout.bucket, name) for layout in self.buckets]
        return sum(of_contexts * self.has_contexts + of_copies * self.has_copies for of_contexts, of_copies in sizes)

    def contexts_alone(self) -> PackedLayout:
        """The contexts of all buckets, with a place to keep their keys and values."""
        return replace(self, has_copies=False, states=tuple(ContextStates() for _ in self.buckets))

    def copies_alone(self, states: tuple[ContextStates, ...]) -> PackedLayout:
        """The copies of all buckets, over keys and values of contexts that were computed before."""
        return replace(self, has_contexts=False, states=states)

    def additive(self, dtype: torch.dtype) -> PackedLayout:
        """With masks that are added to scores."""
        return replace(self, buckets=tuple(layout.additive(dtype) for layout in self.buckets))

    def split(
        self, und: torch.Tensor, gen: torch.Tensor | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What [`split`] makes of a sequence that may hold only contexts, or only copies."""
        return split([layout.bucket for layout in self.buckets], und, gen, self.has_contexts, self.has_copies)

    def merge(
        self, contexts: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverse of [`split`], where only buckets with copies have some."""
        und, gen = [], []
        for layout, context in zip(self.buckets if self.has_contexts else (), contexts, strict=True):
            und.append(context[:, : layout.bucket.context_und].flatten(0, 1))
            gen.append(context[:, layout.bucket.context_und :].flatten(0, 1))
        for copy in copies:
            und.append(copy[:, :, :NUM_DELIMITERS].flatten(0, 2))
            gen.append(copy[:, :, NUM_DELIMITERS:].flatten(0, 2))
        return _joined(und)[None], _joined(gen)[None]


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of all parts: the part itself, where all others are empty."""
    filled = [part for part in parts if len(part)]
    return torch.cat(filled) if len(filled) > 1 else (filled or parts)[0]


def split(
    buckets: Sequence[Bucket],
    und: torch.Tensor,
    gen: torch.Tensor | None,
    has_contexts: bool = True,
    has_copies: bool = True,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """
    From a sequence `(1, tokens, ...)` of each expert to the rows of buckets, understanding tokens before latents.

    Returns:
        `tuple[list[torch.Tensor], list[torch.Tensor]]`: Contexts `(rows, context, ...)` and copies
        `(rows, copies, copy_tokens, ...)` of every bucket; a list is empty if the sequence does not hold them.
    """
    gen = und[:, :0] if gen is None else gen
    und_start = gen_start = 0

    def take(shape: tuple[int, ...], num_und: int, num_gen: int) -> torch.Tensor:
        nonlocal und_start, gen_start
        count, tail = math.prod(shape), und.shape[2:]
        of_und = und[0, und_start : und_start + count * num_und].view(*shape, num_und, *tail)
        of_gen = gen[0, gen_start : gen_start + count * num_gen].view(*shape, num_gen, *tail)
        und_start, gen_start = und_start + count * num_und, gen_start + count * num_gen
        # Without a copy where there is nothing to put together.
        return torch.cat([of_und, of_gen], dim=len(shape)) if num_gen else of_und

    contexts = [take((b.rows,), b.context_und, b.context_gen) for b in buckets] if has_contexts else []
    copies = [take((b.rows, b.copies), NUM_DELIMITERS, b.copy_latents) for b in buckets] if has_copies else []
    return contexts, copies


class CopyStates(NamedTuple):
    """
    What a layer projected. Keys and queries are rotated.

    Args:
        query (`torch.Tensor` of shape `(rows, heads, copies * copy_tokens, head_dim)`): Of the copies.
        context_key, context_value (`torch.Tensor` of shape `(rows, kv_heads, context, head_dim)`): Of the context.
        key, value (`torch.Tensor` of shape `(rows, kv_heads, copies * copy_tokens, head_dim)`): Of the copies.
    """

    query: torch.Tensor
    context_key: torch.Tensor
    context_value: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def eager_copy_attention(states: CopyStates, layout: BucketLayout, scaling: float) -> torch.Tensor:
    """
    Attention of copies over the context and themselves, written out. At a hundred tokens the fastest on a CPU.

    Args:
        states ([`CopyStates`]): Queries, keys and values.
        layout ([`BucketLayout`]): With additive masks.
        scaling (`float`): Factor of the scores.

    Returns:
        `torch.Tensor` of shape `(rows, heads, copies * copy_tokens, head_dim)`.
    """
    query, context_key, context_value, key, value = states
    (rows, heads, num_tokens, _), kv_heads = query.shape, key.shape[1]
    num_copies, context = layout.bucket.copies, context_key.shape[2]
    groups = (kv_heads, heads // kv_heads)
    query = query * scaling
    # Heads that share keys and values are queries like others, so that nothing is repeated.
    to_context = query.unflatten(1, groups).flatten(2, 3)
    to_itself = query.unflatten(1, groups).unflatten(3, (num_copies, -1))
    key, value = (x.unflatten(2, (num_copies, -1))[:, :, None] for x in (key, value))
    context_scores = (to_context @ context_key.transpose(-1, -2)).reshape(*to_itself.shape[:-1], context)
    scores = torch.cat(
        [
            context_scores + layout.copy_context_mask[:, None, None, :, None],
            to_itself @ key.transpose(-1, -2) + layout.copy_mask[:, None, None, :, None],
        ],
        dim=-1,
    )
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    output = (weights[..., :context].reshape(*to_context.shape[:-1], context) @ context_value).view_as(to_itself)
    output = output + weights[..., context:] @ value
    return output.reshape(rows, heads, num_tokens, -1)


class _FlashCopyAttention(torch.autograd.Function):
    """
    Two calls of the CPU's flash attention, over the context and over the copy itself, put together by the sums of their
    softmaxes. Their backwards are exact, because flash attention needs only the output and the sum of the whole for the
    gradient of a part (FlashAttention, https://huggingface.co/papers/2205.14135, section B.4).
    """

    @staticmethod
    def forward(ctx, query, context_key, context_value, key, value, context_mask, mask, num_copies, scaling):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        own = [_one_copy_a_row(x, num_copies) for x in (query, key, value)]
        output, log_sum = flash(query, context_key, context_value, attn_mask=context_mask, scale=scaling)
        own_output, own_log_sum = flash(*own, attn_mask=mask, scale=scaling)
        own_output, own_log_sum = (_one_row_again(x, num_copies) for x in (own_output, own_log_sum))
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
        own = [_one_copy_a_row(x, ctx.num_copies) for x in (gradient, query, key, value, output, total)]
        by_own = backward(*own, 0.0, False, attn_mask=mask, scale=ctx.scaling)
        by_own_query, by_key, by_value = (_one_row_again(x, ctx.num_copies) for x in by_own)
        return by_query + by_own_query, by_context_key, by_context_value, by_key, by_value, None, None, None, None


def _one_copy_a_row(x: torch.Tensor, num_copies: int) -> torch.Tensor:
    """`(rows, heads, copies * tokens, ...)` to `(rows * copies, heads, tokens, ...)`."""
    return x.unflatten(2, (num_copies, -1)).transpose(1, 2).flatten(0, 1)


def _one_row_again(x: torch.Tensor, num_copies: int) -> torch.Tensor:
    return x.unflatten(0, (-1, num_copies)).transpose(1, 2).flatten(2, 3)


def sdpa_copy_attention(states: CopyStates, layout: BucketLayout, scaling: float) -> torch.Tensor:
    """[`eager_copy_attention`] without its scores in memory."""
    dtype, repeats = states.value.dtype, states.query.shape[1] // states.key.shape[1]
    # Under autocast the norms of queries and keys leave them in fp32.
    query, *others = (x.to(dtype) for x in states)
    if repeats > 1:
        others = [x.repeat_interleave(repeats, dim=1) for x in others]
    attend = flash_on_cpu if query.device.type == "cpu" else concatenated
    return attend(CopyStates(query, *others), layout, scaling)


def flash_on_cpu(states: CopyStates, layout: BucketLayout, scaling: float) -> torch.Tensor:
    """[`sdpa_copy_attention`] of as many keys as queries, of one type, with keys of the context that no copy repeats."""
    mask = layout.copy_mask.flatten(0, 1)[:, None, None]
    return _FlashCopyAttention.apply(*states, layout.token_context_mask, mask, layout.bucket.copies, scaling)


def concatenated(states: CopyStates, layout: BucketLayout, scaling: float) -> torch.Tensor:
    """The same on any device, with the context's keys repeated before those of every copy."""
    num_copies = layout.bucket.copies
    query, key, value = (_one_copy_a_row(x, num_copies) for x in (states.query, states.key, states.value))
    keys, values = (
        torch.cat([context.repeat_interleave(num_copies, dim=0), own], dim=2)
        for context, own in ((states.context_key, key), (states.context_value, value))
    )
    mask = torch.cat([layout.copy_context_mask, layout.copy_mask], dim=2).flatten(0, 1)[:, None, None]
    mask = mask.expand(-1, -1, layout.bucket.copy_tokens, -1)
    return _one_row_again(F.scaled_dot_product_attention(query, keys, values, mask, scale=scaling), num_copies)


def copy_attention(attn_implementation: str) -> Callable[..., torch.Tensor]:
    """The function for one of Transformers' names; all but `"eager"` take SDPA."""
    return eager_copy_attention if attn_implementation == "eager" else sdpa_copy_attention
