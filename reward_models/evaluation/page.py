# SPDX-License-Identifier: Apache-2.0

"""Evaluations before and after training, as a section of the report of a run."""

from __future__ import annotations

from alphagrpo_ext.report import Comparison, ImagePair, ReportTurn, ScoreTable
from alphagrpo_ext.report.thumbnails import data_url
from reward_models.evaluation.comparisons import ScoreDifference, compare_categories
from reward_models.evaluation.samples import CategoryScore, EvaluatedSample, Evaluation
from reward_models.evaluation.scores import scored_pairs
from reward_models.evaluation.statistics import PairedDifference
from reward_models.evaluation.text_tables import (
    FEW_PROMPTS_NOTE,
    count_samples,
    format_interval,
    format_p_value,
    has_few_prompts,
)


_NOTE = (
    "Strict pass: share of images for which every question is answered yes. In brackets: 95% interval over prompts. p: how "
    "probable a change at least this large is if training changed nothing; p, Holm: the same, corrected for the number of categories."
)

_CHOSEN_NOTE = " The pairs below are no fair sample: a third have the largest gains, and a third the largest losses."


def make_report_comparison(
    before: Evaluation, after: Evaluation, num_pairs: int = 96, max_image_size: int = 256
) -> Comparison:
    """
    Make the comparison of two evaluations of the same rows and noise.

    Args:
        before, after ([`Evaluation`]): The evaluations.
        num_pairs (`int`, *optional*, defaults to `96`):
            Largest number of image pairs. A third are those with the largest gain, a third those with the largest loss, and
            the others are equally spaced over the rest. They are shown in the order of evaluation.
        max_image_size (`int`, *optional*, defaults to `256`): Largest side of an image, in pixels.
    """
    scored = scored_pairs(before.samples, after.samples)
    changes = [new.reward - old.reward for old, new in scored]
    return Comparison(
        # Of samples with both scores, so that a change is the difference of what it stands beside.
        table=_score_table(
            Evaluation([old for old, _ in scored]),
            Evaluation([new for _, new in scored]),
            note=_NOTE + (_CHOSEN_NOTE if len(scored) > num_pairs else ""),
        ),
        pairs=[_image_pair(*scored[place], max_image_size) for place in _places_to_show(changes, num_pairs)],
    )


def _places_to_show(changes: list[float], num_pairs: int) -> list[int]:
    """Indices of the pairs to show, in ascending order."""
    places = sorted(range(len(changes)), key=lambda place: changes[place])
    if len(places) > num_pairs:
        third = num_pairs // 3
        middle = sorted(places[third : len(places) - third])
        count = num_pairs - 2 * third
        spaced = [middle[i * len(middle) // count] for i in range(count)]
        places = [*places[:third], *spaced, *places[len(places) - third :]]
    return sorted(places)


def _image_pair(old: EvaluatedSample, new: EvaluatedSample, max_image_size: int) -> ImagePair:
    return ImagePair(
        prompt=old.prompt,
        category=old.category,
        before=ReportTurn(old.text, data_url(old.load_image(), max_image_size)),
        after=ReportTurn(new.text, data_url(new.load_image(), max_image_size)),
        reward_before=old.reward,
        reward_after=new.reward,
    )


def _score_table(before: Evaluation, after: Evaluation, note: str) -> ScoreTable:
    total, *categories = compare_categories(before.samples, after.samples)
    few = any(has_few_prompts(entry.reward.difference) for entry in (total, *categories))
    change = ["change", "p", "p, Holm"]
    return ScoreTable(
        header=[
            "Category",
            f"Samples ({FEW_PROMPTS_NOTE})" if few else "Samples",
            *("Reward before", "after", *change),
            *("Strict pass before", "after", *change),
        ],
        rows=[
            [
                entry.name.replace("_", " "),
                count_samples(entry.reward.difference),
                *(f"{old.reward:.3f}", f"{new.reward:.3f}"),
                *_change(entry.reward, "+.3f"),
                *(f"{old.strict_pass_rate:.1%}", f"{new.strict_pass_rate:.1%}"),
                *_change(entry.pass_rate, "+.1f", scale=100),
            ]
            for entry in (*categories, total)
            for old, new in [_scores(entry, before, after)]
        ],
        note=note,
    )


def _scores(entry: ScoreDifference, before: Evaluation, after: Evaluation) -> tuple[CategoryScore, CategoryScore]:
    if entry.scope == "all":
        return before.total, after.total
    return before.categories[entry.name], after.categories[entry.name]


def _change(difference: PairedDifference, form: str, scale: float = 1) -> tuple[str, str, str]:
    """The change with its interval, its p-value, and that with Holm's correction for the number of categories."""
    return (
        format_interval(difference.difference, form, scale),
        format_p_value(difference.p_value),
        format_p_value(difference.holm_p_value),
    )
