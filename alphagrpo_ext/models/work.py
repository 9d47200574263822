# SPDX-License-Identifier: Apache-2.0

"""How much a policy computes: tokens pushed through its network, by kind, counted where the network is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from alphagrpo_ext.flow.guidance import guidance_branches


KINDS = ("prefill", "decode", "denoise", "scoring", "training")
"""
What the network is called for: reading contexts, writing text, predicting velocities, scoring trajectories without a
gradient (for old and reference policies), and with one.
"""


class Counted(Protocol):
    """A model that counts its work where it is told to."""

    work: WorkCounter | None


@dataclass
class WorkCounter:
    """
    Counts the work of one process, within [`~WorkCounter.of`]. What a policy does as its own judge does not count.

    Tokens are those that somebody asked for, delimiters included; places that pad a batch are counted on their own, so
    that what a batch wastes is seen as well.

    Args:
        tokens (`Counter[str]`): Tokens of each of [`KINDS`]; those of `denoise` by guidance branch, `"denoise/full"`.
        evaluations (`Counter[str]`): Calls of the network, of each of [`KINDS`].
        padding (`int`): Places beside these tokens that the network was run on.
    """

    tokens: Counter[str] = field(default_factory=Counter)
    evaluations: Counter[str] = field(default_factory=Counter)
    padding: int = 0

    def count(self, kind: str, num_tokens: int, num_places: int, num_evaluations: int = 1) -> None:
        """
        Calls of the network.

        Args:
            kind (`str`): One of [`KINDS`].
            num_tokens (`int`): Tokens that belong to a sample.
            num_places (`int`): Places of the batches, padding included.
            num_evaluations (`int`, *optional*, defaults to `1`): Calls.
        """
        self.tokens[kind] += num_tokens
        self.evaluations[kind] += num_evaluations
        self.padding += num_places - num_tokens

    def count_denoising(self, branches: Sequence[str], num_samples: int, num_tokens: int) -> None:
        """One denoising step of `num_samples` images of `num_tokens` each, in all of `branches` at once."""
        for branch in branches:
            self.tokens[f"denoise/{branch}"] += num_samples * num_tokens
        self.evaluations["denoise"] += 1

    def metrics(self) -> dict[str, float]:
        """Everything by the names that it is logged under; what did not occur is 0, so that the names never change."""
        branches = guidance_branches(text_scale=2.0, image_scale=2.0)
        kinds = [kind for kind in KINDS if kind != "denoise"]
        return {
            **{f"work/{kind}_tokens": float(self.tokens[kind]) for kind in kinds},
            **{f"work/denoise_tokens/{branch}": float(self.tokens[f"denoise/{branch}"]) for branch in branches},
            **{f"work/network_evaluations/{kind}": float(self.evaluations[kind]) for kind in KINDS},
            "work/padding_tokens": float(self.padding),
        }

    @contextmanager
    def of(self, *models: Counted) -> Iterator[None]:
        """In this context, the work of `models` is counted here."""
        for model in models:
            model.work = self
        try:
            yield
        finally:
            for model in models:
                model.work = None

    def clear(self) -> None:
        """Begin anew."""
        self.tokens.clear()
        self.evaluations.clear()
        self.padding = 0
