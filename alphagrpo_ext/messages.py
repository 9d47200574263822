# SPDX-License-Identifier: Apache-2.0

"""The request in a dataset's `prompt`, a text or a conversation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any


logger = logging.getLogger(__name__)

_SYSTEM_ROLES = ("system", "developer")
_NO_TEXT = "prompt has no user message with text"
_announced: set[str] = set()


def prompt_text(prompt: Any) -> str:
    """
    Read the request in a dataset's `prompt`.

    What the policy does not see of a conversation, which are messages before the last one, is announced once per process.

    Args:
        prompt (`str` or `list[dict]`):
            The request, or a conversation that ends with the message of the user that holds it. The content of that message is a
            text or a list of parts. Texts of several parts are joined with a space. A part `{"type": "image"}` marks the place of
            the row's image and is left out.

    Raises:
        `ValueError`: If there is no text, if the conversation does not end with the user's message, or if that message has a
            part of another kind.
    """
    if isinstance(prompt, str):
        return _checked(prompt, "prompt is empty")
    if not isinstance(prompt, list | tuple):
        raise ValueError(f"prompt must be a string or a list of messages, got {type(prompt).__name__}")
    for message in prompt:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            found = list(message) if isinstance(message, Mapping) else repr(message)[:100]
            raise ValueError(f"prompt: each message must have 'role' and 'content', but one has {found}")
    roles = [message["role"] for message in prompt]
    if "user" not in roles:
        raise ValueError(f"{_NO_TEXT}; the roles of its messages are {roles}")
    if roles[-1] != "user":
        raise ValueError(
            f"prompt must end with the user's message, but ends with one of role '{roles[-1]}': remove what follows the request"
        )
    text = _checked(_content_text(prompt[-1].get("content")), _NO_TEXT)
    if any(role in _SYSTEM_ROLES for role in roles):
        _announce("a system message, which the policy does not see, because its processor has one of its own", text)
    if any(role not in _SYSTEM_ROLES for role in roles[:-1]):
        _announce("messages before the last one of the user, which the policy does not see", text)
    return text


def _announce(what: str, text: str) -> None:
    if what not in _announced:
        _announced.add(what)
        logger.warning("A prompt has %s (%r). Further prompts are not reported.", what, text[:80])


def num_image_parts(prompt: Any) -> int:
    """Number of places for images in the request of a conversation that [`prompt_text`] has read."""
    content = None if isinstance(prompt, str) else prompt[-1].get("content")
    return sum(_kind(part) == "image" for part in content) if isinstance(content, list | tuple) else 0


def _checked(text: str, message: str) -> str:
    if not text.strip():
        raise ValueError(message)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("prompt: the text is not valid Unicode: it holds half a surrogate pair") from error
    return text


def _content_text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ValueError(f"prompt: content must be a text or a list of parts, but is {type(content).__name__}")
    return " ".join(text for part in content if (text := _part_text(part)) is not None)


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, Mapping) else None


def _part_text(part: Any) -> str | None:
    """The text of a part; `None` for the place of an image."""
    kind = _kind(part)
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "image":
        # `datasets` fills missing keys with None.
        given = [name for name, value in part.items() if name not in ("type", "text") and value is not None]
        if given:
            raise ValueError(f"prompt: a message holds an image ('{given[0]}'): put it into the row's column 'image'")
        return None
    raise ValueError(f"prompt: a part of a message must be of type 'text' or 'image', but is {str(part)[:100]}")
