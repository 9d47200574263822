# SPDX-License-Identifier: Apache-2.0

"""Decompression of the bodies of HTTP answers, with a bound on what they become."""

from __future__ import annotations

import zlib


ACCEPTED_ENCODINGS = "gzip, deflate"
"""Compressions that are asked for: those whose output can be bounded while it is made."""

_GZIP, _ZLIB, _RAW_DEFLATE = 31, 15, -15


class DecompressionError(ValueError):
    """A body is not what its header says. The message is a predicate, such as "is cut off"."""


class OversizedBodyError(ValueError):
    """A body is larger than its bound after decompression."""


def decompress(body: bytes, content_encoding: str, max_bytes: int) -> bytes:
    """
    Undo the compressions that a header names, the last one first.

    Args:
        body (`bytes`): The body as it was sent.
        content_encoding (`str`): The header: names with commas between them. It may be empty.
        max_bytes (`int`): Largest size after each decompression. No more memory than that is taken for a result.

    Raises:
        [`DecompressionError`]: If a compression was not asked for, or the body is damaged or cut off.
        [`OversizedBodyError`]: If the result is larger.
    """
    names = [name.strip().lower() for name in content_encoding.split(",")]
    for name in reversed([name for name in names if name not in ("", "identity")]):
        body = _decompress_one(body, name, max_bytes)
    return body


def _decompress_one(body: bytes, encoding: str, max_bytes: int) -> bytes:
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise DecompressionError(f"is compressed by {encoding!r}, which was not asked for")
    # Servers send deflate with and without the header of zlib.
    formats = (_ZLIB, _RAW_DEFLATE) if encoding == "deflate" else (_GZIP,)
    failure: zlib.error | None = None
    for wbits in formats:
        decompressor = zlib.decompressobj(wbits)
        try:
            result = decompressor.decompress(body, max_bytes + 1)
        except zlib.error as error:
            failure = error
            continue
        if len(result) > max_bytes:
            raise OversizedBodyError(f"more than {max_bytes} bytes")
        if not decompressor.eof:
            raise DecompressionError(f"is compressed by {encoding!r} and is cut off")
        return result
    raise DecompressionError(f"is not {encoding}, as its header says ({failure})")
