# SPDX-License-Identifier: Apache-2.0

"""How long a server asks its clients to wait before they try again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime


_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?")


def retry_after_seconds(headers: Mapping[str, str], now: float) -> float | None:
    """
    Read the wait that a response asks for.

    Args:
        headers (`Mapping[str, str]`):
            Headers of the response. Names are looked up in lower case, so a plain `dict` must use lower case. Read are
            `retry-after-ms` (milliseconds), which has precedence as in OpenAI's client, and `retry-after`: seconds or one of
            the three forms of an HTTP date (RFC 9110, sections 5.6.7 and 10.2.3). Of several numbers the largest is taken.
        now (`float`):
            The time in seconds since the epoch, from which a date is counted.

    Returns:
        `float` or `None`: Seconds, at least 0, or infinity for a number that is too large for a float. `None` if the response
        names no wait that can be read.
    """
    milliseconds = _largest_number(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000
    value = headers.get("retry-after", "").strip()
    seconds = _largest_number(value)
    if seconds is not None:
        return seconds
    try:
        date = parsedate_to_datetime(value)
        # A date of another form than RFC 9110's may name no time zone. HTTP dates are always in UTC.
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now)
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


def _largest_number(value: str) -> float | None:
    """The largest of the numbers in a header, which has several with commas between them if a proxy added its own."""
    parts = [part.strip() for part in value.split(",")]
    return max(map(float, parts)) if all(map(_NUMBER.fullmatch, parts)) else None
