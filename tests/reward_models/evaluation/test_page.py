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
    assert "no fair sample" in comparison.table.note
    assert "no fair sample" not in make_report_comparison(evaluation([0.5]), evaluation([0.6])).table.note
    assert [pair.prompt for pair in comparison.pairs] == sorted(
        (pair.prompt for pair in comparison.pairs), key=lambda prompt: int(prompt.split()[1])
    )


def test_samples_without_a_reward_are_left_out_of_the_pairs() -> None:
    comparison = make_report_comparison(evaluation([0.5, None, 0.2]), evaluation([0.6, 0.9, None]))
    assert [(pair.prompt, change(pair)) for pair in comparison.pairs] == [("prompt 0", pytest.approx(0.1))]


def test_table_has_a_line_for_each_category_and_one_for_all() -> None:
    table = make_report_comparison(evaluation([0.2, 0.6]), evaluation([0.8, 0.4])).table
    assert len({len(row) for row in [table.header, *table.rows]}) == 1
    once = ["1.0000", "1.0000"]
    assert table.rows[:2] == [
        ["even", "1*", "0.200", "0.800", "+0.600", *once, "0.0%", "100.0%", "+100.0", *once],
        ["odd", "1*", "0.600", "0.400", "-0.200", *once, "100.0%", "0.0%", "-100.0", *once],
    ]
    assert table.rows[2][:4] == ["all", "2*", "0.400", "0.600"]
    # The total is one comparison, so nothing is corrected.
    assert table.rows[2][6] == table.rows[2][11] == "-"
    assert table.header[1] == "Samples (* fewer than 20 prompts: intervals by resampling are too narrow to rely on)"


def test_table_shows_intervals_and_corrected_p_values() -> None:
    table = make_report_comparison(evaluation([0.4] * 50), evaluation([0.45 + 0.005 * i for i in range(50)])).table
    even = dict(zip(table.header[2:7], table.rows[0][2:7], strict=True))
    assert table.header[:2] == ["Category", "Samples"] and table.rows[0][:2] == ["even", "25"]
    assert even["change"].startswith("+0.170 [+0.1") and even["change"].endswith("]")
    assert float(even["p, Holm"]) == pytest.approx(2 * float(even["p"]), abs=1e-4)


def test_table_counts_samples_with_both_scores() -> None:
    table = make_report_comparison(evaluation([0.2, 0.6, 0.4]), evaluation([0.8, 0.4, None])).table
    assert [row[:4] for row in table.rows][::2] == [["even", "1*", "0.200", "0.800"], ["all", "2*", "0.400", "0.600"]]
