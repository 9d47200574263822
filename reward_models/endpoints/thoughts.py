# SPDX-License-Identifier: Apache-2.0

"""
Thoughts in the text of an answer, by the tags around them.

Families of models name these tags differently: `<think>`, `<seed:think>`, `<|START_THINKING|>`, `[THINK]`, `◁think▷`. So a tag is
that of a thought if it holds a word for thinking anywhere. All repetitions are bounded, so that a long text takes linear time.
"""

from __future__ import annotations

import re


_WORD = r"(?:think|thought|reason|reflect|analysis|scratch|monolog|deliberat|ponder|(?<![a-z])cot(?![a-z]))"
_OPEN, _CLOSE = "[<\\[\u25c1\uff1c]", "[>\\]\u25b7\uff1e]"
_INSIDE = "[^<>\\[\\]\u25c1\u25b7\uff1c\uff1e]{0,64}"
_BARS = "[\\s|\uff5c]{0,64}"

THOUGHT_NAME = rf"{_INSIDE}?{_WORD}"
"""Pattern, in any case, of the name in a tag of a thought up to the word for thinking."""

_BEGIN = re.compile(rf"[\s\"'`*]*{_OPEN}{THOUGHT_NAME}{_INSIDE}(?:{_CLOSE}|\Z)", re.IGNORECASE)
# A tag with a slash in front, or `end` in front or behind. One with a slash behind is an empty thought.
_END = re.compile(
    rf"{_OPEN}(?:{_BARS}(?:/|end){THOUGHT_NAME}{_INSIDE}|{THOUGHT_NAME}{_INSIDE}(?:/|[\s_|-]end){_BARS}){_CLOSE}",
    re.IGNORECASE,
)


def end_of_thought(text: str) -> int:
    """Return where the last finished thought of a text ends; 0 if there is none."""
    end = 0
    for match in _END.finditer(text):
        end = match.end()
    return end


def begins_with_thought(text: str) -> bool:
    """Whether a text begins with a thought that does not end in it."""
    return _BEGIN.match(text) is not None and _END.search(text) is None
