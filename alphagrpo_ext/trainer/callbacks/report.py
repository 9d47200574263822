# SPDX-License-Identifier: Apache-2.0

"""Keeps the report of a run up to date."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState

from alphagrpo_ext.messages import prompt_text
from alphagrpo_ext.report.answers import COLUMN_SUFFIX, parse_answers
from alphagrpo_ext.report.page import write_report
from alphagrpo_ext.report.records import ReportTurn, TrajectoryGroup, TrajectoryRecord
from alphagrpo_ext.report.run_record import describe_run
from alphagrpo_ext.report.store import PromptReward, ReportStore
from alphagrpo_ext.report.thumbnails import data_url
from alphagrpo_ext.trainer.callbacks.rollout_event import ScoredRollout
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from alphagrpo_ext.trajectory import ImageSegment, Trajectory


class ReportCallback(TrainerCallback):
    """
    Writes `report.html` in `output_dir`, and the data of the page in its folder `report`; see
    [`~alphagrpo_ext.report.write_report`].

    Every `report_steps` steps, and at the last one, some groups of the rollout are added: half of them are the most informative
    ones, and half the first ones, which are a fair sample. The page is written with the logs, at most once per `report_steps` steps, and when
    training ends. A run that resumes from a checkpoint keeps what was there at that step.
    """

    def __init__(self) -> None:
        self._written_at = 0
        self._earlier: dict[str, PromptReward] = {}

    def on_train_begin(
        self, args: AlphaGRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        store = ReportStore(args.output_dir)
        store.restart(state.global_step)
        settings = {f.name: getattr(args, f.name) for f in fields(args)}
        store.save_run(describe_run(settings, args.changed_arguments, sys.argv))
        self._written_at = state.global_step
        self._earlier = {entry.prompt: entry for entry in store.prompt_rewards()}

    def on_rollout(
        self,
        args: AlphaGRPOConfig,
        state: TrainerState,
        control: TrainerControl,
        rollout: ScoredRollout,
        log_metric: Callable[[str, float], None],
    ) -> None:
        step = state.global_step + 1
        prompts = gather_object([_digest(row) for row in rollout.rows])[:: rollout.group_size]
        period = max(1, args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps)
        groups: list[TrajectoryGroup] = []
        if is_due(step, args.report_steps, period, state.max_steps):
            groups = self._groups(args, step, rollout, prompts)
        if not state.is_world_process_zero:
            return
        means = rollout.rewards.view(-1, rollout.group_size).nanmean(dim=1).tolist()
        entries = [
            PromptReward(step, prompt, mean) for prompt, mean in zip(prompts, means, strict=True) if mean == mean
        ]
        self._earlier |= {entry.prompt: entry for entry in entries}
        store = ReportStore(args.output_dir)
        store.add_prompt_rewards(entries)
        if groups:
            store.add_groups(groups)
            store.prune(args.report_num_trajectories)

    def _groups(
        self, args: AlphaGRPOConfig, step: int, rollout: ScoredRollout, prompts: Sequence[str]
    ) -> list[TrajectoryGroup]:
        """Records of the groups to show. All processes choose the same groups, and each describes its own trajectories."""
        size = rollout.group_size
        chosen = groups_to_show(
            rollout.rewards.view(-1, size),
            rollout.initial_rewards.view(-1, size),
            # A page shows at least four rollouts: half of it is the newest.
            max(1, args.report_num_trajectories // (8 * size)),
        )
        parts = [
            ((rollout.offset + i) // size, _record(rollout, i, args.report_image_size), _request(rollout.rows[i]))
            for i in range(len(rollout.trajectories))
            if (rollout.offset + i) // size in chosen
        ]
        members: dict[int, list[TrajectoryRecord]] = {}
        requests: dict[int, tuple[str, str]] = {}
        for index, record, request in gather_object(parts):
            members.setdefault(index, []).append(record)
            requests[index] = request
        groups = []
        for index, records in members.items():
            task, prompt = requests[index]
            earlier = self._earlier.get(prompts[index])
            groups.append(
                TrajectoryGroup(
                    step=step,
                    index=index,
                    task=task,
                    prompt=prompt,
                    trajectories=sorted(records, key=lambda record: -record.image_advantage),
                    earlier_step=earlier and earlier.step,
                    earlier_reward=earlier and earlier.reward,
                )
            )
        return groups

    def on_log(self, args: AlphaGRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        first = self._written_at == 0
        if state.is_world_process_zero and (first or state.global_step - self._written_at >= args.report_steps):
            self._write(args, state)

    def on_train_end(self, args: AlphaGRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._write(args, state)

    def _write(self, args: AlphaGRPOConfig, state: TrainerState) -> None:
        ReportStore(args.output_dir).save_logs(state.log_history)
        write_report(args.output_dir)
        self._written_at = state.global_step


def is_due(step: int, every: int, period: int, num_steps: int) -> bool:
    """
    Whether a rollout is shown: the first one, the last one, and the first one after each multiple of `every` steps.

    Args:
        step (`int`): Optimizer step that the rollout is for, from 1.
        every (`int`): Steps between rollouts that are shown.
        period (`int`): Optimizer steps per rollout.
        num_steps (`int`): Optimizer steps of the run.
    """
    return step == 1 or step + period > num_steps or step // every != (step - period) // every


def groups_to_show(rewards: torch.Tensor, initial_rewards: torch.Tensor, count: int) -> list[int]:
    """
    Choose the groups of a rollout that are shown: as many of the most informative ones as of the first ones. A group is
    informative if its rewards differ much, or if many of its images are worse than the one that they refine.

    Args:
        rewards, initial_rewards (`torch.Tensor` of shape `(groups, group size)`): NaN where there is none.
        count (`int`): Number of groups.

    Returns:
        `list[int]`: Their indices, in ascending order.
    """
    highest, lowest = (rewards.nan_to_num(nan=bound) for bound in (float("-inf"), float("inf")))
    spread = (highest.amax(dim=1) - lowest.amin(dim=1)).clamp(min=0)
    informative = spread + (rewards < initial_rewards).float().mean(dim=1)
    chosen = informative.argsort(descending=True, stable=True)[: (count + 1) // 2].tolist()
    rest = [place for place in range(len(rewards)) if place not in chosen]
    return sorted(chosen + rest[: count - len(chosen)])


def _record(rollout: ScoredRollout, i: int, max_size: int) -> TrajectoryRecord:
    place = rollout.offset + i
    trajectory = rollout.trajectories[i]
    given = [s.image for s in trajectory.segments if isinstance(s, ImageSegment) and not s.sampled and s.image]
    answers = [
        answer
        for column, values in rollout.extra_columns.items()
        if column.endswith(COLUMN_SUFFIX)
        for answer in parse_answers(values[place])
    ]
    return TrajectoryRecord(
        turns=_turns(trajectory, rollout.texts[i], max_size),
        given_image=data_url(given[-1], max_size) if given else None,
        reward=_number(rollout.rewards[place].item()),
        rewards={name: _number(values[place]) for name, values in rollout.function_rewards.items()},
        advantage=rollout.advantages[place],
        image_advantage=rollout.image_advantages[i].item(),
        given_reward=_number(rollout.initial_rewards[place].item()),
        answers=answers,
    )


def _turns(trajectory: Trajectory, texts: Sequence[str], max_size: int) -> list[ReportTurn]:
    # A policy that does not think has images and no texts. One that does not paint has a text about the image before it.
    images = [image.image for image in trajectory.sampled_images]
    if len(texts) > len(images):
        images += [s.image for s in trajectory.segments if isinstance(s, ImageSegment)][-1:]
    return [
        ReportTurn(texts[place] if place < len(texts) else "", data_url(image, max_size))
        for place, image in enumerate(images)
    ]


def _request(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["task"], prompt_text(row["prompt"])


def _digest(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(repr(_request(row)).encode()).hexdigest()[:16]


def _number(value: float) -> float | None:
    return None if value != value else value
