# SPDX-License-Identifier: Apache-2.0

"""Tables of evaluations as plain text, for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from alphagrpo_ext.printable import printable
from alphagrpo_ext.report.records import REWARD_TOLERANCE
from reward_models.evaluation.comparisons import ModelComparison
from reward_models.evaluation.samples import CategoryScore, EvaluatedSample, Evaluation, named_categories
from reward_models.evaluation.scores import EvaluationScores, RefinementScore, StopRates
from reward_models.evaluation.statistics import MIN_PROMPTS, Estimate, PairedDifference


FEW_PROMPTS_MARK = "*"
FEW_PROMPTS_NOTE = f"* fewer than {MIN_PROMPTS} prompts: intervals by resampling are too narrow to rely on"
SIGNIFICANCE_LEVEL = 0.05
_STRICT_PASS_NOTE = "n: scored images. strict pass: share of images for which every question is answered yes"
_REFINEMENT_NOTE = (
    f"improved, worsened: by reward, by more than {REWARD_TOLERANCE}. fixed, broken: images that pass strictly only after, only "
    "before, refinement"
)
_ROW_HEADER = f"{'category or [tag]':<24}{'prompts':>8}{'n':>7}"
_CHANGE_HEADER = f"{'reward':>18}{'':>9}{'strict pass':>18}{'':>9}"


def score_table(entry: EvaluationScores) -> str:
    """Scores of an evaluation by category and by tag, then of all prompts, with their intervals."""
    header = f"{_ROW_HEADER}{'reward, P(yes)':>25}{'pass':>25}"
    labels = _tag_labels([(t.side, t.name) for t in entry.tags])
    tags = [(label, t.p_yes, t.pass_rate) for label, t in zip(labels, entry.tags, strict=True)]
    groups = [(g.name, g.reward, g.strict_pass_rate) for g in (*entry.categories, entry.total)]
    *parts, total = (
        f"{_row_start(name, value)}{format_interval(value, '.3f'):>25}{format_interval(pass_rate, '.1%'):>25}"
        for name, value, pass_rate in [*groups[:-1], *tags, groups[-1]]
    )
    return _ruled(f"{entry.model}, {entry.mode}", header, parts, total)


def difference_table(comparison: ModelComparison) -> str:
    """
    Differences between a model and the baseline by category and by tag, then over all prompts, with intervals, p-values, and
    p-values with Holm's correction for the number of categories and tags.
    """
    p_values = f"{'p':>8}{'p, Holm':>9}"
    header = f"{_ROW_HEADER}{'reward, P(yes)':>28}{p_values}{'pass, in points':>26}{p_values}"
    total, *parts = comparison.differences
    tags = [entry for entry in parts if entry.scope.endswith(" tag")]
    sides = [(entry.scope.removesuffix(" tag"), entry.name) for entry in tags]
    names = [*(entry.name for entry in parts[: len(parts) - len(tags)]), *_tag_labels(sides), total.name]
    *lines, last = (
        f"{_row_start(name, entry.reward.difference)}{format_interval(entry.reward.difference, '+.3f'):>28}"
        f"{_p_values(entry.reward)}{format_interval(entry.pass_rate.difference, '+.1f', scale=100):>26}"
        f"{_p_values(entry.pass_rate)}"
        for name, entry in zip(names, [*parts, total], strict=True)
    )
    return _ruled(f"{comparison.baseline} -> {comparison.model}, {comparison.mode}", header, lines, last)


def table_legend(evaluations: Sequence[EvaluationScores], comparisons: Sequence[ModelComparison]) -> str:
    """What the rows, columns and marks of [`score_table`] and [`difference_table`] mean, as far as they occur."""
    values = [group.reward for entry in evaluations for group in (entry.total, *entry.categories)]
    values += [tag.p_yes for entry in evaluations for tag in entry.tags]
    values += [entry.reward.difference for comparison in comparisons for entry in comparison.differences]
    has_tags = any(entry.tags for entry in evaluations)
    lines = {
        "category, all": "n: scored images. pass: share of images for which every question is answered yes (strict pass)",
        "[tag]": "of the questions with this tag. n: answered questions. P(yes): its mean, in place of the reward. "
        "pass: share answered yes",
        "[low, high]": "95% interval, by resampling prompts",
        "p": "how probable a difference at least this large is if the models do not differ",
        "p, Holm": f"the same, corrected for the number of categories{' and tags' if has_tags else ''}",
        FEW_PROMPTS_MARK: FEW_PROMPTS_NOTE.removeprefix(f"{FEW_PROMPTS_MARK} "),
    }
    absent = {
        name for name, occurs in (("[tag]", has_tags), ("p", comparisons), ("p, Holm", comparisons)) if not occurs
    }
    absent |= set() if any(value.low is not None for value in values) else {"[low, high]"}
    absent |= set() if any(map(has_few_prompts, values)) else {FEW_PROMPTS_MARK}
    return "\n".join(f"{name:<16}{text}" for name, text in lines.items() if name not in absent)


def overall_line(comparison: ModelComparison) -> str:
    """The difference over all prompts as a sentence, with whether it is significant at 5%."""
    total = comparison.differences[0]
    parts = [
        f"{name} {format_interval(entry.difference, form, scale)}{unit}, {_significance(entry)}"
        for name, entry, form, scale, unit in (
            ("reward", total.reward, "+.3f", 1, ""),
            ("strict pass", total.pass_rate, "+.1f", 100, " points"),
        )
    ]
    count = total.reward.difference.num_prompts
    return (
        f"overall, {comparison.baseline} -> {comparison.model}, {comparison.mode}, {count} prompt{'s' * (count != 1)}: "
        f"{'; '.join(parts)}"
    )


def _significance(difference: PairedDifference) -> str:
    if difference.p_value is None:
        return "nothing to compare"
    return f"{'significant' if difference.p_value < SIGNIFICANCE_LEVEL else 'not significant'} at 5% (p {difference.p_value:.4f})"


def _ruled(title: str, header: str, parts: Sequence[str], total: str) -> str:
    rule = "-" * len(header)
    return "\n".join([title, header, rule, *parts, rule, total])


def _row_start(name: str, estimate: Estimate) -> str:
    mark = FEW_PROMPTS_MARK if has_few_prompts(estimate) else ""
    return f"{_shorten(printable(name), 23):<24}{f'{estimate.num_prompts}{mark}':>8}{estimate.num_samples:>7}"


def has_few_prompts(estimate: Estimate) -> bool:
    """Whether an estimate is of too few prompts for its interval."""
    return 0 < estimate.num_prompts < MIN_PROMPTS


def refinement_table(pairs: Mapping[str, tuple[Evaluation, Evaluation]]) -> str:
    """
    The effect of refinements, given the initial and the refined evaluation of each by name. If images were kept, a second table
    says how many of the right and of the wrong ones.
    """
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
    if any(sample.is_kept for _, refined in pairs.values() for sample in refined.samples):
        lines += ["", *_stop_lines(pairs), ""]
    return _noted([*lines, _STRICT_PASS_NOTE, _REFINEMENT_NOTE], [initial.samples for initial, _ in pairs.values()])


def _stop_lines(pairs: Mapping[str, tuple[Evaluation, Evaluation]]) -> list[str]:
    """What happened to right first images, and to wrong ones, as shares of either."""
    names = ("right_kept", "broken", "wrong_kept", "fixed")
    columns = ("of right: kept", "broken", "of wrong: kept", "fixed")
    header = f"{'':<18}" + "".join(f"{column:>16}" for column in columns)
    lines = [header, "-" * len(header)]
    for name, (initial, refined) in pairs.items():
        rates = asdict(StopRates.from_evaluations(initial, refined))
        cells = ("-" if rates[rate] is None else f"{rates[rate]:.1%}" for rate in names)
        lines.append(f"{name:<18}" + "".join(f"{cell:>16}" for cell in cells))
    return lines


def comparison_table(before: Evaluation, after: Evaluation) -> str:
    """Scores of two evaluations of the same rows, by category, and a note about categories of few prompts."""
    header = f"{'category':<20}{'n':>6}{_CHANGE_HEADER}"
    rule = "-" * len(header)
    groups = named_categories(before.samples)
    lines = [
        f"{printable(name):<20}{f'{old.num_samples}{_few_prompts_mark(samples)}':>6}{_change(old, new)}"
        for name, samples, old, new in [
            *((name, samples, before.categories[name], after.categories[name]) for name, samples in groups.items()),
            ("all", before.samples, before.total, after.total),
        ]
    ]
    table = [header, rule, *lines[:-1], *([rule] if groups else []), lines[-1], _STRICT_PASS_NOTE]
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
