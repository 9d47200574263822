# SPDX-License-Identifier: Apache-2.0

"""The charts of a report: which metrics of a run are drawn together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Series:
    """
    A line of a chart.

    Args:
        name (`str`): Name in the legend.
        points (`list[tuple[int, float]]`): Step and value, in ascending order of steps.
    """

    name: str
    points: list[tuple[int, float]]


@dataclass(frozen=True)
class Chart:
    """
    A chart with a line for each of its metrics.

    Args:
        section (`str`): Heading above the chart.
        title (`str`): The quantity, with its unit.
        series (`list[Series]`): The lines, at most four.
        lower, upper (`float`, *optional*): Bounds of the axis; `None` for the bounds of the data.
        note (`str`, *optional*): A sentence about the quantity.
    """

    section: str
    title: str
    series: list[Series]
    lower: float | None = None
    upper: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class _Template:
    """A chart that is drawn if the run logged any of its metrics. `metrics` maps names in the legend to metrics."""

    section: str
    title: str
    metrics: Mapping[str, str]
    lower: float | None = None
    upper: float | None = None
    note: str | None = None


_TEMPLATES = (
    _Template("Reward", "Reward", {"training": "reward", "hold-out judge": "holdout/reward"}),
    _Template("Reward", "Standard deviation of the reward", {"training": "reward_std"}, lower=0),
    _Template(
        "Reward",
        "Refinement: reward of the image",
        {"initial": "reflection/initial_reward", "refined": "reflection/final_reward"},
    ),
    _Template(
        "Reward",
        "Refinement: share of images",
        {"improved": "reflection/improved_frac", "rectified": "reflection/rectified_frac"},
        lower=0,
        upper=1,
    ),
    _Template(
        "Reward",
        "Share of images that pass every question",
        {"training": "dvreward/strict_pass", "hold-out judge": "holdout/strict_pass"},
        lower=0,
        upper=1,
    ),
    _Template(
        "Reward", "Mean P(yes)", {"semantic": "dvreward/semantic", "quality": "dvreward/quality"}, lower=0, upper=1
    ),
    _Template(
        "Ratios",
        "Mean ratio of images",
        {"images": "image/ratio_mean"},
        note="Probability of the sampled denoising steps under the present weights, divided by that under the weights that sampled "
        "them. It is 1 in the first update after a rollout.",
    ),
    _Template(
        "Ratios",
        "Share of ratios that are clipped",
        {"images": "image/clip_ratio", "text": "clip_ratio/region_mean"},
        lower=0,
    ),
    _Template("Ratios", "KL to the reference", {"images": "image/kl", "text": "kl"}),
    _Template(
        "Ratios",
        "Entropy of the text, nats per token",
        {"text": "entropy"},
        lower=0,
        note="How undecided the policy is about the next token. At 0 it always writes the same.",
    ),
    _Template(
        "Lengths",
        "Length of the text, tokens",
        {
            "mean": "completions/mean_length",
            "shortest": "completions/min_length",
            "longest": "completions/max_length",
        },
        lower=0,
    ),
    _Template("Lengths", "Share of texts that were cut off", {"text": "completions/clipped_ratio"}, lower=0),
    _Template(
        "Timings",
        "Time per step, seconds",
        {"rollout": "timing/rollout", "reward": "timing/reward", "update": "timing/update"},
        lower=0,
    ),
    _Template(
        "Timings",
        "Latency of the judge, seconds",
        {"median": "judge/latency_p50", "99th percentile": "judge/latency_p99"},
        lower=0,
    ),
    _Template("Timings", "Share of images that the judge failed on", {"images": "judge/failed_frac"}, lower=0),
    _Template("Optimization", "Loss", {"joint": "loss", "images": "image/loss"}),
    _Template("Optimization", "Norm of the gradient", {"all": "grad_norm"}, lower=0),
    _Template("Optimization", "Learning rate", {"all": "learning_rate"}, lower=0),
)
_SECTIONS = ("Reward", "Pass rate by tag", "Ratios", "Lengths", "Timings", "Optimization", "Others")
_TAG_PREFIXES = {"dvreward/semantic/": "semantic", "dvreward/quality/": "quality"}
_NOT_DRAWN = {"epoch", "step", "num_tokens", "step_time", "frac_reward_zero_std", "total_flos"}


def make_charts(logs: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """
    Make the charts of a run.

    Args:
        logs (`Sequence[Mapping[str, Any]]`):
            The trainer's `log_history`. If a metric was logged several times at one step, the last value counts.

    Returns:
        `list[Chart]`: The known metrics by section, a chart for each tag of questions, and a chart for each other metric in the
        section `"Others"`.
    """
    points: dict[str, dict[int, float]] = {}
    for entry in logs:
        for name, value in entry.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and "step" in entry:
                points.setdefault(name, {})[entry["step"]] = value

    def series(legend: str, metric: str) -> Series:
        return Series(legend, sorted(points[metric].items()))

    result = [
        Chart(
            template.section,
            template.title,
            [series(legend, metric) for legend, metric in template.metrics.items() if metric in points],
            template.lower,
            template.upper,
            template.note,
        )
        for template in _TEMPLATES
        if any(metric in points for metric in template.metrics.values())
    ]
    drawn = {metric for template in _TEMPLATES for metric in template.metrics.values()} | _NOT_DRAWN
    for prefix, kind in _TAG_PREFIXES.items():
        for metric in sorted(points):
            if metric.startswith(prefix):
                title = f"{metric.removeprefix(prefix)} ({kind})"
                result.append(Chart("Pass rate by tag", title, [series("answered yes", metric)], 0, 1))
                drawn.add(metric)
    # The end of training logs these once, so they have no curve.
    summaries = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
    others = sorted(points.keys() - drawn - summaries)
    result += [Chart("Others", metric, [series(metric, metric)]) for metric in others]
    return sorted(result, key=lambda chart: _SECTIONS.index(chart.section))
