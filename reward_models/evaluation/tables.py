# SPDX-License-Identifier: Apache-2.0

"""
What evaluations say: scores by category and by tag with their intervals, comparisons of models, and the files and tables that
hold them.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from reward_models.dvreward import PASS_THRESHOLD
from reward_models.evaluation.evaluate import RefinementScore
from reward_models.evaluation.samples import EvaluatedSample, Evaluation
from reward_models.evaluation.statistics import Estimate, PairedDifference, bootstrap_mean, paired_difference
from reward_models.prompts.questions import PromptRecord, Question


ALL = "all"
_SIDES = ("semantic", "quality")


@dataclass(frozen=True)
class GroupScore:
    """
    Scores of all prompts or of those of a category.

    Args:
        scope (`str`): `"all"` or `"category"`.
        name (`str`): Of the category, or `"all"`.
        reward ([`Estimate`]): Mean reward.
        strict_pass_rate ([`Estimate`]): Share of samples with a yes to every question.
        num_failed (`int`): Samples that could not be scored.
    """

    scope: str
    name: str
    reward: Estimate
    strict_pass_rate: Estimate
    num_failed: int


@dataclass(frozen=True)
class TagScore:
    """
    Scores of the questions with one tag, over all prompts.

    Args:
        side (`str`): `"semantic"` or `"quality"`.
        name (`str`): The tag.
        p_yes ([`Estimate`]): Mean P(yes).
        pass_rate ([`Estimate`]): Share of answers that are yes.
        num_failed (`int`): Questions without an answer.
    """

    side: str
    name: str
    p_yes: Estimate
    pass_rate: Estimate
    num_failed: int


@dataclass(frozen=True)
class EvaluationReport:
    """
    What one evaluation says.

    Args:
        model (`str`): Name of the model.
        mode (`str`): How the images were made, e.g. `"thought"`.
        total ([`GroupScore`]): Over all prompts.
        categories (`list[GroupScore]`): By category, in order of appearance.
        tags (`list[TagScore]`): By side and tag, in order of appearance.
        refinement ([`RefinementScore`], *optional*): What refining did to the images that were first painted.
    """

    model: str
    mode: str
    total: GroupScore
    categories: list[GroupScore]
    tags: list[TagScore]
    refinement: RefinementScore | None = None


@dataclass(frozen=True)
class Difference:
    """
    By how much a model is better than the baseline on some of the samples.

    Args:
        scope (`str`): `"all"`, `"category"` or `"tag"`.
        name (`str`): Of the category or tag, or `"all"`.
        reward ([`PairedDifference`]): Of the mean reward; of a tag, of the mean P(yes).
        pass_rate ([`PairedDifference`]): Of the strict pass rate; of a tag, of the share of answers that are yes.
    """

    scope: str
    name: str
    reward: PairedDifference
    pass_rate: PairedDifference


@dataclass(frozen=True)
class ModelComparison:
    """
    Two models that made images in the same way.

    Args:
        baseline, model (`str`): Names of the models.
        mode (`str`): How the images were made.
        differences (`list[Difference]`): Over all prompts, by category and by tag.
    """

    baseline: str
    model: str
    mode: str
    differences: list[Difference]


@dataclass(frozen=True)
class NamedEvaluation:
    """
    Args:
        model (`str`): Name of the model.
        mode (`str`): How the images were made.
        evaluation ([`Evaluation`]): The samples.
        initial ([`Evaluation`], *optional*): The images that were refined, if they were.
    """

    model: str
    mode: str
    evaluation: Evaluation
    initial: Evaluation | None = None


@dataclass(frozen=True)
class _Answer:
    """An answer, by the prompt that it is about and by all that tells it from others."""

    prompt: int
    key: tuple[int, int, int]
    p_yes: float | None


def report(evaluation: NamedEvaluation, records: Sequence[PromptRecord]) -> EvaluationReport:
    """
    Args:
        evaluation ([`NamedEvaluation`]): The evaluation.
        records (`Sequence[PromptRecord]`): The record of each of its rows.
    """
    samples, initial = evaluation.evaluation.samples, evaluation.initial
    return EvaluationReport(
        model=evaluation.model,
        mode=evaluation.mode,
        total=_group_score(ALL, ALL, samples),
        categories=[_group_score("category", name, group) for name, group in _by_category(samples).items()],
        tags=[_tag_score(side, tag, answers) for (side, tag), answers in _by_tag(samples, records).items()],
        refinement=None if initial is None else RefinementScore.of(initial, evaluation.evaluation),
    )


def compare(baseline: NamedEvaluation, other: NamedEvaluation, records: Sequence[PromptRecord]) -> ModelComparison:
    """
    Compare two evaluations of the same rows and noise seeds, sample by sample; a sample that could not be scored in one of
    them is left out.

    Args:
        baseline, other ([`NamedEvaluation`]): The evaluations.
        records (`Sequence[PromptRecord]`): The record of each row.

    Raises:
        `ValueError`: If the evaluations are of other samples.
    """
    old, new = baseline.evaluation.samples, other.evaluation.samples
    if [(s.seed, s.index) for s in old] != [(s.seed, s.index) for s in new]:
        raise ValueError(f"{baseline.model} and {other.model} were evaluated on other prompts or noise seeds")
    differences = [_group_difference(ALL, ALL, old, new)]
    for (name, group), others in zip(_by_category(old).items(), _by_category(new).values(), strict=True):
        differences.append(_group_difference("category", name, group, others))
    new_tags = _by_tag(new, records)
    for (side, tag), answers in _by_tag(old, records).items():
        differences.append(_tag_difference(tag, answers, new_tags[side, tag]))
    return ModelComparison(baseline.model, other.model, baseline.mode, differences)


def save_reports(
    folder: Path,
    evaluations: Sequence[NamedEvaluation],
    records: Sequence[PromptRecord],
    settings: Mapping[str, Any],
) -> str:
    """
    Write `evaluation.json` (everything), `summary.csv` (a line a model, mode and category or tag) and `samples.jsonl` (a line
    a sample). The first model is the baseline of the others.

    Args:
        folder (`Path`): Where to; files of earlier evaluations are replaced.
        evaluations (`Sequence[NamedEvaluation]`): What to write.
        records (`Sequence[PromptRecord]`): The record of each row.
        settings (`Mapping[str, Any]`): How it was made; values that JSON knows.

    Returns:
        `str`: The tables, as text.
    """
    reports = [report(evaluation, records) for evaluation in evaluations]
    baselines = {entry.mode: entry for entry in reversed(evaluations) if entry.model == evaluations[0].model}
    comparisons = [
        compare(baselines[entry.mode], entry, records)
        for entry in evaluations
        if entry.model != evaluations[0].model and entry.mode in baselines
    ]
    content = {
        "settings": settings,
        "evaluations": [asdict(entry) for entry in reports],
        "comparisons": [asdict(entry) for entry in comparisons],
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "evaluation.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    _write(folder / "summary.csv", _summary_csv(reports))
    lines = (json.dumps(row, ensure_ascii=False) for row in _sample_rows(evaluations, records, folder))
    _write(folder / "samples.jsonl", "".join(f"{line}\n" for line in lines))
    return "\n\n".join([score_table(reports), *map(difference_table, comparisons)])


def score_table(reports: Sequence[EvaluationReport]) -> str:
    """Mean reward and strict pass rate of every evaluation by category, and pass rates by tag, with their intervals."""
    header = f"{'model':<24}{'mode':<12}{'category, tag':<24}{'n':>6}{'reward, P(yes)':>24}{'pass':>25}"
    lines = [header, "-" * len(header)]
    for entry in reports:
        groups = [(g.name, g.reward, g.strict_pass_rate) for g in (*entry.categories, entry.total)]
        tags = [(f"[{t.name}]", t.p_yes, t.pass_rate) for t in entry.tags]
        for name, value, passed in [*tags, *groups]:
            lines.append(
                f"{_short(entry.model, 23):<24}{_short(entry.mode, 11):<12}{_short(name, 23):<24}"
                f"{value.num_samples:>6}{_number(value):>24}{_percent(passed):>25}"
            )
        lines.append("-" * len(header))
    return "\n".join(lines[:-1])


def difference_table(comparison: ModelComparison) -> str:
    """By how much a model is better than the baseline, with intervals and p-values, as text."""
    title = f"{comparison.baseline} -> {comparison.model}, {comparison.mode}"
    header = f"{'category, tag':<24}{'n':>6}{'reward, P(yes)':>28}{'p':>8}{'pass, in points':>26}{'p':>8}"
    lines = [title, header, "-" * len(header)]
    for entry in [*comparison.differences[1:], comparison.differences[0]]:
        name = f"[{entry.name}]" if entry.scope == "tag" else entry.name
        value, passed = entry.reward.difference, entry.pass_rate.difference
        lines.append(
            f"{_short(name, 23):<24}{value.num_samples:>6}{_number(value, '+'):>28}{_p_value(entry.reward):>8}"
            f"{_points(passed):>26}{_p_value(entry.pass_rate):>8}"
        )
    return "\n".join(lines)


def _by_category(samples: Sequence[EvaluatedSample]) -> dict[str, list[EvaluatedSample]]:
    groups: dict[str, list[EvaluatedSample]] = {}
    for sample in samples:
        groups.setdefault(sample.category, []).append(sample)
    return groups


def _questions(record: PromptRecord, side: str) -> tuple[Question, ...]:
    return record.valid_semantic_questions if side == "semantic" else record.valid_quality_questions


def _by_tag(
    samples: Sequence[EvaluatedSample], records: Sequence[PromptRecord]
) -> dict[tuple[str, str], list[_Answer]]:
    groups: dict[tuple[str, str], list[_Answer]] = {}
    for side in _SIDES:
        for sample in samples:
            questions = _questions(records[sample.index], side)
            for place, (question, p_yes) in enumerate(zip(questions, getattr(sample, side), strict=True)):
                answer = _Answer(sample.index, (sample.seed, sample.index, place), p_yes)
                groups.setdefault((side, question.tag), []).append(answer)
    return groups


def _group_score(scope: str, name: str, samples: Sequence[EvaluatedSample]) -> GroupScore:
    scored = [sample for sample in samples if sample.reward is not None]
    prompts = [sample.index for sample in scored]
    return GroupScore(
        scope=scope,
        name=name,
        reward=bootstrap_mean(prompts, [sample.reward for sample in scored]),
        strict_pass_rate=bootstrap_mean(prompts, [float(sample.strict_pass) for sample in scored]),
        num_failed=len(samples) - len(scored),
    )


def _tag_score(side: str, tag: str, answers: Sequence[_Answer]) -> TagScore:
    answered = [answer for answer in answers if answer.p_yes is not None]
    prompts = [answer.prompt for answer in answered]
    return TagScore(
        side=side,
        name=tag,
        p_yes=bootstrap_mean(prompts, [answer.p_yes for answer in answered]),
        pass_rate=bootstrap_mean(prompts, [float(answer.p_yes >= PASS_THRESHOLD) for answer in answered]),
        num_failed=len(answers) - len(answered),
    )


def _group_difference(
    scope: str, name: str, old: Sequence[EvaluatedSample], new: Sequence[EvaluatedSample]
) -> Difference:
    pairs = [(a, b) for a, b in zip(old, new, strict=True) if a.reward is not None and b.reward is not None]
    prompts = [a.index for a, _ in pairs]
    return Difference(
        scope=scope,
        name=name,
        reward=paired_difference(prompts, [b.reward - a.reward for a, b in pairs]),
        pass_rate=paired_difference(prompts, [float(b.strict_pass) - float(a.strict_pass) for a, b in pairs]),
    )


def _tag_difference(tag: str, old: Sequence[_Answer], new: Sequence[_Answer]) -> Difference:
    others = {answer.key: answer.p_yes for answer in new}
    pairs = [(a, others[a.key]) for a in old if a.p_yes is not None and others[a.key] is not None]
    prompts = [a.prompt for a, _ in pairs]
    passed = [float(b >= PASS_THRESHOLD) - float(a.p_yes >= PASS_THRESHOLD) for a, b in pairs]
    return Difference(
        scope="tag",
        name=tag,
        reward=paired_difference(prompts, [b - a.p_yes for a, b in pairs]),
        pass_rate=paired_difference(prompts, passed),
    )


def _sample_rows(
    evaluations: Sequence[NamedEvaluation], records: Sequence[PromptRecord], folder: Path
) -> Iterator[dict[str, Any]]:
    for entry in evaluations:
        for sample in entry.evaluation.samples:
            record = records[sample.index]
            answers = {side: getattr(sample, side) for side in _SIDES}
            yield {
                "model": entry.model,
                "mode": entry.mode,
                "prompt_index": sample.index,
                "noise_seed": sample.seed,
                "category": sample.category,
                "prompt": sample.prompt,
                "thought": sample.text,
                "image": os.path.relpath(sample.image_file, folder) if sample.image_file else None,
                "reward": sample.reward,
                "semantic": _mean(answers["semantic"]),
                "quality": _mean(answers["quality"]),
                "strict_pass": sample.strict_pass,
                "answers": [
                    {"side": side, "tag": question.tag, "question": question.question, "p_yes": p_yes}
                    for side in _SIDES
                    for question, p_yes in zip(_questions(record, side), answers[side], strict=True)
                ],
            }


def _summary_csv(reports: Sequence[EvaluationReport]) -> str:
    parts = [field.name for field in fields(Estimate) if field.name in ("value", "low", "high")]
    columns = ["model", "mode", "scope", "name", "num_prompts", "num_samples", "num_failed"]
    columns += [
        f"{metric}_{part}" for metric in ("reward", "strict_pass_rate", "p_yes", "pass_rate") for part in parts
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()

    def write(entry: EvaluationReport, scope: str, score: GroupScore | TagScore, **metrics: Estimate) -> None:
        size = next(iter(metrics.values()))
        row = {"model": entry.model, "mode": entry.mode, "scope": scope, "name": score.name}
        row |= {"num_prompts": size.num_prompts, "num_samples": size.num_samples, "num_failed": score.num_failed}
        row |= {f"{name}_{part}": getattr(metric, part) for name, metric in metrics.items() for part in parts}
        writer.writerow(row)

    for entry in reports:
        for group in (entry.total, *entry.categories):
            write(entry, group.scope, group, reward=group.reward, strict_pass_rate=group.strict_pass_rate)
        for tag in entry.tags:
            write(entry, f"{tag.side} tag", tag, p_yes=tag.p_yes, pass_rate=tag.pass_rate)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    # A prompt may have half of a character, which no encoding holds.
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, path)


def _mean(answers: Sequence[float | None]) -> float | None:
    return sum(answers) / len(answers) if answers and None not in answers else None


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"…{text[1 - length :]}"


def _number(estimate: Estimate, sign: str = "") -> str:
    if estimate.value is None:
        return "-"
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"


def _percent(estimate: Estimate) -> str:
    if estimate.value is None:
        return "-"
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"


def _points(estimate: Estimate) -> str:
    if estimate.value is None:
        return "-"
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def _p_value(difference: PairedDifference) -> str:
    return "-" if difference.p_value is None else f"{difference.p_value:.4f}"
