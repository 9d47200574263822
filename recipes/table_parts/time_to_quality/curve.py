# SPDX-License-Identifier: Apache-2.0

"""Learning curves: quality after seconds of training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


CURVE_NAME = "curve.json"
"""File of a learning curve."""


@dataclass(frozen=True)
class CurvePoint:
    """
    A policy on its way through training.

    Args:
        step (`int`): Optimizer steps done.
        seconds (`float`): CPU seconds that they took.
        strict_pass_rate, reward (`float`): What the policy reaches on held-out prompts.
    """

    step: int
    seconds: float
    strict_pass_rate: float
    reward: float


def read_curve(folder: Path) -> list[CurvePoint]:
    """The points of a run of `learning_curve.py`, the first one before training."""
    return [CurvePoint(**point) for point in json.loads((folder / CURVE_NAME).read_text(encoding="utf-8"))]


def seconds_until(curve: Sequence[CurvePoint], rate: float) -> float:
    """Seconds until a curve first reaches a strict pass rate, linear between its points; infinite if it never does."""
    if curve[0].strict_pass_rate >= rate:
        return curve[0].seconds
    for before, after in zip(curve, curve[1:], strict=False):
        if after.strict_pass_rate >= rate:
            share = (rate - before.strict_pass_rate) / (after.strict_pass_rate - before.strict_pass_rate)
            return before.seconds + share * (after.seconds - before.seconds)
    return float("inf")
