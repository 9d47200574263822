# SPDX-License-Identifier: Apache-2.0

"""
Table of the seconds of one core until a model of the shapes world is good: what a faster step is worth in the end.

The algorithm of the paper's released code runs here in this library, so that nothing but the algorithm differs: one forward per
trained step on contexts that are cached without gradient, Euler steps, and micro-batches of 2 trajectories, as its configuration has
them, of 8, and of the whole step. It has the benefit of the doubt: rollouts sample 8 trajectories at once where it trains 2, and in
every micro-batch a prompt that several trajectories share is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from alphagrpo_ext.files import atomic_path
from benchmark_parts.whole_step.released import released_settings
from table_parts.objectives.table import AWM_ARGUMENTS
from table_parts.plan import Plan, Run
from table_parts.results import percent
from table_parts.tables import MeasuredRow, MeasuredTable
from table_parts.time_to_quality.curve import CurvePoint, read_curve, seconds_until


if TYPE_CHECKING:
    from matplotlib.lines import Line2D


MEASURED_RECIPES = {"reasoning_t2i": "text-to-image", "self_reflection": "self-reflection"}
"""Titles of the recipes that are measured."""
TRAJECTORIES_PER_STEP = 64
"""Trajectories per step, as in the configurations of both recipes."""
DEFAULT = "paper"


def _released(micro_batch_size: int) -> tuple[str, ...]:
    settings = released_settings(micro_batch_size, TRAJECTORIES_PER_STEP)
    return tuple(word for argument, value in settings.items() for word in (f"--{argument}", str(value)))


def _ours(*arguments: str) -> tuple[str, tuple[str, ...]]:
    return f"`{' '.join(arguments)}`", arguments


ALGORITHMS = {
    "released_2": ("released code's, micro-batches of 2", _released(2)),
    "released_8": ("released code's, micro-batches of 8", _released(8)),
    "released_64": ("released code's, all 64 at once", _released(64)),
    DEFAULT: _ours("--preset", "paper"),
    "fast": _ours("--preset", "fast"),
    "fast_awm": _ours("--preset", "fast", *AWM_ARGUMENTS),
    "fast_awm_2": _ours("--preset", "fast", *AWM_ARGUMENTS, "--sde_window_size", "2"),
}
"""Label and arguments of the algorithms. All have the same trajectories per step."""
SHARES = {"half of the way": 0.5, "90% of the way": 0.9}
"""Parts of the default's gain that are to be reached."""


def time_to_quality_table(plan: Plan) -> MeasuredTable:
    """Seconds of training until the strict pass rate reaches a part of what the default reaches."""
    curves = {
        recipe: {name: plan.learning_curves(recipe, name, *words) for name, (_, words) in ALGORITHMS.items()}
        for recipe in MEASURED_RECIPES
    }
    rows = [
        _row(f"{title}: {label}", curves[recipe][name], curves[recipe][DEFAULT])
        for recipe, title in MEASURED_RECIPES.items()
        for name, (label, _) in ALGORITHMS.items()
    ]
    return MeasuredTable(
        "Time to quality",
        ("training", "seconds per step", *SHARES, "strict pass at the end"),
        tuple(rows),
        f"CPU seconds of one core in training steps, without evaluations; seeds {', '.join(map(str, plan.seeds))}: median (least to "
        "greatest). The way leads from the strict pass rate before training to the mean of `--preset paper` after it, on held-out prompts; between "
        "two evaluations the rate is taken to be linear. `time_to_quality.png` shows the mean over seeds, and the range between them.",
        draw=lambda path: _draw(path, curves),
    )


def _row(label: str, own: Sequence[Run], default: Sequence[Run]) -> MeasuredRow:
    def read(folders: Sequence[Path]) -> list[list[str]]:
        curves = [read_curve(folder) for folder in folders]
        return [[label, *_cells(curves[: len(own)], curves[len(own) :])]]

    return MeasuredRow(label, (*own, *default), read)


def _cells(own: Sequence[Sequence[CurvePoint]], default: Sequence[Sequence[CurvePoint]]) -> list[str]:
    start, end = (sum(curve[place].strict_pass_rate for curve in default) / len(default) for place in (0, -1))
    seconds = [[seconds_until(curve, start + share * (end - start)) for curve in own] for share in SHARES.values()]
    return [
        _spread([curve[-1].seconds / curve[-1].step for curve in own], "{:.2f}".format),
        *(_spread(times, _seconds) for times in seconds),
        _spread([curve[-1].strict_pass_rate for curve in own], percent),
    ]


def _spread(values: Sequence[float], notation: Callable[[float], str]) -> str:
    """The median over seeds, with the least and the greatest value where they differ."""
    middle, *ends = (notation(value) for value in (median(values), min(values), max(values)))
    return middle if {middle} == {*ends} else f"{middle} ({' to '.join(ends)})"


def _seconds(value: float) -> str:
    return "not reached" if value == float("inf") else f"{value:.0f}"


def _draw(path: Path, curves: dict[str, dict[str, tuple[Run, ...]]]) -> None:
    """Draw the curves of all finished algorithms, one panel per task, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(10, 5), layout="constrained")
    colors = {name: f"C{place}" for place, name in enumerate(ALGORITHMS)}
    drawn: dict[str, Line2D] = {}
    for axes, (recipe, algorithms) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        for name, runs in algorithms.items():
            if not all(run.finished for run in runs):
                continue
            # Evaluations of all seeds follow the same steps.
            points = list(zip(*(read_curve(run.folder) for run in runs), strict=True))
            seconds = [sum(p.seconds for p in group) / len(group) for group in points]
            rates = [[100 * p.strict_pass_rate for p in group] for group in points]
            (drawn[name],) = axes.plot(seconds, [sum(group) / len(group) for group in rates], color=colors[name])
            lowest, highest = ([end(group) for group in rates] for end in (min, max))
            axes.fill_between(seconds, lowest, highest, color=colors[name], alpha=0.2)
        axes.set(title=MEASURED_RECIPES[recipe], xlabel="CPU seconds of training", ylabel="strict pass, %")
    # One for both panels, below them, where it hides no curve.
    labels = [ALGORITHMS[name][0].replace("`", "") for name in drawn]
    figure.legend(list(drawn.values()), labels, loc="outside lower center", ncols=2, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
