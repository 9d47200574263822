# SPDX-License-Identifier: Apache-2.0

"""What runs have measured, read from their files, and its notation in cells."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from alphagrpo_ext.files import read_json_lines
from reward_models.evaluation.statistics import standard_error


ERRORS_NOTE = "`+-` is the standard error over prompts of one run; a second one, after `sd`, the standard deviation between seeds."


def percent(value: float, error: float | None = None) -> str:
    """A share as `50.0%`, with its standard error if there is one: `50.0% +- 1.6`."""
    return f"{100 * value:.1f}%{_margin(error, 100, 1)}"


def points(value: float, error: float | None = None) -> str:
    """A difference of two shares in percentage points, as `+20.4`, with its standard error if there is one."""
    return f"{100 * value:+.1f}{_margin(error, 100, 1)}"


def decimals(value: float, error: float | None = None) -> str:
    """A reward as `0.781`, with its standard error if there is one."""
    return f"{value:.3f}{_margin(error, 1, 3)}"


def _margin(error: float | None, factor: float, digits: int) -> str:
    return "" if error is None else f" +- {factor * error:.{digits}f}"


def over_seeds(values: Sequence[float], notation: Callable[[float], str], factor: float = 100, digits: int = 1) -> str:
    """
    The mean of one value per seed, with their standard deviation where there are several.

    Args:
        values (`Sequence[float]`): The values.
        notation (`Callable[[float], str]`): Notation of the mean.
        factor (`float`, *optional*, defaults to `100`), digits (`int`, *optional*, defaults to `1`): Those of the deviation.
    """
    spread = f" (sd {factor * stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{notation(fmean(values))}{spread}"


def rewards_over_seeds(values: Sequence[float]) -> str:
    """[`over_seeds`] of rewards."""
    return over_seeds(values, decimals, 1, 3)


def read_summary(folder: Path) -> dict[str, Any]:
    """The scores before and after training."""
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class ScoredSamples:
    """
    Samples of one evaluation.

    Args:
        rows (`list[dict]`): Lines of `samples.jsonl` whose image has a score.
    """

    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> dict[str, ScoredSamples]:
        """The samples of an evaluation by mode, in the order in which images are made."""
        found: dict[str, list[dict[str, Any]]] = {}
        for _, row in read_json_lines(folder / "samples.jsonl"):
            if row["reward"] is not None:
                found.setdefault(row["mode"], []).append(row)
        return {mode: cls(rows) for mode, rows in found.items()}

    @cached_property
    def by_noise(self) -> dict[tuple[int, int], dict[str, Any]]:
        """The samples by prompt and noise seed."""
        return {(row["prompt_index"], row["noise_seed"]): row for row in self.rows}

    def category(self, name: str) -> ScoredSamples:
        """The samples of one category of prompts, which may be none."""
        return ScoredSamples([row for row in self.rows if row["category"] == name])

    def mean(self, metric: str) -> float:
        """The mean of a number, without samples that do not have it."""
        return fmean(float(row[metric]) for row in self.rows if row[metric] is not None)

    def error(self, metric: str) -> float | None:
        """The standard error of [`mean`] over prompts."""
        rows = [row for row in self.rows if row[metric] is not None]
        return standard_error([row["prompt_index"] for row in rows], [float(row[metric]) for row in rows])

    def gain(self, before: ScoredSamples) -> tuple[float, float | None]:
        """How much more of the images pass strictly than of those of the same prompts and noise, with its error."""
        pairs = [(key, row) for key, row in self.by_noise.items() if key in before.by_noise]
        changes = [float(row["strict_pass"]) - float(before.by_noise[key]["strict_pass"]) for key, row in pairs]
        return fmean(changes), standard_error([index for (index, _), _ in pairs], changes)
