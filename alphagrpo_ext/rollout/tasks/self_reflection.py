# SPDX-License-Identifier: Apache-2.0

"""
Self-reflective refinement: an image of the policy, a text that says what is wrong with it, and the image painted anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alphagrpo_ext.messages import prompt_text
from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.rollout.stopping import keep_probabilities
from alphagrpo_ext.rollout.task import TASKS
from alphagrpo_ext.rollout.tasks.image_editing import ImageEditing
from alphagrpo_ext.trajectory import Segment, TextSegment


@TASKS.register("self_reflection")
class SelfReflection(ImageEditing):
    """
    `[system] [image] [reflection request] [reflection*] [image*]`, and for every further round
    `[reflection request] [reflection*] [image*]`, which looks at the image before it.

    A row is one of text-to-image; its `image`, where it has none, is painted by the policy (stage 1).

    With `allow_stop`, the trajectory ends after a reflection that says that the image is right.
    """

    paints_initial_image = True

    @property
    def num_turns(self) -> int:
        return self.num_reflection_rounds

    def request(self, row: Mapping[str, Any], processor: UnifiedProcessor, size: tuple[int, int]) -> TextSegment:
        text = processor.reflection_request(prompt_text(row["prompt"]), self.allow_stop)
        return processor.request_segment(text, size)

    def paints(self, text: str, processor: UnifiedProcessor) -> bool:
        return not (self.allow_stop and processor.is_done(text))

    def which_paint(
        self,
        contexts: Sequence[Sequence[Segment]],
        texts: Sequence[TextSegment],
        processor: UnifiedProcessor,
        model: UnifiedModel,
    ) -> list[bool]:
        if self.stop_threshold is None:
            return super().which_paint(contexts, texts, processor, model)
        sure = keep_probabilities(model, processor, contexts, texts)
        return [p is None or p < self.stop_threshold for p in sure]
