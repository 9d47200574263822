# SPDX-License-Identifier: Apache-2.0

"""Evaluations before and after training, as a section of the report of a run."""

from __future__ import annotations

from alphagrpo_ext.report import Comparison, ImagePair, ReportTurn, ScoreTable
from alphagrpo_ext.report.thumbnails import data_url
from reward_models.evaluation.samples import EvaluatedSample, Evaluation
from reward_models.evaluation.scores import scored_pairs


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
        table=_score_table(before, after),
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


def _score_table(before: Evaluation, after: Evaluation) -> ScoreTable:
    scores = [(name, old, after.categories[name]) for name, old in before.categories.items()]
    return ScoreTable(
        header=["Category", "Samples", "Reward before", "after", "change", "Strict pass before", "after", "change"],
        rows=[
            [
                name.replace("_", " "),
                str(old.num_samples),
                *(f"{old.reward:.3f}", f"{new.reward:.3f}", f"{new.reward - old.reward:+.3f}"),
                *(f"{old.strict_pass_rate:.1%}", f"{new.strict_pass_rate:.1%}"),
                f"{100 * (new.strict_pass_rate - old.strict_pass_rate):+.1f}",
            ]
            for name, old, new in [*scores, ("all", before.total, after.total)]
        ],
    )
