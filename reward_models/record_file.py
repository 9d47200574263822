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

"""A file of records that grows line by line and survives being killed."""

from __future__ import annotations

import os
from typing import Any

from reward_models.json_lines_file import JsonLinesFile
from reward_models.questions import PromptRecord, from_row


class RecordFile(JsonLinesFile):
    """
    A [`JsonLinesFile`] of records (see [`~reward_models.questions.load_records`]).

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
