# SPDX-License-Identifier: Apache-2.0

"""
Number of floating-point operations of a computation. For BAGEL it is counted from shapes: linear layers, and attention to visible
tokens. For other families it is counted while the computation runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from alphagrpo_ext.models.bagel import BagelModel
from alphagrpo_ext.models.bagel.layout import PADDING_BLOCK, visibility_mask


def counted_flops(function: Callable[[], object]) -> int:
    """
    Operations of all matrix multiplications and convolutions of a call, padding and masked attention included. Fused attention of a
    CPU is not counted, so the model must have `attn_implementation="eager"`.
    """
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def linear_flops(module: torch.nn.Module) -> int:
    """Operations per token in all linear layers of a module: one multiplication and one addition per weight."""
    return sum(2 * layer.weight.numel() for layer in module.modules() if isinstance(layer, torch.nn.Linear))


def token_flops(model: BagelModel) -> int:
    """Operations per token in all layers of the decoder, without attention scores. Both experts have the same sizes."""
    return linear_flops(model.language_model.model.layers) // 2


def pair_flops(model: BagelModel) -> int:
    """Operations per pair of a query and a visible key, in all layers: their score, and the weighted value."""
    config = model.config.text_config
    return 4 * config.hidden_size * config.num_hidden_layers


def training_flops(model: BagelModel, inputs: dict[str, torch.Tensor]) -> int:
    """
    Operations of forward and backward of a packed micro-batch. The backward counts as two forwards. Padding, pairs that do not see
    each other, and what an implementation computes twice do not count.

    Args:
        model ([`BagelModel`]): The model. Its vision tower is frozen and has no backward.
        inputs (`dict[str, torch.Tensor]`): Inputs of a [`PackedBatch`].
    """
    is_token = inputs["blocks"] != PADDING_BLOCK
    pairs = visibility_mask(*(inputs[name] for name in ("positions", "blocks", "horizons", "sequence_ids")))
    pairs &= is_token[:, None] & is_token[:, :, None]
    num_latents = (is_token[:, inputs["input_ids"].shape[1] :]).sum().item()
    forward = (
        is_token.sum().item() * token_flops(model)
        + pairs.sum().item() * pair_flops(model)
        + len(inputs["score_targets"]) * linear_flops(model.language_model.lm_head)
        + num_latents * (linear_flops(model.vae2llm) + linear_flops(model.llm2vae))
    )
    vision = inputs["vit_mask"].sum().item() if "vit_mask" in inputs else 0
    return 3 * forward + vision * (linear_flops(model.vit_model) + linear_flops(model.connector))


def denoising_flops(model: BagelModel, context_tokens: list[int], num_latents: int, num_steps: int) -> int:
    """
    Operations of denoising with cached contexts.

    Args:
        model ([`BagelModel`]): The model.
        context_tokens (`list[int]`): Cached tokens of every row. A row is one image in one guidance branch.
        num_latents (`int`): Latent tokens per image.
        num_steps (`int`): Number of steps that evaluate all rows.
    """
    tokens = num_latents + 2
    pairs = sum(tokens * (context + tokens) for context in context_tokens)
    row_flops = tokens * token_flops(model) + num_latents * (linear_flops(model.vae2llm) + linear_flops(model.llm2vae))
    return num_steps * (len(context_tokens) * row_flops + pairs * pair_flops(model))
