# SPDX-License-Identifier: Apache-2.0

"""What a report is made from, on disk: small files that outlive the run, of which none is ever half-written."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alphagrpo_ext.report.records import Comparison, TrajectoryGroup


FOLDER_NAME = "report"
GROUP_NAME = re.compile(r"group-(\d+)-(\d+)\.json")


@dataclass(frozen=True)
class PromptReward:
    """
    Args:
        step (`int`): Optimizer step.
        prompt (`str`): Digest of what the group was asked.
        reward (`float`): Mean reward of the group.
    """

    step: int
    prompt: str
    reward: float


class ReportStore:
    """
    The folder `report` of a run. One process writes to it at a time.

    Args:
        output_dir (`str` or `PathLike`): Folder of the run.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.folder = Path(output_dir) / FOLDER_NAME

    @property
    def _prompts_path(self) -> Path:
        return self.folder / "prompts.jsonl"

    def restart(self, step: int) -> None:
        """
        Forget what a run had after a step: all of it for one that begins anew, and for a resumed one what is made again.

        Args:
            step (`int`): Last optimizer step to keep; 0 for none.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for path, group_step, _ in self._group_files():
            if group_step > step:
                path.unlink()
        kept = [entry for entry in self.prompt_rewards() if entry.step <= step]
        replace_text(self._prompts_path, "".join(_line(entry) for entry in kept))
        # The trainer's history, which goes on, is written with the next log; the evaluation after training comes again.
        for name in ("comparison.json", "logs.json"):
            (self.folder / name).unlink(missing_ok=True)

    def add_groups(self, groups: Sequence[TrajectoryGroup]) -> None:
        for group in groups:
            path = self.folder / f"group-{group.step:06d}-{group.index:04d}.json"
            replace_text(path, json.dumps(without_nan(group.to_json()), allow_nan=False))

    def groups(self) -> list[TrajectoryGroup]:
        """All groups, in the order of their steps."""
        return [
            TrajectoryGroup.from_json(json.loads(path.read_text(encoding="utf-8")))
            for path, _, _ in self._group_files()
        ]

    def prune(self, max_trajectories: int) -> None:
        """Remove groups beyond a number of trajectories; see [`choose_groups`]."""
        groups = self.groups()
        kept = {(group.step, group.index) for group in choose_groups(groups, max_trajectories)}
        for path, step, index in self._group_files():
            if (step, index) not in kept:
                path.unlink()

    def _group_files(self) -> list[tuple[Path, int, int]]:
        """Files of groups with step and index, in this order."""
        found = [(path, GROUP_NAME.fullmatch(path.name)) for path in self.folder.glob("group-*.json")]
        files = [(path, int(match[1]), int(match[2])) for path, match in found if match]
        return sorted(files, key=lambda file: file[1:])

    def add_prompt_rewards(self, entries: Sequence[PromptReward]) -> None:
        with self._prompts_path.open("a", encoding="utf-8") as file:
            file.write("".join(_line(entry) for entry in entries))

    def prompt_rewards(self) -> list[PromptReward]:
        """Mean rewards of all groups, but for what was being written when a process was killed."""
        if not self._prompts_path.is_file():
            return []
        whole, _, _ = self._prompts_path.read_text(encoding="utf-8").rpartition("\n")
        return [PromptReward(**json.loads(line)) for line in whole.splitlines()]

    def save_logs(self, logs: Sequence[dict[str, Any]]) -> None:
        """Keep the trainer's `log_history`."""
        replace_text(self.folder / "logs.json", json.dumps(without_nan(list(logs)), allow_nan=False))

    def logs(self) -> list[dict[str, Any]]:
        path = self.folder / "logs.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def save_comparison(self, comparison: Comparison) -> None:
        replace_text(self.folder / "comparison.json", json.dumps(without_nan(comparison.to_json()), allow_nan=False))

    def comparison(self) -> Comparison | None:
        path = self.folder / "comparison.json"
        return Comparison.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def choose_groups(groups: Sequence[TrajectoryGroup], max_trajectories: int) -> list[TrajectoryGroup]:
    """
    Which groups a report keeps: the newest, up to half of the trajectories, those of the first step that has any, and of
    the others the most telling.

    Args:
        groups (`Sequence[TrajectoryGroup]`): In the order of their steps.
        max_trajectories (`int`): Most trajectories in the end.

    Returns:
        `list[TrajectoryGroup]`: In the same order. At least the newest one.
    """
    if sum(len(group.trajectories) for group in groups) <= max_trajectories:
        return list(groups)
    places = range(len(groups))
    newest = list(reversed(places))
    first = [place for place in places if groups[place].step == groups[0].step]
    telling = sorted(places, key=lambda place: (-groups[place].tellingness, -place))
    chosen, count = {newest[0]}, len(groups[newest[0]].trajectories)
    for candidates, limit in ((newest, max_trajectories // 2), (first + telling, max_trajectories)):
        for place in candidates:
            size = len(groups[place].trajectories)
            if place not in chosen and count + size <= limit:
                chosen.add(place)
                count += size
    return [groups[place] for place in sorted(chosen)]


def replace_text(path: Path, text: str) -> None:
    """Write a file that is at any time the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def without_nan(value: Any) -> Any:
    """Nested lists and dictionaries with `None` for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(entry: PromptReward) -> str:
    return json.dumps(asdict(entry)) + "\n"
