# SPDX-License-Identifier: Apache-2.0

"""
Files that survive a killed process, and optional dependencies with an error that names the extra that installs them.

A file is either replaced as a whole ([`atomic_path`]), or it is a [`JsonLinesFile`] that grows by whole lines.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self


logger = logging.getLogger(__name__)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """
    Yield a temporary path beside `path`, and move it to `path` when the block ends.

    Readers see the old file or the whole new one. If the block raises, the temporary file is removed and `path` is unchanged.

    Args:
        path (`str` or `Path`): The file to write. Its folder is created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The ending stays last, because Pillow chooses the image format by it.
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str, errors: str = "strict") -> None:
    """
    Write `text` to a file as UTF-8, atomically; see [`atomic_path`].

    Args:
        path (`str` or `Path`): The file to write. Its folder is created.
        text (`str`): The content.
        errors (`str`, *optional*, defaults to `"strict"`):
            What to do with characters that UTF-8 cannot encode, as in `str.encode`.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """
    Read a JSON-lines file in UTF-8, line by line. Blank lines are skipped.

    Args:
        path (`str` or `PathLike`): The file.

    Yields:
        `tuple[str, Any]`: The name of the line for error messages, and the value of the line.

    Raises:
        `ValueError`: At the first line that is not JSON. The message names the file and the line.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                # Some editors start a file with a byte-order mark.
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not valid UTF-8 ({error})") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not valid JSON ({error})") from error
            yield where, value


class FileInUseError(RuntimeError):
    """Raised when another process writes to the file."""


class JsonLinesFile:
    """
    A file with one JSON object per line that one process at a time extends, within a `with` statement.

    When [`~JsonLinesFile.append_row`] returns, the whole line is in the file. A process that is killed leaves at most one
    incomplete line, the last one, which the next process removes. While the file is open, the process holds the lock
    `<path>.lock`, which the operating system releases when the process dies.

    A subclass overrides [`~JsonLinesFile.read_row`] to learn what the file holds.

    Args:
        path (`str` or `PathLike`): The file. It and its folder are created.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from filelock import FileLock

        self.path = Path(path)
        self._lock = FileLock(f"{self.path}.lock", timeout=0)

    def __enter__(self) -> Self:
        """
        Raises:
            [`FileInUseError`]: If another process holds the file.
            `ValueError`: If a line other than an incomplete last one cannot be read. The message names the line.
        """
        with self.locked():
            # Unbuffered, so that the operating system has the line when the write returns.
            self._file = open(self.path, "ab", buffering=0)
            try:
                self._repair_last_line()
                for where, row in read_json_lines(self.path):
                    self.read_row(row, where)
            except BaseException:
                self._file.close()
                raise
            # The lock counts its holders: this one keeps it until the file is closed.
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
        Keep other processes away from the file during the block.

        Raises:
            [`FileInUseError`]: If another process holds the file.
        """
        from filelock import Timeout

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
        Called for each line that the file holds when it is opened. The default does nothing.

        Args:
            row (`Any`): The value of the line.
            where (`str`): The name of the line for error messages.

        Raises:
            `ValueError`: If the line does not belong in this file. The message names the line.
        """
        return

    def append_row(self, row: Mapping[str, Any]) -> None:
        """
        Write one line.

        Raises:
            `OSError`: If the line cannot be written completely, e.g. because the disk is full.
        """
        line = f"{json.dumps(row, ensure_ascii=False)}\n".encode()
        written = self._file.write(line)
        if written != len(line):
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes could be written; is the disk full?")

    def _repair_last_line(self) -> None:
        last = b""
        with open(self.path, "rb") as file:
            for line in file:
                last = line
        if not last or last.endswith(b"\n"):
            return
        try:
            complete = isinstance(json.loads(last), dict)
        except ValueError:
            complete = False
        if complete:
            # A part of a JSON object is never a JSON object, so only the line break is missing.
            self._file.write(b"\n")
            return
        logger.warning("%s: removed an incomplete last line of %d bytes", self.path, len(last))
        self._file.truncate(self.path.stat().st_size - len(last))


def require_extra(module: str, extra: str) -> None:
    """
    Check that an optional dependency is installed.

    Args:
        module (`str`): Name of the module, e.g. `"openai"`.
        extra (`str`): Extra of this package that installs it, e.g. `"judge"`.

    Raises:
        `ImportError`: If it is not installed; the message says how to install it.
    """
    if find_spec(module) is None:
        raise ImportError(f"'{module}' is not installed: pip install 'alphagrpo-ext[{extra}]'")
