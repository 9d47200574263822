# SPDX-License-Identifier: Apache-2.0

"""Tables of evaluations as plain text, for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from reward_models.evaluation.comparisons import ModelComparison
from reward_models.evaluation.samples import CategoryScore, EvaluatedSample, Evaluation, named_categories
from reward_models.evaluation.scores import EvaluationScores, RefinementScore
from reward_models.evaluation.statistics import MIN_PROMPTS, Estimate, PairedDifference


FEW_PROMPTS_MARK = "*"
FEW_PROMPTS_NOTE = f"* fewer than {MIN_PROMPTS} prompts: intervals by resampling are too narrow to rely on"
_CHANGE_HEADER = f"{'reward':>18}{'':>9}{'strict pass':>18}{'':>9}"


def score_table(evaluations: Sequence[EvaluationScores]) -> str:
    """Scores of each evaluation by tag and by category, with their intervals, and a note about rows of few prompts."""
    header = f"{'model':<24}{'mode':<12}{'category, tag':<24}{'n':>6}{'reward, P(yes)':>24}{'pass':>25}"
    lines, few = [header, "-" * len(header)], False
    for entry in evaluations:
        groups = [(g.name, g.reward, g.strict_pass_rate) for g in (*entry.categories, entry.total)]
        labels = _tag_labels([(t.side, t.name) for t in entry.tags])
        tags = [(label, t.p_yes, t.pass_rate) for label, t in zip(labels, entry.tags, strict=True)]
        for name, value, pass_rate in [*tags, *groups]:
            few |= has_few_prompts(value)
            lines.append(
                f"{_shorten(entry.model, 23):<24}{_shorten(entry.mode, 11):<12}{_shorten(name, 23):<24}"
                f"{count_samples(value):>6}{format_interval(value, '.3f'):>24}{format_interval(pass_rate, '.1%'):>25}"
            )
        lines.append("-" * len(header))
    return "\n".join([*lines[:-1], *([FEW_PROMPTS_NOTE] if few else [])])


def difference_table(comparison: ModelComparison) -> str:
    """
    Differences between a model and the baseline, with intervals, p-values, p-values with Holm's correction for the number of
    categories and tags, and a note about rows of few prompts.
    """
    title = f"{comparison.baseline} -> {comparison.model}, {comparison.mode}"
    p_values = f"{'p':>8}{'p, Holm':>9}"
    header = f"{'category, tag':<24}{'n':>6}{'reward, P(yes)':>28}{p_values}{'pass, in points':>26}{p_values}"
    lines, few = [title, header, "-" * len(header)], False
    total, *parts = comparison.differences
    tags = [entry for entry in parts if entry.scope.endswith(" tag")]
    sides = [(entry.scope.removesuffix(" tag"), entry.name) for entry in tags]
    names = [*(entry.name for entry in parts[: len(parts) - len(tags)]), *_tag_labels(sides), total.name]
    for name, entry in zip(names, [*parts, total], strict=True):
        value, pass_rate = entry.reward.difference, entry.pass_rate.difference
        few |= has_few_prompts(value)
        lines.append(
            f"{_shorten(name, 23):<24}{count_samples(value):>6}{format_interval(value, '+.3f'):>28}{_p_values(entry.reward)}"
            f"{format_interval(pass_rate, '+.1f', scale=100):>26}{_p_values(entry.pass_rate)}"
        )
    return "\n".join([*lines, *([FEW_PROMPTS_NOTE] if few else [])])


def has_few_prompts(estimate: Estimate) -> bool:
    """Whether an estimate is of too few prompts for its interval."""
    return 0 < estimate.num_prompts < MIN_PROMPTS


def refinement_table(pairs: Mapping[str, tuple[Evaluation, Evaluation]]) -> str:
    """The effect of refinements, given the initial and the refined evaluation of each by name."""
    columns = f"{'improved':>10}{'worsened':>10}{'unchanged':>11}{'fixed':>8}{'broken':>8}"
    header = f"{'':<18}{'n':>6}{_CHANGE_HEADER}{columns}"
    lines = [header, "-" * len(header)]
    for name, (initial, refined) in pairs.items():
        score = RefinementScore.from_evaluations(initial, refined)
        lines.append(
            f"{name:<18}{f'{score.num_pairs}{_few_prompts_mark(initial.samples)}':>6}"
            f"{_change(initial.total, refined.total)}"
            f"{score.improved:>10.1%}{score.worsened:>10.1%}{score.unchanged:>11.1%}"
            f"{score.fixed:>8.1%}{score.broken:>8.1%}"
        )
    return _noted(lines, [initial.samples for initial, _ in pairs.values()])


def comparison_table(before: Evaluation, after: Evaluation) -> str:
    """Scores of two evaluations of the same rows, by category, and a note about categories of few prompts."""
    header = f"{'category':<20}{'n':>6}{_CHANGE_HEADER}"
    rule = "-" * len(header)
    groups = named_categories(before.samples)
    lines = [
        f"{name:<20}{f'{old.num_samples}{_few_prompts_mark(samples)}':>6}{_change(old, new)}"
        for name, samples, old, new in [
            *((name, samples, before.categories[name], after.categories[name]) for name, samples in groups.items()),
            ("all", before.samples, before.total, after.total),
        ]
    ]
    table = [header, rule, *lines[:-1], *([rule] if groups else []), lines[-1]]
    return _noted(table, [before.samples, *groups.values()])


def _few_prompts_mark(samples: Sequence[EvaluatedSample]) -> str:
    num_prompts = len({sample.index for sample in samples if sample.reward is not None})
    return FEW_PROMPTS_MARK if 0 < num_prompts < MIN_PROMPTS else ""


def _noted(lines: Sequence[str], groups: Sequence[Sequence[EvaluatedSample]]) -> str:
    note = f"{FEW_PROMPTS_MARK} fewer than {MIN_PROMPTS} prompts: too few to tell a change from chance"
    return "\n".join([*lines, *([note] if any(map(_few_prompts_mark, groups)) else [])])


def _change(old: CategoryScore, new: CategoryScore) -> str:
    return (
        f"{old.reward:>9.3f} ->{new.reward:>6.3f}{new.reward - old.reward:>+9.3f}"
        f"{old.strict_pass_rate:>8.1%} ->{new.strict_pass_rate:>7.1%}"
        f"{100 * (new.strict_pass_rate - old.strict_pass_rate):>+9.1f}"
    )


def _tag_labels(tags: Sequence[tuple[str, str]]) -> list[str]:
    """Labels of tags, given by side and name. One that both sides have, as a tag of one's own may be, is told with its side."""
    count = Counter(name for _, name in tags)
    return [f"[{name}, {side}]" if count[name] > 1 else f"[{name}]" for side, name in tags]


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"…{text[1 - length :]}"


def format_interval(estimate: Estimate, form: str, scale: float = 1) -> str:
    """Format an estimate and its interval, if it has one."""
    if estimate.value is None:
        return "-"
    if estimate.low is None:
        return f"{scale * estimate.value:{form}}"
    value, low, high = (f"{scale * number:{form}}" for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def format_p_value(p_value: float | None) -> str:
    """Format a p-value."""
    return "-" if p_value is None else f"{p_value:.4f}"


def count_samples(estimate: Estimate) -> str:
    """Format the number of samples, with [`FEW_PROMPTS_MARK`] if they are of few prompts."""
    return f"{estimate.num_samples}{FEW_PROMPTS_MARK if has_few_prompts(estimate) else ''}"


def _p_values(difference: PairedDifference) -> str:
    return f"{format_p_value(difference.p_value):>8}{format_p_value(difference.holm_p_value):>9}"
