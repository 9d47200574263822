# SPDX-License-Identifier: Apache-2.0

"""Tasks that end a turn without painting, for tests."""

from alphagrpo_ext.models.contract import UnifiedProcessor
from alphagrpo_ext.rollout.task import Task


def stop_after(task: Task, *texts: str) -> Task:
    """A task that does not paint after these texts."""

    def paints(text: str, processor: UnifiedProcessor) -> bool:
        return text not in texts

    task.paints = paints
    return task
