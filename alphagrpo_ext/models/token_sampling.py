# SPDX-License-Identifier: Apache-2.0

"""Sampling of one token per row from logits, for any model family."""

from __future__ import annotations

import torch


def filter_logits(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """
    Set the logits of all but the likeliest tokens to -inf.

    Args:
        logits (`torch.Tensor` of shape `(batch, vocabulary)`): Logits at the sampling temperature.
        top_k (`int`, *optional*, defaults to `0`): Number of tokens to keep; 0 keeps all.
        top_p (`float`, *optional*, defaults to `1.0`): Keep the smallest set with at least this probability.

    Returns:
        `torch.Tensor` of shape `(batch, vocabulary)`.
    """
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1.0:
        sorted_logits, order = logits.sort(dim=-1, descending=True)
        probabilities = sorted_logits.softmax(dim=-1)
        dropped = probabilities.cumsum(dim=-1) - probabilities >= top_p
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    return logits


def sample_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sample by inverting the cumulative distribution, so that a token depends on its own uniform number alone.

    Args:
        logits (`torch.Tensor` of shape `(batch, vocabulary)`): Raw logits.
        uniforms (`torch.Tensor` of shape `(batch,)`): Numbers in [0, 1).
        temperature (`float`, *optional*, defaults to `1.0`): 0 takes the likeliest token.
        top_k, top_p: See [`filter_logits`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Tokens `(batch,)` and their log-probabilities under the temperature alone.
    """
    logits = logits.float()
    if temperature > 0:
        logits = logits / temperature
        cumulative = filter_logits(logits, top_k, top_p).softmax(dim=-1).cumsum(dim=-1)
        # Scaled by the last entry, which rounding keeps from being exactly 1.
        tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    else:
        tokens = logits.argmax(dim=-1)
    return tokens, logits.log_softmax(dim=-1).gather(-1, tokens[:, None]).squeeze(-1)
