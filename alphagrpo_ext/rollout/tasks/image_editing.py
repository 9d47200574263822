# SPDX-License-Identifier: Apache-2.0

"""Image editing: image, instruction, thought, edited image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.processing_utils import ProcessorMixin

from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.rollout.task import TASKS, Task, TaskContexts, context_image, image_request_contexts


@TASKS.register("image_editing")
class ImageEditing(Task):
    """`[system] [image] [instruction] [thought*] [image*]`; a row has the columns `prompt` and `image`."""

    needs_image = True

    def contexts(self, row: Mapping[str, Any], processor: ProcessorMixin, model: UnifiedModel) -> TaskContexts:
        system = [processor.text_segment(processor.generation_system_prompt)] if self.think else []
        image = processor.image_segment(context_image(row), model)
        return image_request_contexts(image, self.request(row, processor), system)
