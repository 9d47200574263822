# SPDX-License-Identifier: Apache-2.0

"""Paired comparisons of two models that were evaluated on the same prompts and noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from reward_models.evaluation.samples import EvaluatedSample, named_categories, samples_by_category
from reward_models.evaluation.scores import NamedEvaluation, QuestionAnswer, answers_by_tag, scored_pairs
from reward_models.evaluation.statistics import PairedDifference, holm_p_values, paired_difference
from reward_models.prompts.questions import PromptRecord


@dataclass(frozen=True)
class ScoreDifference:
    """
    Difference between a model and the baseline on a part of the samples.

    Args:
        scope (`str`): `"all"`, `"category"`, `"semantic tag"` or `"quality tag"`.
        name (`str`): Name of the category or tag, or `"all"`.
        reward ([`PairedDifference`]): Difference of the mean reward; for a tag, of the mean P(yes).
        pass_rate ([`PairedDifference`]): Difference of the strict pass rate; for a tag, of the share of answers that are yes.
    """

    scope: str
    name: str
    reward: PairedDifference
    pass_rate: PairedDifference


@dataclass(frozen=True)
class ModelComparison:
    """
    Comparison of two models that made images in the same mode.

    Args:
        baseline, model (`str`): Names of the models.
        mode (`str`): How the images were made.
        differences (`list[ScoreDifference]`):
            Over all prompts, then by category, then by tag. Categories and tags have p-values with Holm's correction, too.
    """

    baseline: str
    model: str
    mode: str
    differences: list[ScoreDifference]


def compare_models(
    baseline: NamedEvaluation, other: NamedEvaluation, records: Sequence[PromptRecord]
) -> ModelComparison:
    """
    Compare two evaluations of the same rows and noise seeds, sample by sample. A sample that has no score in one of them is
    left out.

    Args:
        baseline, other ([`NamedEvaluation`]): The evaluations.
        records (`Sequence[PromptRecord]`): The record of each row.

    Raises:
        `ValueError`: If the evaluations have different samples.
    """
    old, new = baseline.evaluation.samples, other.evaluation.samples
    if [(s.seed, s.index) for s in old] != [(s.seed, s.index) for s in new]:
        raise ValueError(f"{baseline.model} and {other.model} were evaluated on other prompts or noise seeds")
    total, *differences = _group_differences(old, new)
    new_answers = answers_by_tag(new, records)
    for (side, tag), answers in answers_by_tag(old, records).items():
        differences.append(_tag_difference(side, tag, answers, new_answers[side, tag]))
    return ModelComparison(baseline.model, other.model, baseline.mode, [total, *_corrected(differences)])


def compare_categories(old: Sequence[EvaluatedSample], new: Sequence[EvaluatedSample]) -> list[ScoreDifference]:
    """
    Compare the samples of two evaluations of the same rows and noise seeds.

    Returns:
        `list[ScoreDifference]`: Over all prompts, then by category, in order of appearance.
    """
    total, *differences = _group_differences(old, new)
    return [total, *_corrected(differences)]


def _group_differences(old: Sequence[EvaluatedSample], new: Sequence[EvaluatedSample]) -> list[ScoreDifference]:
    new_groups = samples_by_category(new)
    return [
        _group_difference("all", "all", old, new),
        *(
            _group_difference("category", name, group, new_groups[name])
            for name, group in named_categories(old).items()
        ),
    ]


def _corrected(differences: Sequence[ScoreDifference]) -> list[ScoreDifference]:
    """Correct the p-values of several comparisons of one pair of models, for each metric."""
    rewards = _with_holm([entry.reward for entry in differences])
    pass_rates = _with_holm([entry.pass_rate for entry in differences])
    return [
        replace(entry, reward=reward, pass_rate=pass_rate)
        for entry, reward, pass_rate in zip(differences, rewards, pass_rates, strict=True)
    ]


def _with_holm(differences: Sequence[PairedDifference]) -> list[PairedDifference]:
    corrected = holm_p_values([difference.p_value for difference in differences])
    return [replace(entry, holm_p_value=p_value) for entry, p_value in zip(differences, corrected, strict=True)]


def _group_difference(
    scope: str, name: str, old: Sequence[EvaluatedSample], new: Sequence[EvaluatedSample]
) -> ScoreDifference:
    pairs = scored_pairs(old, new)
    prompts = [before.index for before, _ in pairs]
    return ScoreDifference(
        scope=scope,
        name=name,
        reward=paired_difference(prompts, [after.reward - before.reward for before, after in pairs]),
        pass_rate=paired_difference(prompts, [after.strict_pass - before.strict_pass for before, after in pairs]),
    )


def _tag_difference(
    side: str, tag: str, old: Sequence[QuestionAnswer], new: Sequence[QuestionAnswer]
) -> ScoreDifference:
    pairs = [(a, b) for a, b in zip(old, new, strict=True) if a.p_yes is not None and b.p_yes is not None]
    prompts = [before.sample.index for before, _ in pairs]
    return ScoreDifference(
        scope=f"{side} tag",
        name=tag,
        reward=paired_difference(prompts, [after.p_yes - before.p_yes for before, after in pairs]),
        pass_rate=paired_difference(prompts, [after.passed - before.passed for before, after in pairs]),
    )
