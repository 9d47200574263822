# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from pathlib import Path

import pytest

from alphagrpo_ext.report import Comparison, ImagePair, ReportStore, ReportTurn, RunRecord, ScoreTable, TrajectoryGroup
from alphagrpo_ext.report.store import PromptReward, choose_groups


MakeGroup = Callable[..., TrajectoryGroup]


def test_everything_comes_back(tmp_path: Path, make_group: MakeGroup) -> None:
    store = ReportStore(tmp_path)
    store.restart(0)
    group = make_group(rewards=[0.9, None], earlier_step=3, earlier_reward=0.5)
    comparison = Comparison(
        ScoreTable(["category", "reward"], [["all", "0.5"]]),
        [ImagePair("a circle", "shape", ReportTurn("", "data:a"), ReportTurn("thought", "data:b"), 0.1, 0.9)],
    )
    store.add_groups([group])
    store.save_comparison(comparison)
    store.save_logs([{"step": 1, "reward": float("nan"), "loss": 0.5}])
    assert store.groups() == [group]
    assert store.comparison() == comparison
    assert store.run() is None
    run = RunRecord("train.py", {"torch": "2"}, {"seed": "1"}, {})
    store.save_run(run)
    assert store.run() == run
    assert store.logs() == [{"step": 1, "reward": None, "loss": 0.5}]


def test_resumed_run_keeps_what_was_before_the_checkpoint(tmp_path: Path, make_group: MakeGroup) -> None:
    store = ReportStore(tmp_path)
    store.restart(0)
    store.add_groups([make_group(step) for step in (1, 2, 3)])
    store.add_prompt_rewards([PromptReward(step, "prompt", 0.5) for step in (1, 2, 3)])
    # As a kill in the middle of a line leaves it.
    with (store.folder / "prompts.jsonl").open("a") as file:
        file.write('{"step": 4, "pro')
    assert [entry.step for entry in store.prompt_rewards()] == [1, 2, 3]
    store.restart(2)
    assert [group.step for group in store.groups()] == [1, 2]
    store.add_prompt_rewards([PromptReward(3, "prompt", 0.7)])
    assert [entry.step for entry in store.prompt_rewards()] == [1, 2, 3]
    store.restart(0)
    assert store.groups() == [] and store.prompt_rewards() == []


def test_newest_first_and_most_informative_groups_are_kept(make_group: MakeGroup) -> None:
    dull, informative = [0.6] * 4, [0.9, 0.8, 0.2, 0.1]
    groups = [make_group(step, rewards=informative if step in (4, 6) else dull) for step in range(1, 11)]
    # 24 trajectories are 6 groups: three of the newest, the first, and two more.
    assert [group.step for group in choose_groups(groups, 24)] == [1, 4, 6, 8, 9, 10]
    assert choose_groups(groups, 40) == groups
    # A single group is never left out.
    assert [group.step for group in choose_groups(groups, 2)] == [10]


def test_files_of_groups_that_are_not_kept_go(tmp_path: Path, make_group: MakeGroup) -> None:
    store = ReportStore(tmp_path)
    store.restart(0)
    store.add_groups([make_group(step, index) for step in (1, 2, 3) for index in (0, 1)])
    store.prune(8)
    assert sum(len(group.trajectories) for group in store.groups()) == 8
    assert len(list(store.folder.glob("group-*.json"))) == 2


@pytest.mark.parametrize(
    ("rewards", "expected"), [([0.9, 0.3], 0.6 + 0.5), ([0.5, 0.495], 0.005), ([None, None], 0.0)], ids=str
)
def test_informativeness(make_group: MakeGroup, rewards: list[float | None], expected: float) -> None:
    """Spread, and the share that is worse than the 0.5 of the given image by more than 0.01."""
    assert make_group(rewards=rewards).informativeness == pytest.approx(expected)
