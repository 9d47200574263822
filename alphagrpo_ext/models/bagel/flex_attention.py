# SPDX-License-Identifier: Apache-2.0

"""Flex attention for the packed forward: it skips the blocks of the mask that are empty, and stores no mask of all pairs.

Noised copies see the context and themselves, so most of a long row is empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from alphagrpo_ext.models.bagel.layout import sees


def visibility_block_mask(
    positions: torch.Tensor, blocks: torch.Tensor, horizons: torch.Tensor, rows: torch.Tensor | None = None
) -> BlockMask:
    """
    [`visibility_mask`] as a block mask.

    Args:
        positions, blocks, horizons (`torch.Tensor` of shape `(batch, tokens)`): Attributes that [`collate_rows`] gives.
        rows (`torch.Tensor` of shape `(batch, tokens)`, *optional*): Tells rows apart that follow each other.
    """
    batch, length = positions.shape
    rows = torch.zeros_like(blocks) if rows is None else rows

    def mask_mod(entry: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        attributes = (x[entry, query] for x in (positions, blocks, horizons))
        is_seen = sees(*attributes, positions[entry, key], blocks[entry, key])
        return is_seen & (rows[entry, query] == rows[entry, key])

    # Not compiled, it computes the mask of all pairs first.
    return create_block_mask(
        mask_mod,
        B=batch,
        H=None,
        Q_LEN=length,
        KV_LEN=length,
        device=positions.device,
        _compile=positions.device.type != "cpu",
    )


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
    Attention under a block mask, with the interface of Transformers' attention functions: compiled on an accelerator. On
    a CPU it is not compiled; and as flex attention has no backward there, SDPA gets the mask of all pairs.

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
