# SPDX-License-Identifier: Apache-2.0

"""A file of prompts with their questions that grows line by line and survives a killed process."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from alphagrpo_ext.files import JsonLinesFile, atomic_path, write_text
from reward_models.prompts.questions import PromptRecord, from_row


ORIGIN_SUFFIX = ".decomposer.json"
"""What a file of records is called with, for the file beside it that says what made them."""


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

    def claim(self, origin: Mapping[str, str | None]) -> None:
        """
        Keep in `<path>.decomposer.json` what makes the records of this file. A file whose records came without it may have any.
        Call it while the file is open.

        Args:
            origin (`Mapping[str, str | None]`): The decomposer and its settings by name; `None` for what is not known yet.

        Raises:
            `ValueError`: If something else made the records that the file holds. The message names what differs.
        """
        path = self.path.with_name(self.path.name + ORIGIN_SUFFIX)
        has_records = self.path.stat().st_size > 0
        if has_records and not path.exists():
            return
        kept = json.loads(path.read_text(encoding="utf-8")) if has_records else {}
        known = {name: value for name, value in origin.items() if value is not None}
        for name, value in known.items():
            if kept.get(name, value) != value:
                raise ValueError(
                    f"{self.path} holds questions that were made with {name} {kept[name]!r}, and this run has {value!r}: name another "
                    f"output, or remove the file"
                )
        if kept != {**kept, **known}:
            write_text(path, json.dumps({**kept, **known}, indent=2) + "\n")

    def append(self, record: PromptRecord) -> None:
        """Write a record."""
        self.append_row(record.to_row())
        self.prompts.add(record.prompt)

    def sort(self, prompts: Sequence[str]) -> None:
        """
        Put the records into the order of prompts. Records of other prompts come first, in the order that they have. The file is
        replaced as a whole, or left alone if it is in order.

        Call it while the file is closed, and [`~JsonLinesFile.locked`].
        """
        places = {prompt: place for place, prompt in enumerate(prompts)}
        # Lines by their offsets, because a file may be larger than the memory.
        lines: list[tuple[int, int, int]] = []
        with open(self.path, "rb") as file:
            for line in file:
                start = lines[-1][1] + lines[-1][2] if lines else 0
                lines.append((self._place(line, places), start, len(line)))
            if lines == sorted(lines):
                return
            with atomic_path(self.path) as temporary, temporary.open("wb") as output:
                for _, start, length in sorted(lines):
                    file.seek(start)
                    output.write(file.read(length))

    @staticmethod
    def _place(line: bytes, places: dict[str, int]) -> int:
        prompt = json.loads(line.decode("utf-8-sig"))["prompt"] if line.strip() else None
        return places.get(prompt, -1) if isinstance(prompt, str) else -1
