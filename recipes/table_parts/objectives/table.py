# SPDX-License-Identifier: Apache-2.0

"""Tables of objectives: at an equal number of steps, and at equal time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from table_parts.plan import SHORT_STEPS, Plan, Run
from table_parts.results import ERRORS_NOTE, over_seeds, percent, read_summary, rewards_over_seeds
from table_parts.tables import MeasuredRow, MeasuredTable, one_line


REFERENCE_ARGUMENTS = ("--sync_ref_model", "--ref_model_sync_steps", "1", "--ref_model_mixup_alpha")
NFT_ARGUMENTS = ("--image_objective", "diffusion_nft")
# The configuration's clip range is that of Flow-GRPO.
AWM_ARGUMENTS = ("--image_objective", "awm", "--image_epsilon", "1")
AUTHORS_PENALTY = ("--image_beta", "1", "--image_kl_type", "velocity")
AUTHORS_REFERENCES = (*REFERENCE_ARGUMENTS, "0.7", "--ref_model_decay_ramp", "0.001", "--image_base_beta", "0.003")
OTHER_OBJECTIVES = {
    "flow_cps": ("--sde_type", "flow_cps"),
    "grpo_guard": ("--image_objective", "grpo_guard"),
    "diffusion_nft": NFT_ARGUMENTS,
    "diffusion_nft_reference": (*NFT_ARGUMENTS, "--rollout_policy", "reference", *REFERENCE_ARGUMENTS, "0.5"),
    "awm": AWM_ARGUMENTS,
    "awm_fast": (*AWM_ARGUMENTS, "--preset", "fast"),
    "awm_authors": (*AWM_ARGUMENTS, "--sde_window_size", "6", *AUTHORS_PENALTY, *AUTHORS_REFERENCES),
}
"""Arguments of other objectives than the default, by name."""
EQUAL_TIME_STEPS = {"diffusion_nft_reference": 65, "awm_authors": 41}
"""
Steps in the time that the default takes for [`SHORT_STEPS`], of the objectives whose steps take more than a tenth longer, as
`step_costs.py` measured.
"""
DEFAULT_LABEL = "`flow_grpo`, Flow-SDE, without guidance (the recipe's default)"


def objectives_table(plan: Plan) -> MeasuredTable:
    """Objectives at an equal number of steps, and what a step costs."""
    costs = plan.objective_costs()

    def row(name: str, label: str, runs: tuple[Run, ...]) -> MeasuredRow:
        return one_line(label, (*runs, costs), lambda folders: [*_after(folders[:-1]), *_cost(folders[-1], name)])

    rows = [row("default", DEFAULT_LABEL, plan.short_reasoning())]
    rows += [row(name, _label(words), plan.short_reasoning(name, *words)) for name, words in OTHER_OBJECTIVES.items()]
    return MeasuredTable(
        f"Objectives at an equal number of steps, {SHORT_STEPS[1]}",
        (*_columns(plan), "CPU seconds per step", "over the default's"),
        tuple(rows),
        f"{ERRORS_NOTE} Seconds are medians of steps in turn, in one process.",
    )


def objectives_in_equal_time_table(plan: Plan) -> MeasuredTable:
    """Objectives whose steps take longer than the default's, in the time of its steps."""
    rows = [one_line(f"{SHORT_STEPS[1]} steps: {DEFAULT_LABEL}", plan.short_reasoning(), _after)]
    for name, steps in EQUAL_TIME_STEPS.items():
        words = OTHER_OBJECTIVES[name]
        runs = plan.reasoning(f"{name}_in_equal_time", "--max_steps", str(steps), *words)
        rows.append(one_line(f"{steps} steps: {_label(words)}", runs, _after))
    return MeasuredTable("Objectives in equal time", _columns(plan), tuple(rows), ERRORS_NOTE)


def _label(words: Sequence[str]) -> str:
    return f"`{' '.join(words)}`"


def _columns(plan: Plan) -> tuple[str, ...]:
    return ("objective", *(f"seed {seed}" for seed in plan.seeds), "mean strict pass", "mean reward")


def _after(folders: Sequence[Path]) -> list[str]:
    after = [read_summary(folder)["after"] for folder in folders]
    return [
        *(percent(part["strict_pass_rate"], part["strict_pass_error"]) for part in after),
        over_seeds([part["strict_pass_rate"] for part in after], percent),
        rewards_over_seeds([part["reward"] for part in after]),
    ]


def _cost(folder: Path, name: str) -> list[str]:
    seconds = json.loads((folder / "step_costs.json").read_text(encoding="utf-8"))
    ratio = median(own / default for own, default in zip(seconds[name], seconds["default"], strict=True))
    return [f"{median(seconds[name]):.2f}", f"{ratio:.2f}"]
