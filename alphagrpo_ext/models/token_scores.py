# SPDX-License-Identifier: Apache-2.0

"""Log-probabilities of tokens, computed in chunks so that the logits of all tokens are never in memory at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


MAX_LOGITS = 2**25
"""Number of logits that are in memory at once: 128 MiB in fp32, or 220 tokens with a vocabulary of 152,000."""


def score_tokens(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
    temperature: float | torch.Tensor = 1.0,
    max_logits: int = MAX_LOGITS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of `targets` and entropies of their distributions, in chunks of tokens.

    The backward recomputes the logits of a chunk, so that only hidden states are kept. A single chunk is not
    recomputed.

    Args:
        head (`Callable`): Maps hidden states `(n, hidden)` to logits `(n, vocab_size)`.
        hidden_states (`torch.Tensor` of shape `(tokens, hidden)`): Inputs of the head.
        targets (`torch.Tensor` of shape `(tokens,)`): Token ids.
        vocab_size (`int`): Number of logits per token.
        temperature (`float` or `torch.Tensor` of shape `(tokens,)`, *optional*, defaults to `1.0`):
            Divides the logits of all tokens, or of each.
        max_logits (`int`, *optional*, defaults to [`MAX_LOGITS`]):
            Largest number of logits in a chunk, which has at least one token.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Log-probabilities and entropies `(tokens,)`, in nats, fp32.
    """

    divisors = temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature

    def score(
        states: torch.Tensor, ids: torch.Tensor, divisor: float | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs = (head(states).float() / divisor).log_softmax(dim=-1)
        entropies = -(log_probs.exp() * log_probs).sum(dim=-1)
        return log_probs.gather(-1, ids[:, None]).squeeze(-1), entropies

    chunk_size = max(1, max_logits // vocab_size)
    if len(targets) <= chunk_size:
        return score(hidden_states, targets, divisors)
    chunks = hidden_states.split(chunk_size), targets.split(chunk_size)
    shared = not isinstance(divisors, torch.Tensor)
    divisors = [divisors] * len(chunks[0]) if shared else divisors.split(chunk_size)
    parts = [
        checkpoint(score, states, ids, divisor, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else score(states, ids, divisor)
        for states, ids, divisor in zip(*chunks, divisors, strict=True)
    ]
    log_probs, entropies = zip(*parts, strict=True)
    return torch.cat(log_probs), torch.cat(entropies)
