# Copyright 2026 The AlphaGRPO-Ext Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Attention of noised copies: each sees the context of its row and itself, so no mask of all pairs is needed.

A packed row is a context, and copies of images that nobody else sees. Computed as one sequence, most pairs of its tokens
would be masked out. Here the context attends to itself, and every copy to the context and to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F

from alphagrpo_ext.models.bagel.packing_bagel import PADDING_BLOCK, visibility_mask


NUM_DELIMITERS = 2
"""Tokens of a copy that belong to the understanding expert."""


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

    @classmethod
    def joined(cls, parts: Sequence[ContextStates]) -> ContextStates:
        """The rows of all parts, the contexts of which are padded to the same length."""
        return cls(
            keys=[torch.cat(keys) for keys in zip(*(part.keys for part in parts), strict=True)],
            values=[torch.cat(values) for values in zip(*(part.values for part in parts), strict=True)],
        )


@dataclass(frozen=True)
class PackedLayout:
    """
    Contexts and their copies, `copies` blocks of `copy_tokens` tokens a row. In the tensors of both experts the context
    comes first, and then copy by copy. Masks are bool until [`additive`] is called.

    Args:
        context_positions (`torch.Tensor` of shape `(rows, context)`): Rotary positions, understanding tokens first.
        copy_positions (`torch.Tensor` of shape `(rows, copies, copy_tokens)`): The same of copies, delimiters first.
        context_mask (`torch.Tensor` of shape `(rows, context, context)`): Which tokens of the context see which.
        copy_context_mask (`torch.Tensor` of shape `(rows, copies, context)`): What a copy sees of the context.
        copy_mask (`torch.Tensor` of shape `(rows, copies, copy_tokens)`): What a copy sees of itself: all but padding.
        states ([`ContextStates`], *optional*):
            Keys and values of the contexts, if they were computed before. The rows then hold copies alone.
    """

    context_positions: torch.Tensor
    copy_positions: torch.Tensor
    context_mask: torch.Tensor
    copy_context_mask: torch.Tensor
    copy_mask: torch.Tensor
    states: ContextStates | None = None

    @classmethod
    def of(cls, positions: torch.Tensor, blocks: torch.Tensor, num_und: int, copy_mask: torch.Tensor) -> PackedLayout:
        """
        Args:
            positions, blocks (`torch.Tensor` of shape `(rows, tokens)`): As [`pack_trajectories`] gives them.
            num_und (`int`): How many of the tokens are the understanding expert's.
            copy_mask (`torch.Tensor` of shape `(rows, copies, latents)`): False on padding.
        """
        rows, num_copies, num_latents = copy_mask.shape
        context_und = num_und - NUM_DELIMITERS * num_copies
        context_gen = positions.shape[1] - num_copies * num_latents

        def context(attribute: torch.Tensor) -> torch.Tensor:
            return torch.cat([attribute[:, :context_und], attribute[:, num_und:context_gen]], dim=1)

        context_positions, context_blocks = context(positions), context(blocks)
        copy_blocks = blocks[:, context_und:num_und:NUM_DELIMITERS]
        copy_positions = positions[:, context_und:num_und:NUM_DELIMITERS]
        is_earlier = context_blocks[:, None] < copy_blocks[:, :, None]
        return cls(
            context_positions=context_positions,
            copy_positions=copy_positions[:, :, None].expand(-1, -1, NUM_DELIMITERS + num_latents),
            context_mask=visibility_mask(
                context_positions, context_blocks, torch.zeros_like(context_blocks, dtype=torch.bool)
            ),
            copy_context_mask=is_earlier & (context_blocks != PADDING_BLOCK)[:, None],
            copy_mask=F.pad(copy_mask, (NUM_DELIMITERS, 0), value=True),
        )

    def additive(self, dtype: torch.dtype) -> PackedLayout:
        """With masks that are added to scores."""
        names = ("context_mask", "copy_context_mask", "copy_mask")
        return replace(self, **{name: additive_mask(getattr(self, name), dtype) for name in names})

    @property
    def num_copies(self) -> int:
        return self.copy_mask.shape[1]

    @property
    def copy_tokens(self) -> int:
        """Tokens of a copy, delimiters included."""
        return self.copy_mask.shape[2]

    @cached_property
    def token_context_mask(self) -> torch.Tensor:
        """`copy_context_mask` for every token of a copy, `(rows, 1, copies * copy_tokens, context)`: once for all layers."""
        return self.copy_context_mask.repeat_interleave(self.copy_tokens, dim=1)[:, None]

    def split(self, und: torch.Tensor, gen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        From the experts' tokens `(rows, tokens, ...)` to the context's, understanding first, and the copies'
        `(rows, copies * copy_tokens, ...)`, delimiters first in each.
        """
        num_und = und.shape[1] - NUM_DELIMITERS * self.num_copies
        num_gen = gen.shape[1] - (self.copy_tokens - NUM_DELIMITERS) * self.num_copies
        copies = [x.unflatten(1, (self.num_copies, -1)) for x in (und[:, num_und:], gen[:, num_gen:])]
        return torch.cat([und[:, :num_und], gen[:, :num_gen]], dim=1), torch.cat(copies, dim=2).flatten(1, 2)

    def merge(self, context: torch.Tensor | None, copies: torch.Tensor, num_und: int) -> tuple[torch.Tensor, ...]:
        """Inverse of [`split`]; `num_und` counts the understanding expert's tokens."""
        und, gen = copies.unflatten(1, (self.num_copies, -1)).split(
            [NUM_DELIMITERS, self.copy_tokens - NUM_DELIMITERS], dim=2
        )
        und, gen = und.flatten(1, 2), gen.flatten(1, 2)
        if context is None:
            return und, gen
        num_und -= und.shape[1]
        return torch.cat([context[:, :num_und], und], dim=1), torch.cat([context[:, num_und:], gen], dim=1)


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


def eager_copy_attention(states: CopyStates, layout: PackedLayout, scaling: float) -> torch.Tensor:
    """
    Attention of copies over the context and themselves, written out. At a hundred tokens the fastest on a CPU.

    Args:
        states ([`CopyStates`]): Queries, keys and values.
        layout ([`PackedLayout`]): With additive masks.
        scaling (`float`): Factor of the scores.

    Returns:
        `torch.Tensor` of shape `(rows, heads, copies * copy_tokens, head_dim)`.
    """
    query, context_key, context_value, key, value = states
    (rows, heads, num_tokens, _), kv_heads = query.shape, key.shape[1]
    num_copies, context = layout.num_copies, context_key.shape[2]
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


def sdpa_copy_attention(states: CopyStates, layout: PackedLayout, scaling: float) -> torch.Tensor:
    """[`eager_copy_attention`] without its scores in memory."""
    dtype, repeats = states.value.dtype, states.query.shape[1] // states.key.shape[1]
    # Under autocast the norms of queries and keys leave them in fp32.
    query, *others = (x.to(dtype) for x in states)
    if repeats > 1:
        others = [x.repeat_interleave(repeats, dim=1) for x in others]
    attend = flash_on_cpu if query.device.type == "cpu" else concatenated
    return attend(CopyStates(query, *others), layout, scaling)


def flash_on_cpu(states: CopyStates, layout: PackedLayout, scaling: float) -> torch.Tensor:
    """[`sdpa_copy_attention`] of as many keys as queries, of one type, with keys of the context that no copy repeats."""
    mask = layout.copy_mask.flatten(0, 1)[:, None, None]
    return _FlashCopyAttention.apply(*states, layout.token_context_mask, mask, layout.num_copies, scaling)


def concatenated(states: CopyStates, layout: PackedLayout, scaling: float) -> torch.Tensor:
    """The same on any device, with the context's keys repeated before those of every copy."""
    num_copies = layout.num_copies
    query, key, value = (_one_copy_a_row(x, num_copies) for x in (states.query, states.key, states.value))
    keys, values = (
        torch.cat([context.repeat_interleave(num_copies, dim=0), own], dim=2)
        for context, own in ((states.context_key, key), (states.context_value, value))
    )
    mask = torch.cat([layout.copy_context_mask, layout.copy_mask], dim=2).flatten(0, 1)[:, None, None]
    mask = mask.expand(-1, -1, layout.copy_tokens, -1)
    return _one_row_again(F.scaled_dot_product_attention(query, keys, values, mask, scale=scaling), num_copies)


def copy_attention(attn_implementation: str) -> Callable[..., torch.Tensor]:
    """The function for one of Transformers' names; all but `"eager"` take SDPA."""
    return eager_copy_attention if attn_implementation == "eager" else sdpa_copy_attention
