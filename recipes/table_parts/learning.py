# SPDX-License-Identifier: Apache-2.0

"""Tables of `reasoning_t2i.py`: what is trained, and with which other settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from alphagrpo_ext.shapes.prompts import CATEGORIES
from table_parts.objectives.table import REFERENCE_ARGUMENTS
from table_parts.plan import Plan, Run
from table_parts.results import (
    ERRORS_NOTE,
    decimals,
    over_seeds,
    percent,
    points,
    read_summary,
    rewards_over_seeds,
)
from table_parts.tables import MeasuredRow, MeasuredTable, one_line


LORA_ARGUMENTS = ("--use_peft", "--lora_r", "32", "--lora_alpha", "64", "--learning_rate", "5e-4")
LORA_AVERAGE_ARGUMENTS = ("--image_beta", "0.01", "--image_kl_type", "velocity", *REFERENCE_ARGUMENTS, "0.1")
OTHER_SETTINGS = {
    "kl_mean": ("", ("--image_beta", "0.01", "--image_kl_type", "mean")),
    "kl_velocity": ("", ("--image_beta", "0.1", "--image_kl_type", "velocity")),
    "lora": ("", LORA_ARGUMENTS),
    "lora_average": (f"the same, `{' '.join(LORA_AVERAGE_ARGUMENTS)}`", (*LORA_ARGUMENTS, *LORA_AVERAGE_ARGUMENTS)),
    "detached": ("", ("--context_gradient", "detached")),
}
"""Other settings. A label that is empty is the arguments themselves."""
SOLVER_ARGUMENTS = ("--ode_solver", "ab2", "--ode_steps", "3")
BRANCH_ARGUMENTS = ("--branches_per_thought", "2")


def training_table(plan: Plan) -> MeasuredTable:
    """What is trained: text and image, or one of them."""
    parts = {
        "text and image (the default)": plan.default_reasoning(),
        "text and image, 80 steps": plan.short_reasoning(),
        "image only, 80 steps": plan.short_reasoning("image_only", "--text_loss_weight", "0"),
        "text only, 80 steps": plan.short_reasoning("text_only", "--image_loss_weight", "0"),
    }
    return MeasuredTable(
        "Training: text and image",
        ("updates", *(f"seed {seed}" for seed in plan.seeds), "mean strict pass", "mean reward"),
        tuple(one_line(label, runs, _gains) for label, runs in parts.items()),
        f"Seeds: points of strict pass gained. {ERRORS_NOTE}",
    )


def _gains(folders: Sequence[Path]) -> list[str]:
    summaries = [read_summary(folder) for folder in folders]
    before, after = ([summary[moment] for summary in summaries] for moment in ("before", "after"))
    changes = [_gain(summary) for summary in summaries]
    return [
        *(points(change, summary["gain_error"]) for change, summary in zip(changes, summaries, strict=True)),
        f"{percent(_mean(before, 'strict_pass_rate'))} → **{percent(_mean(after, 'strict_pass_rate'))}** "
        f"({over_seeds(changes, points)} points)",
        f"{_mean(before, 'reward'):.3f} → {rewards_over_seeds([part['reward'] for part in after])}",
    ]


def _gain(summary: dict[str, Any]) -> float:
    return summary["after"]["strict_pass_rate"] - summary["before"]["strict_pass_rate"]


def _mean(parts: Sequence[dict[str, Any]], name: str) -> float:
    return fmean(part[name] for part in parts)


def categories_table(plan: Plan) -> MeasuredTable:
    """The default by category."""
    return MeasuredTable(
        "Training: the default by category",
        ("category", "strict pass before", "after", "reward before", "after"),
        (MeasuredRow("categories", plan.default_reasoning(), _categories),),
        f"Seeds: {', '.join(map(str, plan.seeds))}. Means over seeds, with their standard deviation.",
    )


def _categories(folders: Sequence[Path]) -> list[list[str]]:
    summaries = [read_summary(folder) for folder in folders]
    lines = []
    for name in CATEGORIES:
        # A short evaluation does not have all of them.
        found = [s for s in summaries if name in s["before"]["categories"]]
        before, after = ([summary[m]["categories"][name] for summary in found] for m in ("before", "after"))
        if found:
            rates = [[part["strict_pass_rate"] for part in parts] for parts in (before, after)]
            rewards = [[part["reward"] for part in parts] for parts in (before, after)]
            lines.append([name, *(over_seeds(r, percent) for r in rates), *map(rewards_over_seeds, rewards)])
    return lines


def settings_table(plan: Plan) -> MeasuredTable:
    """Other settings, one run each."""
    first = plan.seeds[:1]
    rows = {
        label or f"`{' '.join(words)}`": plan.short_reasoning(n, *words, seeds=first)
        for n, (label, words) in OTHER_SETTINGS.items()
    }
    return _one_seed_table(plan, "Other settings", rows)


def cheaper_training_table(plan: Plan) -> MeasuredTable:
    """Training with fewer network evaluations in rollouts."""
    first = plan.seeds[:1]
    rows = {
        f"`{' '.join(words)}`": plan.short_reasoning(name, *words, seeds=first)
        for name, words in {
            "solver": SOLVER_ARGUMENTS,
            "branches": BRANCH_ARGUMENTS,
            "solver_branches": (*SOLVER_ARGUMENTS, *BRANCH_ARGUMENTS),
        }.items()
    }
    return _one_seed_table(plan, "Training with fewer network evaluations", rows)


def _one_seed_table(plan: Plan, title: str, rows: dict[str, tuple[Run, ...]]) -> MeasuredTable:
    default = plan.short_reasoning(seeds=plan.seeds[:1])
    return MeasuredTable(
        f"{title}, 80 steps, seed {plan.seeds[0]}",
        ("setting", "strict pass", "reward"),
        (
            one_line("untrained", default, lambda folders: _moment(folders, "before")),
            one_line("the recipe's default", default, lambda folders: _moment(folders, "after")),
            *(one_line(label, runs, lambda folders: _moment(folders, "after")) for label, runs in rows.items()),
        ),
        "`+-` is the standard error over prompts. Seeds differ by more, so one run each is no ranking.",
    )


def _moment(folders: Sequence[Path], name: str) -> list[str]:
    (part,) = (read_summary(folder)[name] for folder in folders)
    return [
        percent(part["strict_pass_rate"], part["strict_pass_error"]),
        decimals(part["reward"], part["reward_error"]),
    ]
