# SPDX-License-Identifier: Apache-2.0

"""Evaluations as parts of a report."""

from __future__ import annotations

from alphagrpo_ext.report import Comparison, Pair, Table, Turn
from alphagrpo_ext.report.thumbnails import data_url
from reward_models.evaluation.samples import Evaluation


def compare(before: Evaluation, after: Evaluation, num_pairs: int = 96, max_image_size: int = 256) -> Comparison:
    """
    Two evaluations of the same rows and noise for a report.

    Args:
        before, after ([`Evaluation`]): The evaluations.
        num_pairs (`int`, *optional*, defaults to `96`):
            Most pairs of images: a third those that gained most, a third those that lost most, and the rest equally spaced
            over the others. They stand in the order of evaluation.
        max_image_size (`int`, *optional*, defaults to `256`): Longest side of an image, in pixels.
    """
    scored = [
        (old, new)
        for old, new in zip(before.samples, after.samples, strict=True)
        if old.reward is not None and new.reward is not None
    ]
    places = sorted(range(len(scored)), key=lambda i: scored[i][1].reward - scored[i][0].reward)
    if len(places) > num_pairs:
        third = num_pairs // 3
        middle = sorted(places[third : len(places) - third])
        count = num_pairs - 2 * third
        spaced = [middle[i * len(middle) // count] for i in range(count)]
        places = [*places[:third], *spaced, *places[len(places) - third :]]
    return Comparison(
        table=_table(before, after),
        pairs=[
            Pair(
                prompt=old.prompt,
                category=old.category,
                before=Turn(old.text, data_url(old.image, max_image_size)),
                after=Turn(new.text, data_url(new.image, max_image_size)),
                reward_before=old.reward,
                reward_after=new.reward,
            )
            for old, new in (scored[place] for place in sorted(places))
        ],
    )


def _table(before: Evaluation, after: Evaluation) -> Table:
    scores = [(name, old, after.categories[name]) for name, old in before.categories.items()]
    return Table(
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
