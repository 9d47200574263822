# SPDX-License-Identifier: Apache-2.0

import pytest
from PIL import Image

from alphagrpo_ext.report import ImagePair
from reward_models.evaluation.page import make_report_comparison
from reward_models.evaluation.samples import EvaluatedSample, Evaluation


def evaluation(rewards: list[float | None]) -> Evaluation:
    image = Image.new("RGB", (24, 24))
    return Evaluation(
        [
            EvaluatedSample(
                i, 0, "odd" if i % 2 else "even", f"prompt {i}", "", image, reward, reward and reward > 0.5
            )
            for i, reward in enumerate(rewards)
        ]
    )


def change(pair: ImagePair) -> float:
    return pair.reward_after - pair.reward_before


def test_extremes_and_a_fair_sample_of_the_others_are_shown() -> None:
    changes = [0.0, 0.3, -0.3, 0.01, 0.02, 0.4, -0.4, 0.03, 0.04, 0.05, 0.06, 0.07]
    comparison = make_report_comparison(
        evaluation([0.5] * 12), evaluation([0.5 + value for value in changes]), num_pairs=6
    )
    shown = [round(change(pair), 2) for pair in comparison.pairs]
    # In the order of evaluation: two of the others, two that lost most, two that gained most.
    assert {0.4, 0.3, -0.3, -0.4} < set(shown) and len(shown) == 6
    assert [pair.prompt for pair in comparison.pairs] == sorted(
        (pair.prompt for pair in comparison.pairs), key=lambda prompt: int(prompt.split()[1])
    )


def test_samples_without_a_reward_are_left_out_of_the_pairs() -> None:
    comparison = make_report_comparison(evaluation([0.5, None, 0.2]), evaluation([0.6, 0.9, None]))
    assert [(pair.prompt, change(pair)) for pair in comparison.pairs] == [("prompt 0", pytest.approx(0.1))]


def test_table_has_a_line_for_each_category_and_one_for_all() -> None:
    table = make_report_comparison(evaluation([0.2, 0.6]), evaluation([0.8, 0.4])).table
    assert len({len(row) for row in [table.header, *table.rows]}) == 1
    assert table.rows == [
        ["even", "1", "0.200", "0.800", "+0.600", "0.0%", "100.0%", "+100.0"],
        ["odd", "1", "0.600", "0.400", "-0.200", "100.0%", "0.0%", "-100.0"],
        ["all", "2", "0.400", "0.600", "+0.200", "50.0%", "50.0%", "+0.0"],
    ]
