# SPDX-License-Identifier: Apache-2.0

"""A file of prompts with their questions that grows line by line and survives a killed process."""

from __future__ import annotations

import os
from typing import Any

from alphagrpo_ext.files import JsonLinesFile
from reward_models.prompts.questions import PromptRecord, from_row


class RecordFile(JsonLinesFile):
    """
    A [`~alphagrpo_ext.files.JsonLinesFile`] of records, as [`~reward_models.prompts.questions.load_records`] reads them.

    Args:
        path (`str` or `PathLike`): The file. It and its folder are created.

    Attributes:
        prompts (`set[str]`): Prompts that have a record.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.prompts: set[str] = set()

    def read_row(self, row: Any, where: str) -> None:
        record = from_row(row, where)
        if isinstance(record.prompt, str):
            self.prompts.add(record.prompt)

    def append(self, record: PromptRecord) -> None:
        """Write a record."""
        self.append_row(record.to_row())
        self.prompts.add(record.prompt)
