# SPDX-License-Identifier: Apache-2.0

"""
How many values a JSON text holds, counted before it is parsed.

A value of three bytes, such as an empty list, takes 64 bytes once it is parsed, so a bound on bytes alone is no bound on memory.
"""

from __future__ import annotations


def has_more_values(text: bytes, max_values: int) -> bool:
    """
    Whether a JSON text has more values than a bound, counted by the lists, objects, separators and strings in it. In a text
    that is not JSON, what comes after the first error may be counted wrongly.

    Args:
        text (`bytes`): The text, in UTF-8.
        max_values (`int`): The bound.
    """
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    count = text.count(b'"') // 2
    if count > max_values:
        return True
    # Now strings are the odd parts between quotation marks.
    for part in text.split(b'"')[::2]:
        count += part.count(b"[") + part.count(b"{") + part.count(b",")
        if count > max_values:
            return True
    return False
