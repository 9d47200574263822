# SPDX-License-Identifier: Apache-2.0

"""Addresses and keys of servers, checked before they are used, and what of an address a message may show."""

from __future__ import annotations

import re
from urllib.parse import urlsplit


def is_http_address(url: str) -> bool:
    """Whether a URL has the scheme HTTP or HTTPS, a host that can be looked up, and a port that exists if it names one."""
    try:
        parts = urlsplit(url)
        # Looking up a name with an empty or a long part fails with an error that does not say which name.
        host = (parts.hostname or "").encode("idna")
        is_valid = parts.scheme in ("http", "https") and bool(host) and parts.port != 0
    except ValueError:
        return False
    # `urlsplit` drops white space in front and line breaks anywhere.
    return is_valid and url.isprintable() and " " not in parts.netloc and not url.startswith(" ")


def is_header_text(text: str) -> bool:
    """Whether a text, such as a key, can be sent in a header."""
    return text.isascii() and text.isprintable()


def without_password(url: str) -> str:
    """Return a URL without user, password and query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if not parts.netloc:
        return re.sub(r"[^/@]*@", "", url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
