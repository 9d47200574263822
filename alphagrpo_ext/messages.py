# SPDX-License-Identifier: Apache-2.0

"""The request in a dataset's `prompt`, a text or a conversation. What would be misread or dropped is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


_SYSTEM_ROLES = ("system", "developer")


def prompt_text(prompt: Any) -> str:
    """
    Read the request in a dataset's `prompt`.

    Args:
        prompt (`str` or `list[dict]`):
            The request, or a conversation that consists of one message of the user, which system messages may precede. The
            content of the message is a text or a list of parts. Texts of several parts are joined with a space. A part
            `{"type": "image"}` marks the place of the row's image and is left out.

    Raises:
        `ValueError`: If there is no text, or if a part of the conversation would be dropped. The message names it.
    """
    if isinstance(prompt, str):
        return _checked(prompt, "prompt is empty")
    if not isinstance(prompt, list | tuple):
        raise ValueError(f"prompt must be a string or a list of messages, got {type(prompt).__name__}")
    if not prompt:
        raise ValueError("prompt is empty")
    for message in prompt:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            found = list(message) if isinstance(message, Mapping) else repr(message)[:100]
            raise ValueError(f"prompt: each message must have 'role' and 'content', but one is {found}")
    messages = [message for message in prompt if message["role"] not in _SYSTEM_ROLES]
    if not messages:
        raise ValueError("prompt has no user message with text, but a system message alone")
    if messages[-1]["role"] != "user":
        raise ValueError(
            f"prompt must end with the user's message, but ends with one of role '{messages[-1]['role']}': remove what follows "
            f"the request"
        )
    if len(messages) > 1:
        raise ValueError(
            f"prompt has {len(messages) - 1} earlier messages ({', '.join(m['role'] for m in messages[:-1])}), which the policy "
            f"cannot see: write the request as one message"
        )
    if prompt[-1] is not messages[-1]:
        raise ValueError("prompt must end with the user's message, but ends with a system message")
    return _checked(_content_text(messages[-1].get("content")), "prompt: the user's message has no text")


def has_system_message(prompt: Any) -> bool:
    """Whether a conversation has a system message. The policy does not see it, since its processor has one of its own."""
    return not isinstance(prompt, str) and any(message.get("role") in _SYSTEM_ROLES for message in prompt)


def num_image_parts(prompt: Any) -> int:
    """Number of places for images in a conversation that [`prompt_text`] has read."""
    contents = [] if isinstance(prompt, str) else [message.get("content") for message in prompt]
    return sum(_kind(part) == "image" for content in contents if isinstance(content, list | tuple) for part in content)


def _checked(text: str, message: str) -> str:
    if not text.strip():
        raise ValueError(message)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt has an unpaired surrogate ({error})") from error
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
