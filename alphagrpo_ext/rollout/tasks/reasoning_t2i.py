# SPDX-License-Identifier: Apache-2.0

"""Reasoning text-to-image: prompt, thought, image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.processing_utils import ProcessorMixin

from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.rollout.task import TASKS, Task, TaskContexts


@TASKS.register("reasoning_t2i")
class ReasoningT2I(Task):
    """
    `[system] [prompt] [thought*] [image*]`, or `[prompt] [image*]` without a thought.

    As in BAGEL's inferencer, dropping the text leaves the system prompt, and the branch without images, which there
    are none of, is the one without the thought.
    """

    def contexts(self, row: Mapping[str, Any], processor: ProcessorMixin, model: UnifiedModel) -> TaskContexts:
        system = [processor.text_segment(processor.generation_system_prompt)] if self.think else []
        prompt = self.request(row, processor)
        return TaskContexts(full=[*system, prompt], text_dropped=system, image_dropped=[*system, prompt])
