# SPDX-License-Identifier: Apache-2.0

"""Image editing: image, instruction, thought, edited image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.rollout.task import TASKS, Task, context_image
from alphagrpo_ext.trajectory import Segment


@TASKS.register("image_editing")
class ImageEditing(Task):
    """`[system] [image] [instruction] [thought*] [image*]`; a row has the columns `prompt` and `image`."""

    needs_image = True

    def context(
        self, row: Mapping[str, Any], processor: UnifiedProcessor, model: UnifiedModel, size: tuple[int, int]
    ) -> list[Segment]:
        image = processor.image_segment(context_image(row), model)
        return [*processor.system_segments(self.think, edits=True), image, self.request(row, processor, size)]
