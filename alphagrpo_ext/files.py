# SPDX-License-Identifier: Apache-2.0

"""
Files that survive a killed process, and optional dependencies with an error that names the extra that installs them.

A file is either replaced as a whole ([`atomic_path`]), or it is a [`JsonLinesFile`] that grows by whole lines. A folder of many
files has one writer at a time ([`FolderLock`]).
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self


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


def read_text(path: Path) -> str:
    """
    Read a text file in UTF-8.

    Raises:
        `ValueError`: If it is not UTF-8, or if it holds a zero byte, which no text does. The message names the file.
    """
    try:
        # Line ends stay as they are, because a cell of a table may hold them.
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid UTF-8 ({error})") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"{path}, line {line}: the file holds a zero byte, so it is binary and not a text in UTF-8")
    return text


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


class FolderInUseError(RuntimeError):
    """Raised when another process writes to the folder."""


@dataclass
class _HeldLock:
    descriptor: int
    process: int
    created: tuple[Path, ...]
    num_holders: int = 1


class FolderLock:
    """
    Keeps other processes from writing to a folder. It is released when its process ends in whatever way.

    Within a process the lock counts its holders, so that a run and its trainer both take it. The lock is a POSIX record lock on
    the file `run.lock` of the folder, which is gone after a release and says which process holds it. Unlike `flock`, it is not
    inherited by forked processes, which may outlive their parent for a moment, and network file systems pass it on where they
    have a lock service. A file system without locks is not protected, which is logged.

    Args:
        folder (`str` or `Path`): The folder. It is created, and removed at the release if it is still empty.
    """

    name = "run.lock"
    patience: ClassVar[float] = 5.0
    """Seconds to wait for another process, which may have been killed and be about to end."""
    _held: ClassVar[dict[Path, _HeldLock]] = {}
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder.resolve() / self.name

    def acquire(self) -> None:
        """
        Take the lock, or count one more holder of this process.

        Raises:
            [`FolderInUseError`]: If another process holds it. The message names the folder and the process.
        """
        folder = self.path.parent
        deadline = time.monotonic() + self.patience
        while True:
            with self._guard:
                created = tuple(path for path in (folder, *folder.parents) if not path.exists())
                folder.mkdir(parents=True, exist_ok=True)
                held = self._held.get(self.path)
                # A forked process has its parent's table, but not its locks.
                if held is not None and held.process == os.getpid():
                    held.num_holders += 1
                    return
                descriptor = self._open_locked()
                if descriptor is not None:
                    self._held[self.path] = _HeldLock(descriptor, os.getpid(), created)
                    return
            if time.monotonic() > deadline:
                raise FolderInUseError(
                    f"the folder {self.folder} is being written to by {self._holder()}: wait for it, stop it, or name "
                    f"another output_dir"
                )
            time.sleep(0.1)

    def release(self) -> None:
        """Count one holder less, and let other processes in after the last one."""
        with self._guard:
            held = self._held[self.path]
            held.num_holders -= 1
            if held.num_holders:
                return
            del self._held[self.path]
            # Before the lock is released, so that the file is never that of the next holder.
            self.path.unlink(missing_ok=True)
            os.close(held.descriptor)
            with suppress(OSError):
                for path in held.created:
                    path.rmdir()

    def _open_locked(self) -> int | None:
        """A descriptor that holds the lock; `None` if another process has it."""
        import fcntl

        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            # The holder before removed the folder, which it had left empty.
            return None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            return None
        except OSError as error:
            logger.warning(
                "%s: the file system has no locks (%s), so nothing keeps a second run away", self.folder, error
            )
            return descriptor
        # The holder before may have removed the file after it was opened here.
        if not self._is_named(descriptor):
            os.close(descriptor)
            return None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        return descriptor

    def _is_named(self, descriptor: int) -> bool:
        """Whether a descriptor is that of the file that has the lock's name now."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8", errors="replace") or "another process"
        except OSError:
            return "another process"


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
