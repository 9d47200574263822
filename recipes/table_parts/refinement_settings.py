# SPDX-License-Identifier: Apache-2.0

"""Tables of what was tried for refinement: settings of its training, and the strength with which an image is noised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from table_parts.plan import Plan, Run
from table_parts.refinement import FROM_THE_IMAGE, refiner, stop_shares
from table_parts.results import ScoredSamples, percent, points, read_summary
from table_parts.tables import MeasuredRow, MeasuredTable, one_line


SHORT_PAINTING = "text-to-image, 80 steps"
WITHOUT_STOPS = ("--allow_stop", "false")
LIGHT_TEXT = ("--text_loss_weight", "0.05")
WEAKER = ("--refine_strength", "0.7", "--sde_window_range", "3", "7")
ONE_FIRST_IMAGE = ("--num_initial_images", "1")
WORST_OF_THREE = ("--num_initial_images", "3", "--learning_rate", "1e-4")
BOTH_TASKS = ("--train_tasks", "reasoning_t2i", "self_reflection", "--max_steps", "160")
FROM_THE_START = {
    "reflection_light": LIGHT_TEXT,
    "reflection_light_one": (*LIGHT_TEXT, *ONE_FIRST_IMAGE, "--rectification", "off"),
    "reflection_0.9": FROM_THE_IMAGE,
    "reflection_both": (*BOTH_TASKS, *LIGHT_TEXT, *FROM_THE_IMAGE),
}
AFTER_SHORT_PAINTING = {
    "short_0.7_one": (*LIGHT_TEXT, *WEAKER, *ONE_FIRST_IMAGE),
    "short_0.7_three": (*WEAKER, *WITHOUT_STOPS, *WORST_OF_THREE, *LIGHT_TEXT),
    "refinement": (*FROM_THE_IMAGE, *WITHOUT_STOPS, *WORST_OF_THREE, *LIGHT_TEXT),
}
AFTER_LONG_PAINTING = {"long_0.9_three": (*FROM_THE_IMAGE, *WORST_OF_THREE)}
STRENGTHS = ("1", "0.9", "0.8", "0.7", "0.6", "0.5", "0.4", "0.3", "0.2")


def reflection_settings_table(plan: Plan) -> MeasuredTable:
    """One round of refinement with several settings, before and after their training."""
    seed = plan.seeds[0]
    (default,) = plan.reflection("reflection", seeds=[seed])
    (short,), (long,) = plan.short_reasoning(seeds=[seed]), plan.default_reasoning([seed])
    runs = [("untrained", "none", default), *_tried(plan, "untrained", None, FROM_THE_START)]
    runs += _tried(plan, SHORT_PAINTING, short, AFTER_SHORT_PAINTING)
    runs.append((SHORT_PAINTING, "none", refiner(plan, seed)))
    runs += _tried(plan, "text-to-image, 160 steps", long, AFTER_LONG_PAINTING)
    return MeasuredTable(
        f"Self-reflection: what was tried, seed {seed}",
        (
            *("started from", "arguments", "first image → after the round, not trained", "right kept / broken"),
            *(
                "wrong kept / fixed",
                "first image → after the round, trained",
                "right kept / broken",
                "wrong kept / fixed",
            ),
        ),
        tuple(
            MeasuredRow(base, (run,), lambda folders, words=(base, label): _moments(folders[0], *words))
            for base, label, run in runs
        ),
        "In brackets the gain of the round in points, with its standard error over prompts. *Kept*, *broken* and *fixed* are shares of all "
        "right or of all wrong first images.",
    )


def _tried(
    plan: Plan, label: str, base: Run | None, settings: dict[str, tuple[str, ...]]
) -> list[tuple[str, str, Run]]:
    """Label of the start, arguments, and run of every setting."""
    start = () if base is None else ("--model_name_or_path", str(base.folder))
    needs = () if base is None else (base,)
    return [
        (
            label,
            f"`{' '.join(words)}`",
            plan.training(name, plan.seeds[0], *start, *words, recipe="self_reflection", needs=needs),
        )
        for name, words in settings.items()
    ]


def _moments(folder: Path, base: str, label: str) -> list[list[str]]:
    summary = read_summary(folder)
    return [[base, label, *_round(summary["before"]), *_round(summary["after"])]]


def _round(part: dict[str, Any]) -> list[str]:
    first, refined = (part[name]["strict_pass_rate"] for name in ("initial", "refined"))
    return [
        f"{percent(first)} → {percent(refined)} ({points(refined - first, part['gain_error'])})",
        *stop_shares([part]),
    ]


def refine_strength_table(plan: Plan) -> MeasuredTable:
    """One round without stops that starts from a noised copy of the image."""
    return MeasuredTable(
        "Rounds that start from the image",
        (
            "refine_strength",
            "first image",
            "after the round",
            "of wrong images, now right",
            "of right images, now wrong",
        ),
        tuple(
            one_line(value, [plan.evaluation(f"strength_{value}", None, *_strength(value), num_stages=2)], _strengths)
            for value in STRENGTHS
        ),
        "The untrained model. In brackets the gain in points, with its standard error over prompts. At 1 a round paints from noise.",
    )


def _strength(value: str) -> Sequence[str]:
    return ("--num_rounds", "1", "--refine_strength", value)


def _strengths(folders: Sequence[Path]) -> list[str]:
    first, refined = ScoredSamples.read(folders[0]).values()
    pairs = [(first.by_noise[key], row) for key, row in refined.by_noise.items() if key in first.by_noise]
    fixed = [new["strict_pass"] for old, new in pairs if not old["strict_pass"]]
    broken = [not new["strict_pass"] for old, new in pairs if old["strict_pass"]]
    return [
        percent(first.mean("strict_pass")),
        f"{percent(refined.mean('strict_pass'))} ({points(*refined.gain(first))})",
        *("" if not flags else percent(fmean(map(float, flags))) for flags in (fixed, broken)),
    ]
