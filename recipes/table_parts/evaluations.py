# SPDX-License-Identifier: Apache-2.0

"""Tables of `evaluate.py` and `fewer_evaluations.py`: guidance, rounds of refinement, editing, and the costs of sampling."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from alphagrpo_ext.shapes.editing import EDITS
from table_parts.fewer_evaluations import COSTS_NAME
from table_parts.plan import Plan, Run
from table_parts.results import ScoredSamples, decimals, over_seeds, percent, rewards_over_seeds
from table_parts.tables import MeasuredRow, MeasuredTable, one_line


GUIDANCE_ARGUMENTS = ("--cfg_text_scale", "2", "--cfg_interval", "0", "1")
NUM_MEASURED_ROUNDS = 3


def guidance_table(plan: Plan) -> MeasuredTable:
    """Training and evaluation with and without guidance."""
    seeds = plan.seeds[:2]
    trained: dict[str, Sequence[Run | None]] = {
        "not at all": [None],
        "without guidance": plan.short_reasoning(seeds=seeds),
        "with guidance": plan.short_reasoning("guided", *GUIDANCE_ARGUMENTS, seeds=seeds),
    }
    rows = []
    for label, models in trained.items():
        plain, guided = ([_guided_evaluation(plan, model, scale) for model in models] for scale in ("1", "2"))
        rows.append(one_line(label, [*plain, *guided], _guidance))
    return MeasuredTable(
        "Guidance",
        ("trained", "evaluated without guidance", "with guidance"),
        tuple(rows),
        f"Strict pass after 80 steps, seeds {', '.join(map(str, seeds))}; `+-` is the standard error over prompts.",
    )


def _guided_evaluation(plan: Plan, model: Run | None, scale: str) -> Run:
    words = ("--cfg_interval", "0", "1", "--cfg_text_scale", scale, "--temperature", "0.3")
    return plan.evaluation(f"guidance_{scale}", model, *words)


def _guidance(folders: Sequence[Path]) -> list[str]:
    rates = [percent(s.mean("strict_pass"), s.error("strict_pass")) for s in map(_thoughts, folders)]
    half = len(rates) // 2
    return [", ".join(rates[:half]), ", ".join(rates[half:])]


def _thoughts(folder: Path) -> ScoredSamples:
    """The images of an evaluation that has one mode."""
    (samples,) = ScoredSamples.read(folder).values()
    return samples


def rounds_table(plan: Plan) -> MeasuredTable:
    """Rounds of refinement after an image that was painted with a thought, which may end by the policy's words or not."""
    (trained,) = plan.default_reasoning(plan.seeds[:1])
    models = {"untrained": None, f"trained on reasoning text-to-image, seed {plan.seeds[0]}": trained}
    ways = {"": ("rounds", ()), ", may stop": ("stopping_rounds", ("--allow_stop",))}
    words = ("--num_rounds", str(NUM_MEASURED_ROUNDS))
    return MeasuredTable(
        "Rounds of refinement after a first image with a thought",
        ("strict pass after round", "0 (with thought)", *(str(turn) for turn in range(1, NUM_MEASURED_ROUNDS + 1))),
        tuple(
            one_line(
                f"{label}{way}",
                [plan.evaluation(name, model, *words, *stops, num_stages=NUM_MEASURED_ROUNDS + 1)],
                _rounds,
            )
            for label, model in models.items()
            for way, (name, stops) in ways.items()
        ),
        "`+-` is the standard error over prompts.",
    )


def _rounds(folders: Sequence[Path]) -> list[str]:
    return [
        f"{percent(s.mean('strict_pass'), s.error('strict_pass'))} (reward {s.mean('reward'):.3f})"
        for s in ScoredSamples.read(folders[0]).values()
    ]


def editing_table(plan: Plan) -> MeasuredTable:
    """Editing by models that reinforcement learning did not teach to edit."""
    seeds = "1 seed" if len(plan.seeds) == 1 else f"{len(plan.seeds)} seeds"
    models: dict[str, Sequence[Run | None]] = {
        "untrained": [None],
        f"trained on reasoning text-to-image, {seeds}": plan.default_reasoning(),
        f"trained on self-reflection, {seeds}": plan.default_reflection(),
    }
    return MeasuredTable(
        "Editing",
        ("editing, strict pass", *EDITS, "all", "reward"),
        tuple(
            one_line(label, [plan.evaluation("editing", run, "--task", "image_editing") for run in runs], _editing)
            for label, runs in models.items()
        ),
        "Means over seeds. `+-` is the standard error over prompts of one run, `sd` the standard deviation between seeds.",
    )


def _editing(folders: Sequence[Path]) -> list[str]:
    found = [_thoughts(folder) for folder in folders]
    groups = [[samples.category(edit) for samples in found] for edit in EDITS]
    cells = [percent(fmean(s.mean("strict_pass") for s in group)) if group[0].rows else "" for group in groups]
    if len(found) == 1:
        total = percent(found[0].mean("strict_pass"), found[0].error("strict_pass"))
        return [*cells, total, decimals(found[0].mean("reward"), found[0].error("reward"))]
    return [
        *cells,
        over_seeds([samples.mean("strict_pass") for samples in found], percent),
        rewards_over_seeds([samples.mean("reward") for samples in found]),
    ]


def solvers_table(plan: Plan) -> MeasuredTable:
    """Reward against the number of network evaluations, of an evaluation."""
    return _costs_table("Fewer network evaluations: evaluation", "solver", plan.costs("solvers", minutes=7.0))


def rollouts_table(plan: Plan) -> MeasuredTable:
    """Reward against the number of network evaluations, of rollouts."""
    return _costs_table("Fewer network evaluations: training rollouts", "rollout", plan.costs("rollouts", minutes=5.0))


def presets_table(plan: Plan) -> MeasuredTable:
    """Reward against the number of network evaluations, of rollouts of both tasks under every preset."""
    return _costs_table("Presets: training rollouts", "rollout", plan.costs("presets", minutes=20.0))


def _costs_table(title: str, first: str, run: Run) -> MeasuredTable:
    return MeasuredTable(
        title,
        (first, "images", "fewer", "reward", "paired difference", "strict pass", "spread"),
        (MeasuredRow(first, (run,), lambda folders: _costs(folders[0])),),
        "`images` counts evaluations of the network per sample. `+-` is the standard error of the paired difference, for rollouts "
        "over groups. `spread` is the mean standard deviation of rewards within a group.",
    )


def _costs(folder: Path) -> list[list[str]]:
    return [
        [
            row["name"],
            f"{row['images']:.2f}",
            f"{row['fewer']:.2f}x",
            f"{row['reward']:.4f}",
            f"{row['difference']:+.4f} +- {row['error']:.4f}",
            percent(row["strict_pass_rate"]),
            "" if row["spread"] is None else f"{row['spread']:.3f}",
        ]
        for row in json.loads((folder / COSTS_NAME).read_text(encoding="utf-8"))
    ]
