# Copyright 2026 The AlphaGRPO-Ext Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Image editing: image, instruction, thought, edited image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.processing_utils import ProcessorMixin

from alphagrpo_ext.models.unified import UnifiedModel
from alphagrpo_ext.rollout.task import TASKS, Task, TaskContexts, context_image, image_request_contexts


@TASKS.register("image_editing")
class ImageEditing(Task):
    """`[system] [image] [instruction] [thought*] [image*]`; a row has the columns `prompt` and `image`."""

    needs_image = True

    def contexts(self, row: Mapping[str, Any], processor: ProcessorMixin, model: UnifiedModel) -> TaskContexts:
        system = [processor.text_segment(processor.generation_system_prompt)] if self.think else []
        image = processor.image_segment(context_image(row), model)
        return image_request_contexts(image, self.request(row, processor), system)
