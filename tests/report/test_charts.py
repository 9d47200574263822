# SPDX-License-Identifier: Apache-2.0

import pytest

from alphagrpo_ext.report.charts import Chart, make_charts


def by_title(logs: list[dict]) -> dict[str, Chart]:
    return {chart.title: chart for chart in make_charts(logs)}


def test_metrics_that_belong_together_share_a_chart() -> None:
    found = by_title([{"step": step, "reward": step / 10, "holdout/reward": 0.5} for step in (1, 2)])
    training, holdout = found["Reward"].series
    assert (training.name, training.points) == ("training", [(1, 0.1), (2, 0.2)])
    assert (holdout.name, holdout.points) == ("hold-out judge", [(1, 0.5), (2, 0.5)])


def test_each_tag_has_a_chart_with_the_bounds_of_a_share() -> None:
    found = by_title([{"step": 1, "dvreward/semantic/Count": 0.5, "dvreward/quality/Geometry": 0.25}])
    assert found.keys() == {"Count (semantic)", "Geometry (quality)"}
    assert all((chart.section, chart.lower, chart.upper) == ("Pass rate by tag", 0, 1) for chart in found.values())


def test_no_metric_is_lost() -> None:
    found = by_title([{"step": 1, "mine/curiosity": 2.0, "eval_reward": 0.5}])
    assert {(title, chart.section) for title, chart in found.items()} == {
        ("mine/curiosity", "Others"),
        ("eval_reward", "Others"),
    }


@pytest.mark.parametrize(
    "logs", [[], [{"step": 1, "reward": None}], [{"reward": 0.5}], [{"step": 1, "train_runtime": 3.0}]], ids=str
)
def test_what_is_not_a_curve_is_not_drawn(logs: list[dict]) -> None:
    assert make_charts(logs) == []


def test_steps_rise_and_the_last_entry_of_a_step_holds() -> None:
    logs = [{"step": 2, "loss": 0.2}, {"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.3}]
    assert by_title(logs)["Loss"].series[0].points == [(1, 0.1), (2, 0.3)]
