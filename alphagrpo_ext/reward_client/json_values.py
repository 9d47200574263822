# SPDX-License-Identifier: Apache-2.0

"""
What a JSON text becomes in memory, counted before it is parsed: how many values it holds, and how large its strings are.

A value of three bytes, such as an empty list, takes 64 bytes once it is parsed, so a bound on bytes alone is no bound on memory.
Neither is it one for strings, since one character beyond ASCII can make Python keep a string with four bytes per character.
"""

from __future__ import annotations


_BYTES_PER_CHARACTER = 4
_ESCAPE = rb"\u"
_ESCAPE_LENGTH = len(rb"\u0000")
# All bytes of a character in UTF-8 but its first.
_CONTINUATION = bytes(range(0x80, 0xC0))


def has_more_values(text: bytes, max_values: int) -> bool:
    """
    Whether a JSON text has more values than a bound, counted by the lists, objects, separators and strings in it. In a text
    that is not JSON, what comes after the first error may be counted wrongly.

    Args:
        text (`bytes`): The text, in UTF-8.
        max_values (`int`): The bound.
    """
    text = _without_escaped_marks(text)
    count = text.count(b'"') // 2
    if count > max_values:
        return True
    # Now strings are the odd parts between quotation marks.
    for part in text.split(b'"')[::2]:
        count += part.count(b"[") + part.count(b"{") + part.count(b",")
        if count > max_values:
            return True
    return False


def size_in_memory(text: bytes) -> int:
    """
    How many bytes a JSON text takes at most where its strings are Python's: four for each character of a string that is not ASCII,
    and one for each other byte. Call it for a text with few values.

    Args:
        text (`bytes`): The text, in UTF-8.
    """
    if text.isascii() and _ESCAPE not in text:
        return len(text)
    parts = _without_escaped_marks(text).split(b'"')
    return sum(map(len, parts[::2])) + sum(map(_string_size, parts[1::2]))


def _string_size(part: bytes) -> int:
    num_escapes = part.count(_ESCAPE)
    if part.isascii() and not num_escapes:
        return len(part)
    num_characters = len(part.translate(None, _CONTINUATION)) - (_ESCAPE_LENGTH - 1) * num_escapes
    return _BYTES_PER_CHARACTER * num_characters


def _without_escaped_marks(text: bytes) -> bytes:
    """The text with another character in the place of each backslash and quotation mark that a string holds."""
    return text.replace(b"\\\\", b"_").replace(b'\\"', b"_") if b"\\" in text else text
