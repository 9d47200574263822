# SPDX-License-Identifier: Apache-2.0

"""
The chat template of a tokenizer, split into the token ids that stand around texts.

A trajectory grows segment by segment, and no token of it is ever encoded again. A template renders whole conversations.
So it is rendered once with marks in the place of the texts, and cut at the marks. Nothing of it is written by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from transformers import PreTrainedTokenizerBase


SYSTEM, USER, REPLY, NEXT = "SYSTEMTEXT", "USERTEXT", "REPLYTEXT", "NEXTTEXT"
THOUGHT_START, THOUGHT_END = "<think>", "</think>"
Messages = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class ChatPieces:
    """
    Token ids around the texts of a conversation. The end token stands between a reply and `after_reply`.

    Args:
        default_system (`list[int]`): What a conversation without a system text begins with.
        system_start, system_end (`list[int]`): Around a system text.
        user_start, user_end (`list[int]`): Around what a user says or shows.
        reply_start (`list[int]`): Header of a reply, as the template opens it by default.
        answer_start (`list[int]`): Header of a reply that begins without a thought.
        after_reply (`list[int]`): Between the end token of a reply and the user's next turn.
    """

    default_system: list[int]
    system_start: list[int]
    system_end: list[int]
    user_start: list[int]
    user_end: list[int]
    reply_start: list[int]
    answer_start: list[int]
    after_reply: list[int]

    @property
    def longest_frame(self) -> int:
        """Upper bound of the tokens that one segment adds to its own."""
        return sum(len(ids) for ids in asdict(self).values()) - len(self.answer_start) + 1


def chat_pieces(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """
    Split the chat template of a tokenizer.

    Returns:
        `dict[str, list[int]]`: Arguments of [`ChatPieces`].

    Raises:
        `ValueError`: If the tokenizer has no template, or if the template or the tokenizer treats a conversation as more
            than a sequence of texts with fixed tokens around them.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: its folder lacks chat_template.jinja")
    asked = [("user", USER)]
    before_user, user_end = _cut(tokenizer, asked, USER)
    system_start, system_to_user, _ = _cut(tokenizer, [("system", SYSTEM), *asked], SYSTEM, USER)
    replied = [*asked, ("assistant", REPLY)]
    *_, after_reply = _cut(tokenizer, replied, USER, REPLY)
    *_, reply_to_user, _ = _cut(tokenizer, [*replied, ("user", NEXT)], USER, REPLY, NEXT)
    user_start = _without_start(reply_to_user, after_reply, "a reply")
    headers = {
        name: _without_start(_cut(tokenizer, asked, USER, header=True, **options)[1], user_end, "a user's turn")
        for name, options in (("reply_start", {}), ("answer_start", {"enable_thinking": False}))
    }
    texts = {
        "default_system": _without_end(before_user, user_start, "a user's turn"),
        "system_start": system_start,
        "system_end": _without_end(system_to_user, user_start, "a user's turn"),
        "user_start": user_start,
        "user_end": user_end,
        **headers,
        "after_reply": _without_start(after_reply, tokenizer.eos_token, "a reply"),
    }
    pieces = {name: tokenizer.encode(text, add_special_tokens=False) for name, text in texts.items()}
    _check_pieces(tokenizer, ChatPieces(**pieces))
    return pieces


def opened_thought(tokenizer: PreTrainedTokenizerBase) -> str:
    """The `<think>` that a header of the template opens for the policy, as Edge's does, with the white space after it, or `""`."""
    header = _render(tokenizer, [("user", USER)], header=True)
    start = header.rfind(THOUGHT_START)
    return header[start:] if start >= 0 and header[start:].strip() == THOUGHT_START else ""


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, header: bool, **options: bool) -> str:
    conversation = [{"role": role, "content": text} for role, text in messages]
    return tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=header, **options)


def _cut(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *marks: str, header: bool = False, **options: bool
) -> list[str]:
    """What stands before, between and after the marks of a rendered conversation."""
    rest, parts = _render(tokenizer, messages, header, **options), []
    for mark in marks:
        if rest.count(mark) != 1:
            raise ValueError(f"the chat template renders a text {rest.count(mark)} times instead of once: {rest!r}")
        part, rest = rest.split(mark)
        parts.append(part)
    return [*parts, rest]


def _without_start(text: str, start: str, place: str) -> str:
    if not text.startswith(start):
        raise ValueError(f"the chat template must write {start!r} after {place}, but writes {text!r}")
    return text.removeprefix(start)


def _without_end(text: str, end: str, place: str) -> str:
    if not text.endswith(end):
        raise ValueError(f"the chat template must write {end!r} at the start of {place}, but writes {text!r}")
    return text.removesuffix(end)


def _check_pieces(tokenizer: PreTrainedTokenizerBase, pieces: ChatPieces) -> None:
    system, user = (tokenizer.encode(text, add_special_tokens=False) for text in (SYSTEM, USER))
    ids = [*pieces.system_start, *system, *pieces.system_end, *pieces.user_start, *user, *pieces.user_end]
    rendered = _render(tokenizer, [("system", SYSTEM), ("user", USER)], header=True)
    expected = tokenizer.encode(rendered, add_special_tokens=False)
    if [*ids, *pieces.reply_start] != expected:
        raise ValueError(
            f"the tokenizer joins the tokens of the chat template with those of the texts: {rendered!r} has {len(expected)} "
            f"tokens, its parts have {len(ids) + len(pieces.reply_start)}"
        )


def read_pieces(values: Mapping[str, Sequence[int]] | None) -> ChatPieces:
    """
    [`ChatPieces`] from the values of a configuration.

    Raises:
        `ValueError`: If there are none.
    """
    if not values:
        raise ValueError("the configuration has no chat_pieces: set them to chat_pieces(tokenizer)")
    return ChatPieces(**{name: list(ids) for name, ids in values.items()})
