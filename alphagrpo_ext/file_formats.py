# SPDX-License-Identifier: Apache-2.0

"""Recognition of a file's format by its first bytes, so that an error can name what a file is instead of what it is not."""

from __future__ import annotations


HEAD_SIZE = 512
"""Number of bytes that [`format_name`] looks at."""

_SIGNATURES = (
    (b"version https://git-lfs", "a Git-LFS pointer and not the file itself: run `git lfs pull`"),
    (b"\x1f\x8b", "compressed with gzip: decompress it with `gunzip`"),
    (b"BZh", "compressed with bzip2: decompress it with `bunzip2`"),
    (b"\xfd7zXZ\x00", "compressed with xz: decompress it with `unxz`"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: decompress it with `unzstd`"),
    (b"PK\x03\x04", "a zip archive (or an Excel or NumPy file, which are zip archives): extract it"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"%PDF", "a PDF document"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\xff\xfe\x00\x00", "text in UTF-32: save it as UTF-8"),
    (b"\x00\x00\xfe\xff", "text in UTF-32: save it as UTF-8"),
    (b"\xff\xfe", "text in UTF-16: save it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16: save it as UTF-8"),
)
_MARKUP = ((b"<!doctype html", "an HTML page"), (b"<html", "an HTML page"), (b"<?xml", "an XML document"))


def format_name(head: bytes) -> str | None:
    """
    Name the format of a file.

    Args:
        head (`bytes`): The first [`HEAD_SIZE`] bytes of the file, or all if it has fewer.

    Returns:
        `str`: A phrase that follows "the file is", for some formats with advice, e.g. `"a Git-LFS pointer and not the file
        itself: run `git lfs pull`"`. `None` if the bytes could be text in UTF-8 or are not recognized.
    """
    if not head.removeprefix(b"\xef\xbb\xbf"):
        return "empty"
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    if head[257:262] == b"ustar":
        return "a tar archive: extract it"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for signature, name in _MARKUP:
        if start.startswith(signature):
            return f"{name}: download the file itself"
    if head[1:8:2] == b"\0\0\0\0" or head[:8:2] == b"\0\0\0\0":
        return "text in UTF-16: save it as UTF-8"
    return None
