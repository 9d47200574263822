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

"""What a task is: from a dataset row to the segments that the policy sees before it acts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.processing_utils import ProcessorMixin

from alphagrpo_ext.models.unified import BRANCHES, UnifiedModel
from alphagrpo_ext.registry import Registry
from alphagrpo_ext.trajectory import Segment


TASKS: Registry = Registry(
    "task", "alphagrpo_ext.tasks", {"reasoning_t2i": "alphagrpo_ext.rollout.reasoning_t2i:ReasoningT2I"}
)


@dataclass(frozen=True)
class TaskContexts:
    """
    Context of each guidance branch.

    Args:
        full (`list[Segment]`): All that was given.
        text_dropped (`list[Segment]`): The same without the last text.
        image_dropped (`list[Segment]`): The same without images.
    """

    full: list[Segment] = field(default_factory=list)
    text_dropped: list[Segment] = field(default_factory=list)
    image_dropped: list[Segment] = field(default_factory=list)

    def branch(self, name: str) -> list[Segment]:
        if name not in BRANCHES:
            raise ValueError(f"unknown guidance branch {name!r}, available: {', '.join(BRANCHES)}")
        return getattr(self, name)


class Task(ABC):
    """
    A kind of request. Register one with `@TASKS.register("name")`.

    Args:
        think (`bool`): Whether the policy writes a thought before it paints.
    """

    def __init__(self, think: bool) -> None:
        self.think = think

    @abstractmethod
    def contexts(self, row: Mapping[str, Any], processor: ProcessorMixin, model: UnifiedModel) -> TaskContexts:
        """Contexts of one dataset row. Rows with equal prompts, one after the other, share them."""


def prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    """
    The request in a dataset's `prompt`: a string, or the last user message of a conversation.

    Raises:
        `ValueError`: If there is no such text.
    """
    if isinstance(prompt, str):
        return prompt
    for message in reversed(prompt):
        if message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, str):
                return content
            texts = [part["text"] for part in content or [] if part.get("type") == "text"]
            if texts:
                return texts[-1]
    raise ValueError(f"the prompt has no user message with text: {prompt!r}")
