# SPDX-License-Identifier: Apache-2.0

"""
Dialects of OpenAI's protocol, learned from refusals.

Some models take `max_completion_tokens` in place of `max_tokens`, refuse a `temperature`, or list fewer candidates per token
than are asked for. Which ones is in no document that a program could read, but their refusals name the field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


CHAT_OPTIONS = frozenset({"temperature"})
"""Fields of a chat completion that can be left out without changing what the answer means."""
IMAGE_OPTIONS = frozenset({"response_format", "n"})
"""Fields of a request for an image that can be left out: the answer is checked."""

_LOWER_CANDIDATES = (10, 5, 3, 2)
"""Numbers of candidates to try where a refusal names no limit. With one, P(yes) could only be 0 or 1."""

_LIMIT_WORDS = r"(?:\b(?:max\w*|most|up\s+to|limit\w*|equal\s+to|exceed\w*|above|over|and)|<=|≤|>)"
# A prompt that is too long is refused with the names of fields that are all right.
_OTHER_REASONS = re.compile(r"context (?:length|window|size)|input tokens|prompt is too long", re.IGNORECASE)


@dataclass(frozen=True)
class Dialect:
    """
    How requests to an endpoint differ from OpenAI's older models.

    Args:
        left_out (`frozenset[str]`): Fields that are not sent.
        renames_max_tokens (`bool`): Whether `max_tokens` is sent as `max_completion_tokens`.
        max_top_logprobs (`int`, *optional*): Largest number of candidates per token; `None` for no known limit.
    """

    left_out: frozenset[str] = frozenset()
    renames_max_tokens: bool = False
    max_top_logprobs: int | None = None

    def apply(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a request as the endpoint takes them."""
        sent = dict(fields)
        if self.renames_max_tokens and "max_tokens" in sent:
            sent.setdefault("max_completion_tokens", sent.pop("max_tokens"))
        limit, asked = self.max_top_logprobs, sent.get("top_logprobs")
        if limit is not None and isinstance(asked, int):
            sent["top_logprobs"] = min(asked, limit)
        return {name: value for name, value in sent.items() if name not in self.left_out}

    def union(self, other: Dialect) -> Dialect:
        """Return the dialect of an endpoint that has both peculiarities."""
        limits = [limit for limit in (self.max_top_logprobs, other.max_top_logprobs) if limit is not None]
        return Dialect(
            self.left_out | other.left_out,
            self.renames_max_tokens or other.renames_max_tokens,
            min(limits, default=None),
        )

    def describe(self) -> str:
        """Say how requests are sent."""
        parts = [f"without {name}" for name in sorted(self.left_out)]
        if self.renames_max_tokens and "max_completion_tokens" not in self.left_out:
            parts.append("with max_completion_tokens in place of max_tokens")
        if self.max_top_logprobs is not None:
            parts.append(f"with top_logprobs of at most {self.max_top_logprobs}")
        return ", ".join(parts)

    def learn(
        self, sent: Mapping[str, Any], message: str, param: str | None, options: frozenset[str]
    ) -> Dialect | None:
        """
        Find out from a refusal how the endpoint would take a request.

        Args:
            sent (`Mapping[str, Any]`): The fields that were refused, as they were sent.
            message (`str`): The server's message.
            param (`str`, *optional*): The parameter that the server names.
            options (`frozenset[str]`): Fields that may be left out.

        Returns:
            `Dialect` or `None`: This dialect with one further peculiarity; `None` if the refusal tells of none.
        """
        if _OTHER_REASONS.search(message):
            return None
        for name in _named_fields(sent, message, param):
            if name in ("top_logprobs", "logprobs"):
                limit = _lower_limit(sent.get("top_logprobs"), message, is_named=name == "top_logprobs")
                if limit is not None:
                    return replace(self, max_top_logprobs=limit)
            elif name == "max_tokens":
                return replace(self, renames_max_tokens=True)
            elif name in options or (name == "max_completion_tokens" and self.renames_max_tokens):
                return replace(self, left_out=self.left_out | {name})
        return None

    def learn_stated_limit(self, sent: Mapping[str, Any], message: str, param: str | None) -> Dialect | None:
        """
        Find out from a failure that may be no refusal how the endpoint would take a request. Such a failure may quote the whole
        request, so that the fields it names may be all right. Only a limit of `top_logprobs` that it states counts.

        Args:
            sent, message, param: As in [`learn`].

        Returns:
            `Dialect` or `None`: As from [`learn`].
        """
        asked = sent.get("top_logprobs")
        is_named = "top_logprobs" in _named_fields(sent, message, param)
        if not is_named or not isinstance(asked, int) or _OTHER_REASONS.search(message):
            return None
        limit = _stated_limit(asked, message)
        return None if limit is None else replace(self, max_top_logprobs=limit)


def request_fields(fields: Mapping[str, Any], extra_body: Mapping[str, Any] | None) -> dict[str, Any]:
    """
    Combine the fixed fields of a request with a user's.

    Args:
        fields (`Mapping[str, Any]`): Fixed fields.
        extra_body (`Mapping[str, Any]`, *optional*): A user's fields, which have precedence. `None` as a value leaves a
            field out. `max_completion_tokens` takes the place of `max_tokens`.
    """
    extra = dict(extra_body or {})
    if extra.get("max_completion_tokens") is not None:
        extra.setdefault("max_tokens", None)
    return {name: value for name, value in {**fields, **extra}.items() if value is not None}


def _named_fields(sent: Mapping[str, Any], message: str, param: str | None) -> list[str]:
    """Fields that a refusal names, the likeliest first."""
    param = next((name for name in sent if _plain(name) == _plain(param or "")), None)
    found = {}
    for name in sent:
        # Some servers write names in camel case. In prose a letter may be anything.
        spelling = re.escape(name).replace("_", "_?")
        pattern = rf"(?<!\w){spelling}(?!\w)" if len(name) > 1 else rf"['\"`]{spelling}['\"`]"
        match = re.search(pattern, message, re.IGNORECASE)
        if match:
            found[name] = match.start()
    by_place = sorted(found, key=found.__getitem__)
    return by_place if param is None else [param, *(name for name in by_place if name != param)]


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def _lower_limit(asked: Any, message: str, is_named: bool) -> int | None:
    """Number of candidates to try next. It is less than what was asked for, so a series of refusals ends."""
    if not isinstance(asked, int):
        return None
    limit = _stated_limit(asked, message) or _largest_limit(asked, re.findall(r"\d+", message))
    if limit is not None or not is_named:
        return limit
    return next((limit for limit in _LOWER_CANDIDATES if limit < asked), None)


def _stated_limit(asked: int, message: str) -> int | None:
    """Number of candidates that a message calls the limit, if it is less than what was asked for."""
    return _largest_limit(asked, re.findall(rf"{_LIMIT_WORDS}\D{{0,24}}(\d+)", message, re.IGNORECASE))


def _largest_limit(asked: int, numbers: Sequence[str]) -> int | None:
    return max((int(n) for n in numbers if len(n) < 4 and 2 <= int(n) < asked), default=None)
