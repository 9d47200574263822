# SPDX-License-Identifier: Apache-2.0

"""A file of records that grows line by line and survives being killed."""

from __future__ import annotations

import os
from typing import Any

from reward_models.files.json_lines_file import JsonLinesFile
from reward_models.prompts.questions import PromptRecord, from_row


class RecordFile(JsonLinesFile):
    """
    A [`JsonLinesFile`] of records (see [`~reward_models.prompts.questions.load_records`]).

    Args:
        path (`str` or `PathLike`): The file. It and its folder are made if need be.

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
        """
        Write a record.

        Raises:
            `OSError`: If it cannot be written in whole, e.g. because the disk is full.
        """
        self.append_row(record.to_row())
        self.prompts.add(record.prompt)
