# SPDX-License-Identifier: Apache-2.0

"""
Room in the context of a model for all that a row becomes: its prompt, thoughts and images. Beyond its context a model has learned
nothing, and what it writes and paints means nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from alphagrpo_ext.messages import prompt_text
from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.rollout.config import RolloutConfig
from alphagrpo_ext.rollout.task import Task


def check_trajectory_room(
    row: Mapping[str, Any],
    where: str,
    task: Task,
    processor: UnifiedProcessor,
    model: UnifiedModel,
    config: RolloutConfig,
) -> None:
    """
    Check that a row fits into the model's context with the longest texts that the policy may write. Training asks for this, because
    it would learn from all of them.

    Args:
        row (`Mapping[str, Any]`): The row. Its image is not decoded.
        where (`str`): Name of the row for messages.
        task ([`Task`]): Its task.
        processor, model: Processor and model of the policy.
        config ([`RolloutConfig`]): Size of images, and the longest thought.

    Raises:
        `ValueError`: If it does not fit.
    """
    positions = task.max_positions(row, processor, model, config)
    if positions > model.max_positions:
        raise ValueError(
            f"{where} can take {positions} positions, more than the model's {model.max_positions}: lower num_reflection_rounds "
            f"({task.num_reflection_rounds}) or max_completion_length ({config.max_new_tokens}), or shorten the prompt "
            f"({prompt_text(row['prompt'])[:80]!r})"
        )


def check_prompt_room(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    task: Task,
    processor: UnifiedProcessor,
    model: UnifiedModel,
    config: RolloutConfig,
) -> None:
    """
    Check that prompts and images of rows fit into the model's context, with texts of a single token. Most texts are much shorter
    than the longest one, so that more is not asked for where nothing is trained.

    Args:
        rows (`Iterable[tuple[str, Mapping[str, Any]]]`): Rows, each with its name for messages. Images are not decoded.
        task, processor, model, config: As in [`check_trajectory_room`].

    Raises:
        `ValueError`: At the first row that does not fit.
    """
    shortest = replace(config, max_new_tokens=1)
    for where, row in rows:
        positions = task.max_positions(row, processor, model, shortest)
        if positions > model.max_positions:
            raise ValueError(
                f"{where} needs at least {positions} positions, more than the model's {model.max_positions}: shorten the prompt "
                f"({prompt_text(row['prompt'])[:80]!r}), or paint smaller images"
            )
