# SPDX-License-Identifier: Apache-2.0

"""Texts of others, such as prompts and categories, in what is printed or stands on a page."""

from __future__ import annotations

import unicodedata
from collections import deque
from typing import Any


# Control characters, formats such as the direction of writing, halves of surrogate pairs, and separators of lines and paragraphs.
_STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")
# Parts of words in several scripts, and of emojis.
_JOINERS = "\u200c\u200d"


def printable(text: str, keep: str = "") -> str:
    """
    Replace by a blank each character of a text that could steer a terminal, break a line or reverse what follows it.

    Args:
        text (`str`): The text.
        keep (`str`, *optional*, defaults to `""`): Such characters that stay, e.g. `"\\n"` where a text may have several lines.
    """
    if text.isprintable():
        return text
    kept = keep + _JOINERS
    return "".join(
        " " if unicodedata.category(character) in _STEERING and character not in kept else character
        for character in text
    )


def printable_parts(value: Any) -> Any:
    """Apply [`printable`] to all texts in sequences and dictionaries, such as the messages of a conversation. Lines stay."""
    if isinstance(value, str):
        return printable(value, keep="\n")
    if isinstance(value, list | tuple | deque):
        return [printable_parts(part) for part in value]
    if isinstance(value, dict):
        return {printable_parts(name): printable_parts(part) for name, part in value.items()}
    return value
