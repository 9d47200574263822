# SPDX-License-Identifier: Apache-2.0

"""Reasoning text-to-image: prompt, thought, image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.rollout.settings import TaskSettings
from alphagrpo_ext.rollout.task import TASKS, Task
from alphagrpo_ext.trajectory import Segment


@TASKS.register("reasoning_t2i")
class ReasoningT2I(Task):
    """`[system] [prompt] [thought*] [image*]`, or `[prompt] [image*]` without a thought."""

    settings: ClassVar[TaskSettings] = TaskSettings(
        cfg_img_scale=1.0, cfg_interval=(0.4, 1.0), cfg_renorm_type="global"
    )

    def context(
        self, row: Mapping[str, Any], processor: UnifiedProcessor, model: UnifiedModel, size: tuple[int, int]
    ) -> list[Segment]:
        return [*self.system_segments(processor), self.request(row, processor, size)]
