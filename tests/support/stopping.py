# SPDX-License-Identifier: Apache-2.0

"""Tasks that end a turn without painting, for tests."""

from collections.abc import Sequence
from typing import Any

from alphagrpo_ext.models.contract import UnifiedProcessor
from alphagrpo_ext.rollout.task import Task
from alphagrpo_ext.trajectory import Segment, TextSegment


def stop_after(task: Task, *texts: str) -> Task:
    """A task that does not paint after these texts."""

    def paints(text: str, processor: UnifiedProcessor) -> bool:
        return text not in texts

    task.paints = paints
    return task


def stops_by_chance(
    self: Task, contexts: Sequence[Sequence[Segment]], texts: Sequence[TextSegment], *models: Any
) -> list[bool]:
    """A method `which_paint`: all samples of every second request stop, and about half of the others, whatever the process."""
    return [
        sum(context[-1].token_ids) % 2 == 0 and sum(text.token_ids) % 2 == 0
        for context, text in zip(contexts, texts, strict=True)
    ]
