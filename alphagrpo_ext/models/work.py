# SPDX-License-Identifier: Apache-2.0

"""
Work of a policy: counts of the tokens that its network is run on, by kind, and how much of it one forward of an update has.
The model counts tokens where it calls the network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol


KINDS = ("prefill", "decode", "denoise", "scoring", "training")
"""
Purposes of calls of the network: reading contexts, writing text, predicting velocities, scoring trajectories without
gradient (for old and reference policies), and scoring them with gradient.
"""
MIN_FORWARD_TOKENS = 2048
"""
Noised tokens that a forward of trained steps has at least, unless there are fewer. Each backward adds to the gradient of all
weights, however few its tokens are. From this number on, that takes a few percent of its time.
"""
MIN_FORWARD_TOKENS_FP32 = 512
"""The same for a policy that computes in fp32, where a token takes longer and adding to the gradients does not."""
MIN_FORWARD_TOKENS_ADAPTERS = 1280
"""
The same where adapters are trained and the policy does not compute in fp32. The products with their narrow factors take a larger share
of the time when tokens are few.
"""
MIN_FORWARD_WORK = 10**10
"""
Products of a token with a weight that such a forward has at least, unless there are fewer. Below it, calling the operations takes a
noticeable share of the time, and the activations of all steps are small.
"""


def min_forward_tokens(is_fp32: bool, trains_adapters: bool) -> int:
    """
    Noised tokens that a forward of trained steps has at least.

    Args:
        is_fp32 (`bool`): Whether the policy computes in fp32: weights in fp32, and no autocast.
        trains_adapters (`bool`): Whether only adapters of the weights are trained.
    """
    if is_fp32:
        return MIN_FORWARD_TOKENS_FP32
    return MIN_FORWARD_TOKENS_ADAPTERS if trains_adapters else MIN_FORWARD_TOKENS


def balanced_steps(num_steps: int, tokens_per_step: int, num_weights: int, min_tokens: int) -> int:
    """
    How many trained steps of a window to put into one forward, so that its activations are small and its work is large
    enough to be computed fast. Forwards of a window have nearly as many steps each.

    Args:
        num_steps (`int`): Trained steps K of the window, at least 1.
        tokens_per_step (`int`): Noised tokens per step, of all images of the micro-batch in all guidance branches.
        num_weights (`int`): Weights that every noised token is multiplied with.
        min_tokens (`int`): Noised tokens of a forward, at least; see [`min_forward_tokens`].
    """
    least = max(min_tokens, MIN_FORWARD_WORK / max(num_weights, 1))
    num_forwards = min(num_steps, max(1, int(num_steps * tokens_per_step / least)))
    return -(-num_steps // num_forwards)


class Counted(Protocol):
    """A model that counts its work in the counter that it is given."""

    work: WorkCounter | None


@dataclass
class WorkCounter:
    """
    Counts the work of one process within [`~WorkCounter.of`]. The work of a policy as its own judge does not count.

    Tokens are those of samples, delimiters included. Places that pad a batch are counted separately, and show how much
    of the batch is wasted.

    Args:
        branches (`tuple[str, ...]`, *optional*, defaults to `("full",)`): Guidance branches of the model's family.
        tokens (`Counter[str]`):
            Tokens of each of [`KINDS`]. Those of `denoise` are counted by guidance branch, e.g. `"denoise/full"`.
        evaluations (`Counter[str]`): Calls of the network for each of [`KINDS`].
        padding (`int`): Further places that the network was run on.
    """

    branches: tuple[str, ...] = ("full",)
    tokens: Counter[str] = field(default_factory=Counter)
    evaluations: Counter[str] = field(default_factory=Counter)
    padding: int = 0

    def count(self, kind: str, num_tokens: int, num_places: int, num_evaluations: int = 1) -> None:
        """
        Count calls of the network.

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
        """Count one denoising step of `num_samples` images of `num_tokens` each, in all of `branches` at once."""
        for branch in branches:
            self.tokens[f"denoise/{branch}"] += num_samples * num_tokens
        self.evaluations["denoise"] += 1

    def metrics(self) -> dict[str, float]:
        """All counts by the names that they are logged under. The names never change: what did not occur is 0."""
        kinds = [kind for kind in KINDS if kind != "denoise"]
        return {
            **{f"work/{kind}_tokens": float(self.tokens[kind]) for kind in kinds},
            **{f"work/denoise_tokens/{branch}": float(self.tokens[f"denoise/{branch}"]) for branch in self.branches},
            **{f"work/network_evaluations/{kind}": float(self.evaluations[kind]) for kind in KINDS},
            "work/padding_tokens": float(self.padding),
        }

    @contextmanager
    def of(self, *models: Counted) -> Iterator[None]:
        """Count the work of `models` here for the time of the block."""
        for model in models:
            model.work = self
        try:
            yield
        finally:
            for model in models:
                model.work = None

    def take(self) -> dict[str, float]:
        """The counts as in `metrics`; they start again from 0."""
        metrics = self.metrics()
        self.tokens.clear()
        self.evaluations.clear()
        self.padding = 0
        return metrics
