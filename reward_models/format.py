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

"""Rewards of how a text is built, whatever the image: they count for text alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from alphagrpo_ext.registry import Registry
from alphagrpo_ext.shapes.text import is_reflection


FORMATS = Registry("format reward", "alphagrpo_ext.formats")


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion, as TRL passes it: a string, or the messages of a turn."""
    if isinstance(completion, str):
        return completion
    return "".join(message.get("content") or "" for message in completion)


class FormatReward(ABC):
    """
    A reward function of TRL that is 1 where a text has the right form and 0 where not. `text_only` keeps it out of the
    advantages of images.
    """

    text_only = True

    def __init__(self, name: str) -> None:
        self.__name__ = name

    @abstractmethod
    def has_form(self, text: str) -> bool:
        """Whether a text is built as it should be."""

    def __call__(self, completions: Sequence[str | list[dict[str, Any]]], **kwargs: Any) -> list[float]:
        return [float(self.has_form(completion_text(completion))) for completion in completions]


@FORMATS.register("think")
class ThinkFormat(FormatReward):
    """Text that starts with `<think>`, ends with `</think>`, and has neither in between."""

    def __init__(self, name: str = "think_format") -> None:
        super().__init__(name)

    def has_form(self, text: str) -> bool:
        text = text.strip()
        if not (text.startswith("<think>") and text.endswith("</think>")):
            return False
        return text.count("<think>") == text.count("</think>") == 1


@FORMATS.register("shapes_reflection")
class ShapesReflectionFormat(FormatReward):
    """
    Reflections of the shapes world: a verdict that names at most two errors, each with its repair, or says that there is
    none, and then the plan of a possible scene; nothing else.
    """

    def __init__(self, name: str = "reflection_format") -> None:
        super().__init__(name)

    def has_form(self, text: str) -> bool:
        return is_reflection(text)
