# SPDX-License-Identifier: Apache-2.0

"""
The data of a report on disk.

The folder `report` of a run is the source of truth, and the page is a view of it: `write_report` makes the page from the folder
alone, during the run or later. Each group of trajectories is a file of its own, which is replaced as a whole. A run that resumes
from a checkpoint deletes what is later than the checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphagrpo_ext.files import JsonLinesFile, read_json_lines, write_text
from alphagrpo_ext.report.records import Comparison, TrajectoryGroup
from alphagrpo_ext.report.run_record import RunRecord


if TYPE_CHECKING:
    from pydantic import TypeAdapter


FOLDER_NAME = "report"
GROUP_NAME = re.compile(r"group-(\d+)-(\d+)\.json")


@dataclass(frozen=True)
class PromptReward:
    """
    The mean reward of a group.

    Args:
        step (`int`): Optimizer step.
        prompt (`str`): Digest of the task and the prompt of the group.
        reward (`float`): Mean reward.
    """

    step: int
    prompt: str
    reward: float


class ReportStore:
    """
    The folder `report` of a run. One process at a time writes to it.

    Args:
        output_dir (`str` or `PathLike`): Folder of the run.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.folder = Path(output_dir) / FOLDER_NAME
        self._prompts_path = self.folder / "prompts.jsonl"
        self._logs_path = self.folder / "logs.json"
        self._comparison_path = self.folder / "comparison.json"
        self._run_path = self.folder / "run.json"

    def restart(self, step: int) -> None:
        """
        Delete what belongs to later steps. A new run deletes everything; a resumed run deletes what it will make again.

        Args:
            step (`int`): Last optimizer step to keep; 0 for none.
        """
        for path, group_step, _ in self._group_files():
            if group_step > step:
                path.unlink()
        rewards = [entry for entry in self.prompt_rewards() if entry.step <= step]
        write_text(self._prompts_path, "".join(_line(entry) for entry in rewards))
        # The next log writes the trainer's history again, and the evaluation after training is repeated.
        self._comparison_path.unlink(missing_ok=True)
        self._logs_path.unlink(missing_ok=True)

    def add_groups(self, groups: Sequence[TrajectoryGroup]) -> None:
        """Write a file for each group."""
        for group in groups:
            path = self.folder / f"group-{group.step:06d}-{group.index:04d}.json"
            write_text(path, _adapter(TrajectoryGroup).dump_json(group).decode())

    def groups(self) -> list[TrajectoryGroup]:
        """All groups, in the order of their steps."""
        return [_adapter(TrajectoryGroup).validate_json(path.read_bytes()) for path, _, _ in self._group_files()]

    def prune(self, max_trajectories: int) -> None:
        """Delete groups beyond a number of trajectories; see [`choose_groups`]."""
        kept = {(group.step, group.index) for group in choose_groups(self.groups(), max_trajectories)}
        for path, step, index in self._group_files():
            if (step, index) not in kept:
                path.unlink()

    def _group_files(self) -> list[tuple[Path, int, int]]:
        """Path, step and index of each group, in the order of step and index."""
        found = [(path, GROUP_NAME.fullmatch(path.name)) for path in self.folder.glob("group-*.json")]
        files = [(path, int(match[1]), int(match[2])) for path, match in found if match]
        return sorted(files, key=lambda file: file[1:])

    def add_prompt_rewards(self, entries: Sequence[PromptReward]) -> None:
        """Append mean rewards of groups."""
        with self._prompts_path.open("a", encoding="utf-8") as file:
            file.write("".join(_line(entry) for entry in entries))

    def prompt_rewards(self) -> list[PromptReward]:
        """Mean rewards of all groups. An incomplete last line, which a killed process may leave, is removed."""
        with JsonLinesFile(self._prompts_path):
            return [PromptReward(**row) for _, row in read_json_lines(self._prompts_path)]

    def save_logs(self, logs: Sequence[dict[str, Any]]) -> None:
        """Write the trainer's `log_history`."""
        write_text(self._logs_path, json.dumps(without_nan(list(logs)), allow_nan=False))

    def logs(self) -> list[dict[str, Any]]:
        """The trainer's `log_history`; empty if there is none yet."""
        return json.loads(self._logs_path.read_text(encoding="utf-8")) if self._logs_path.is_file() else []

    def save_comparison(self, comparison: Comparison) -> None:
        """Write the comparison of the evaluations before and after training."""
        write_text(self._comparison_path, _adapter(Comparison).dump_json(comparison).decode())

    def comparison(self) -> Comparison | None:
        """The comparison of the evaluations before and after training, or `None`."""
        path = self._comparison_path
        return _adapter(Comparison).validate_json(path.read_bytes()) if path.is_file() else None

    def save_run(self, run: RunRecord) -> None:
        """Write how the run was started."""
        write_text(self._run_path, _adapter(RunRecord).dump_json(run).decode())

    def run(self) -> RunRecord | None:
        """How the run was started, or `None`."""
        path = self._run_path
        return _adapter(RunRecord).validate_json(path.read_bytes()) if path.is_file() else None


def choose_groups(groups: Sequence[TrajectoryGroup], max_trajectories: int) -> list[TrajectoryGroup]:
    """
    Choose the groups that a report keeps. The newest groups fill half of the trajectories. The other half are the groups of the
    first step, then the most informative ones.

    Args:
        groups (`Sequence[TrajectoryGroup]`): All groups, in the order of their steps.
        max_trajectories (`int`): Largest number of trajectories.

    Returns:
        `list[TrajectoryGroup]`: The chosen groups, in the same order. The newest group is always among them.
    """
    if sum(len(group.trajectories) for group in groups) <= max_trajectories:
        return list(groups)
    places = range(len(groups))
    newest = list(reversed(places))
    first = [place for place in places if groups[place].step == groups[0].step]
    informative = sorted(places, key=lambda place: (-groups[place].informativeness, -place))
    chosen, count = {newest[0]}, len(groups[newest[0]].trajectories)
    for candidates, limit in ((newest, max_trajectories // 2), (first + informative, max_trajectories)):
        for place in candidates:
            size = len(groups[place].trajectories)
            if place not in chosen and count + size <= limit:
                chosen.add(place)
                count += size
    return [groups[place] for place in sorted(chosen)]


def without_nan(value: Any) -> Any:
    """Replace each number in nested lists and dictionaries that JSON cannot represent (NaN, infinity) by `None`."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    """Reads and writes a dataclass as JSON. NaN becomes `null`."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _line(entry: PromptReward) -> str:
    return json.dumps(asdict(entry)) + "\n"
