# SPDX-License-Identifier: Apache-2.0

"""A file of JSON lines that grows line by line and survives being killed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from reward_models.prompts.questions import read_json_lines


logger = logging.getLogger(__name__)


class FileInUseError(RuntimeError):
    """Raised when another process writes to the file."""


class JsonLinesFile:
    """
    A file with a JSON object a line, for one process at once, opened by `with`.

    A line is in the file, whole, once [`~JsonLinesFile.append_row`] returns. A process that is killed leaves at most one
    torn line, the last one, which the next process removes. `<path>.lock` is held meanwhile; the operating system lets go of
    it when a process dies.

    Args:
        path (`str` or `PathLike`): The file. It and its folder are made if need be.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = FileLock(f"{self.path}.lock", timeout=0)

    def __enter__(self) -> Self:
        """
        Raises:
            [`FileInUseError`]: If another process holds the file.
            `ValueError`: If a line other than a torn last one cannot be read. The message names it.
        """
        with self.locked():
            # Unbuffered, so that a line is with the operating system when the write returns.
            self._file = open(self.path, "ab", buffering=0)
            self._mend_last_line()
            for where, row in read_json_lines(self.path):
                self.read_row(row, where)
            # Once more, until it is closed.
            self._lock.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self._lock.release()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """
        Keeps other processes away from the file meanwhile.

        Raises:
            [`FileInUseError`]: If another process holds it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise FileInUseError(f"another process writes to {self.path}: wait for it or stop it") from error
        try:
            yield
        finally:
            self._lock.release()

    def read_row(self, row: Any, where: str) -> None:
        """
        Called for every line that is there when the file is opened. The default does nothing.

        Args:
            row (`Any`): The line's value.
            where (`str`): How an error message calls the line.

        Raises:
            `ValueError`: If the line does not belong here; the message names it.
        """
        return

    def append_row(self, row: Mapping[str, Any]) -> None:
        """
        Write a line.

        Raises:
            `OSError`: If it cannot be written in whole, e.g. because the disk is full.
        """
        line = f"{json.dumps(row, ensure_ascii=False)}\n".encode()
        written = self._file.write(line)
        if written != len(line):
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes could be written; is the disk full?")

    def _mend_last_line(self) -> None:
        last = b""
        with open(self.path, "rb") as file:
            for line in file:
                last = line
        if not last or last.endswith(b"\n"):
            return
        try:
            whole = isinstance(json.loads(last), dict)
        except ValueError:
            whole = False
        if whole:
            # No part of a JSON object is one, so this line only lacks its end.
            self._file.write(b"\n")
            return
        logger.warning("%s: removed %d bytes of a last line that was not written in whole", self.path, len(last))
        self._file.truncate(self.path.stat().st_size - len(last))
