# SPDX-License-Identifier: Apache-2.0

"""Tables of `self_reflection.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from table_parts.plan import Plan, Run
from table_parts.results import over_seeds, percent, points, read_summary
from table_parts.tables import MeasuredTable, one_line


UNWEIGHTED = ("--text_loss_weight", "1")
FROM_THE_IMAGE = ("--refine_strength", "0.9", "--sde_window_range", "1", "6")


def reflection_table(plan: Plan) -> MeasuredTable:
    """What refinement adds to an image, before and after training."""
    default = plan.default_reflection()
    seeds = [one_line(f"trained, seed {s}", [run], _after) for s, run in zip(plan.seeds, default, strict=True)]
    return MeasuredTable(
        "Self-reflection",
        (
            "policy",
            "reward of initial → refined image",
            "strict pass",
            "improved / worsened / unchanged",
            "fixed",
            "broken",
        ),
        (
            one_line("untrained", default[:1], lambda folders: _refinement([read_summary(folders[0])["before"]])),
            *seeds,
            one_line("**trained, mean of the seeds**", default, _after),
            one_line(
                "`--rectification off`, mean of the seeds",
                plan.reflection("reflection_unrectified", "--rectification", "off"),
                _after,
            ),
        ),
        "In brackets the gain in points: `+-` is its standard error over prompts where the row is of one run, `sd` the standard "
        "deviation between seeds.",
    )


def _after(folders: Sequence[Path]) -> list[str]:
    return _refinement([read_summary(folder)["after"] for folder in folders])


def _refinement(parts: Sequence[dict[str, Any]]) -> list[str]:
    def mean(*names: str) -> float:
        values = []
        for part in parts:
            for name in names:
                part = part[name]
            values.append(part)
        return fmean(values)

    changes = "/".join(f" {percent(mean(name))} " for name in ("improved", "worsened", "unchanged")).strip()
    return [
        f"{mean('initial', 'reward'):.3f} → {mean('refined', 'reward'):.3f}",
        f"{percent(mean('initial', 'strict_pass_rate'))} → {percent(mean('refined', 'strict_pass_rate'))} ({_gain_of(parts)})",
        changes,
        percent(mean("fixed")),
        percent(mean("broken")),
    ]


def _gain_of(parts: Sequence[dict[str, Any]]) -> str:
    gains = [part["refined"]["strict_pass_rate"] - part["initial"]["strict_pass_rate"] for part in parts]
    return points(gains[0], parts[0]["gain_error"]) if len(parts) == 1 else over_seeds(gains, points)


def reflection_settings_table(plan: Plan) -> MeasuredTable:
    """How the gain of refinement depends on settings."""
    last, ends = plan.seeds[-1:], list(dict.fromkeys([plan.seeds[0], plan.seeds[-1]]))
    settings: dict[str, tuple[Run, ...]] = {
        "text loss weight 1, learning rate 5e-5": plan.reflection("reflection_weight_1", *UNWEIGHTED),
        "the same at 2e-5": plan.reflection("reflection_rate_2", *UNWEIGHTED, "--learning_rate", "2e-5", seeds=last),
        "the same at 3e-5, groups of 16": plan.reflection(
            "reflection_groups_16", *UNWEIGHTED, "--learning_rate", "3e-5", "--num_generations", "16", seeds=last
        ),
        "weight 1, every second prompt a reasoning text-to-image": plan.reflection(
            "reflection_mixed", *UNWEIGHTED, "--train_tasks", "self_reflection", "reasoning_t2i", seeds=ends
        ),
        "text loss weight 0.05": plan.reflection("reflection_weight_0.05", "--text_loss_weight", "0.05", seeds=last),
        "`--refine_strength 0.9`": plan.reflection("reflection_strength", *FROM_THE_IMAGE, seeds=last),
        "the recipe's, with text loss weight 0": plan.default_reflection(),
    }
    return MeasuredTable(
        "Self-reflection: settings",
        ("setting", "seeds", "gain"),
        tuple(
            one_line(label, runs, lambda folders: [", ".join(map(_seed, folders)), ", ".join(map(_own_gain, folders))])
            for label, runs in settings.items()
        ),
        "Gain: strict pass of the refined minus that of the initial image, in points, with its standard error over prompts.",
    )


def _own_gain(folder: Path) -> str:
    return _gain_of([read_summary(folder)["after"]])


def _seed(folder: Path) -> str:
    return folder.name.rpartition("-seed")[2]
