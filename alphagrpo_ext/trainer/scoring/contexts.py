# SPDX-License-Identifier: Apache-2.0

"""Contexts that run once for all parts of a window, and the one backward through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alphagrpo_ext.models.contract import PackedBatch, PackedOutput, ReadContexts
from alphagrpo_ext.trainer.scoring.scores import PackedScores


@dataclass
class PartContexts:
    """
    What the noised latents of one part read.

    Args:
        batch ([`PackedBatch`]): The noised latents.
        contexts ([`ReadContexts`]): Their contexts.
        scores ([`PackedScores`]): Of the texts in the contexts.
    """

    batch: PackedBatch
    contexts: ReadContexts
    scores: PackedScores


class SharedContexts:
    """
    Contexts that were run once, for the parts of a window.

    Args:
        scores ([`PackedScores`]): Of their texts.
        output ([`PackedOutput`]): Of the forward over them, with their `states`.
        copies (`Sequence[PackedBatch]`): The noised latents of every part.
    """

    def __init__(self, scores: PackedScores, output: PackedOutput, copies: Sequence[PackedBatch]) -> None:
        self.scores = scores
        self.output = output
        self.copies = copies
        self.leaves = [state.detach().requires_grad_(state.requires_grad) for state in output.states]

    def part(self, index: int) -> PartContexts:
        """
        Contexts for a part. Those of part 0 have the graph of their forward, and its backward takes along the gradients
        that the backwards of other parts left. It comes last.
        """
        states = self.leaves if index else _JoinGradients.apply(self.leaves, *self.output.states)
        contexts = ReadContexts(self.output.log_probs, self.output.entropies, states)
        return PartContexts(self.copies[index], contexts, self.scores)


class _JoinGradients(torch.autograd.Function):
    """Tensors as they are. The backward adds the gradients of leaves, which may have been scaled, to those of the tensors."""

    @staticmethod
    def forward(ctx, leaves: list[torch.Tensor], *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.leaves = leaves
        ctx.set_materialize_grads(False)
        return tuple(state.view_as(state) for state in states)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        joined = []
        for leaf, gradient in zip(ctx.leaves, gradients, strict=True):
            present = [g for g in (leaf.grad, gradient) if g is not None]
            joined.append(sum(present[1:], present[0]) if present else None)
            leaf.grad = None
        return None, *joined
