# SPDX-License-Identifier: Apache-2.0

"""Visual question answering: image, question, thought, answer. Nothing is painted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from alphagrpo_ext.messages import prompt_text
from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.rollout.settings import TaskSettings
from alphagrpo_ext.rollout.task import TASKS, Task, context_image
from alphagrpo_ext.trajectory import Segment, TextSegment


@TASKS.register("visual_question_answering")
class VisualQuestionAnswering(Task):
    """
    `[system] [image] [question] [thought* answer*]`, where thought and answer are one text, or `[image] [question] [answer*]` without a thought. A
    row has the columns `prompt` (the question), `image`, and what the reward function compares with, such as `solution`.

    The vision tower alone reads the image, as where a policy is asked about its own images. The question is the text itself: nothing is added about
    an image to paint.
    """

    needs_image = True
    can_paint = False
    settings: ClassVar[TaskSettings] = TaskSettings(cfg_text_scale=1.0, cfg_img_scale=1.0)

    @property
    def writes(self) -> bool:
        return True

    def paints(self, text: str, processor: UnifiedProcessor) -> bool:
        return False

    def system_segments(self, processor: UnifiedProcessor) -> list[TextSegment]:
        return processor.answering_segments(self.think)

    def request(self, row: Mapping[str, Any], processor: UnifiedProcessor, size: tuple[int, int]) -> TextSegment:
        return processor.text_segment(prompt_text(row["prompt"]))

    def context(
        self, row: Mapping[str, Any], processor: UnifiedProcessor, model: UnifiedModel, size: tuple[int, int]
    ) -> list[Segment]:
        image = processor.looked_at(context_image(row), model)
        return [*self.system_segments(processor), image, self.request(row, processor, size)]
