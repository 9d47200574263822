# SPDX-License-Identifier: Apache-2.0

"""
Sizes and checksums of the files of a folder, recorded and compared.

A file has one checksum per [`PIECE_BYTES`], so that threads and the processes of a node share the work of a large one. The
checksum is XXH3 with 128 bits, which is faster than a disk. It finds damage; it is no protection against forgery.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash


PIECE_BYTES = 256 * 2**20
"""Size of a piece of a file. It is part of the format of checkpoints."""
_BUFFER_BYTES = 4 * 2**20
_NUM_THREADS = 4

Piece = tuple[str, int]
"""A file by its path in the folder, and the number of a piece of it."""


@dataclass(frozen=True)
class FileRecord:
    """
    What a file held when it was recorded.

    Args:
        size (`int`): Size in bytes.
        checksums (`tuple[str, ...]`, *optional*):
            Checksum of every piece. `None` in checkpoints of versions that kept sizes alone.
    """

    size: int
    checksums: tuple[str, ...] | None = None


def file_sizes(folder: Path, skipped: str) -> dict[str, int]:
    """
    Sizes in bytes of all files of a folder, by their paths in it. Files and folders whose name begins with a dot, which file
    managers and network file systems make, do not count.

    Args:
        folder (`Path`): The folder.
        skipped (`str`): Name of the one file that does not count.
    """
    sizes = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.as_posix() != skipped and not any(part.startswith(".") for part in name.parts):
            sizes[name.as_posix()] = path.stat().st_size
    return sizes


def pieces(sizes: Mapping[str, int]) -> list[Piece]:
    """All pieces of files with these sizes. An empty file has none."""
    return [(name, index) for name, size in sizes.items() for index in range(-(-size // PIECE_BYTES))]


def checksums(folder: Path, work: Sequence[Piece]) -> dict[Piece, str | OSError]:
    """
    Checksums of pieces, or the error that the operating system raised while one was read.

    Args:
        folder (`Path`): The folder.
        work (`Sequence[tuple[str, int]]`): The pieces.
    """

    def one(piece: Piece) -> str | OSError:
        try:
            return _checksum(folder / piece[0], piece[1])
        except OSError as error:
            return error

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return dict(zip(work, pool.map(one, work), strict=True))


def _checksum(path: Path, index: int) -> str:
    digest, left = xxhash.xxh3_128(), PIECE_BYTES
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    with open(path, "rb", buffering=0) as file:
        file.seek(index * PIECE_BYTES)
        while left and (count := file.readinto(buffer[: min(left, _BUFFER_BYTES)])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def make_records(sizes: Mapping[str, int], found: Mapping[Piece, str | OSError]) -> dict[str, FileRecord]:
    """
    Records of files.

    Args:
        sizes (`Mapping[str, int]`): From [`file_sizes`].
        found (`Mapping[tuple[str, int], str]`): From [`checksums`], for all of their pieces.

    Raises:
        `OSError`: If a piece could not be read.
    """
    for checksum in found.values():
        if isinstance(checksum, OSError):
            raise checksum
    by_file: dict[str, list[str]] = {name: [] for name in sizes}
    for name, index in pieces(sizes):
        by_file[name].append(found[name, index])
    return {name: FileRecord(size, tuple(by_file[name])) for name, size in sizes.items()}


def shape_faults(folder: Path, records: Mapping[str, FileRecord], skipped: str) -> Iterator[str]:
    """
    Compare the files of a folder with their records by name, kind and size, without reading them. Yields a phrase per fault.

    Args:
        folder (`Path`): The folder.
        records (`Mapping[str, FileRecord]`): By the file's path in the folder.
        skipped (`str`): Name of the one file that does not count.
    """
    for name, record in records.items():
        path = folder / name
        if path.is_dir():
            yield f"{name} is a folder where a file of {record.size} bytes was written"
        elif not path.is_file():
            yield f"{name} is missing"
        elif (size := path.stat().st_size) != record.size:
            yield f"{name} {f'has {size} bytes' if size else 'is empty'} where {record.size} were written"
    for name in file_sizes(folder, skipped):
        if name not in records:
            yield f"{name} is not one of its files"


def content_faults(
    folder: Path, records: Mapping[str, FileRecord], choose: Callable[[list[Piece]], Sequence[Piece]]
) -> Iterator[str]:
    """
    Compare the contents of files with their records. Yields a phrase per file that differs.

    Args:
        folder (`Path`): The folder.
        records (`Mapping[str, FileRecord]`): Files that are there and have the recorded size.
        choose (`Callable[[list[tuple[str, int]]], Sequence[tuple[str, int]]]`): Chooses the pieces that are read.
    """
    sizes = {name: record.size for name, record in records.items() if record.checksums is not None}
    faults: dict[str, str] = {}
    for (name, index), found in checksums(folder, choose(pieces(sizes))).items():
        if isinstance(found, OSError):
            faults.setdefault(name, f"{name} cannot be read ({found.strerror or found})")
        elif found != records[name].checksums[index]:
            faults.setdefault(name, f"{name} has other contents than were written (its checksum differs)")
    yield from faults.values()


def signature(folder: Path, records: Mapping[str, FileRecord]) -> tuple[object, ...]:
    """What changes when a file is written or replaced: identity, size and time of every file. Nothing is read."""
    stats = [os.stat(folder / name) for name in records]
    return (str(folder.resolve()), *((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats))
