# SPDX-License-Identifier: Apache-2.0

"""Texts of servers, as messages repeat them."""

from __future__ import annotations

from alphagrpo_ext.printable import printable


def shortened(text: str, length: int = 500) -> str:
    """Return the beginning of a text on one line. What a server sends must not steer a terminal or break a log file."""
    return " ".join(printable(text[: 4 * length]).split())[:length]
