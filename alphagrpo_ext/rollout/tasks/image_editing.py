# SPDX-License-Identifier: Apache-2.0

"""Image editing: image, instruction, thought, edited image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.rollout.settings import TaskSettings
from alphagrpo_ext.rollout.task import TASKS, Task, context_image
from alphagrpo_ext.trajectory import Segment


@TASKS.register("image_editing")
class ImageEditing(Task):
    """`[system] [image] [instruction] [thought*] [image*]`; a row has the columns `prompt` and `image`."""

    needs_image = True
    # Two conditions: the request, and the image that is to be kept where nothing is asked of it.
    settings: ClassVar[TaskSettings] = TaskSettings(
        cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel"
    )

    def context(
        self, row: Mapping[str, Any], processor: UnifiedProcessor, model: UnifiedModel, size: tuple[int, int]
    ) -> list[Segment]:
        image = processor.image_segment(context_image(row), model)
        return [*self.system_segments(processor), image, self.request(row, processor, size)]
