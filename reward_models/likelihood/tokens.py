# SPDX-License-Identifier: Apache-2.0

"""Which tokens of a prompt count in its likelihood."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TOKEN_CHOICES = ("all", "content")
"""What `likelihood_tokens` may be."""

# Words that fit almost every image. Prepositions of place, numbers, "no" and "not" say something about it, and are not here.
_FUNCTION_WORDS = frozenset(
    "a an the this that these those some any and or as of with its it his her their there which who whose is are was were be "
    "being been am has have had to for so such very please".split()
)
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def counted_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, token_ids: Sequence[int], choice: str = "all"
) -> list[bool]:
    """
    Which tokens of a text count.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): What made the ids of the text.
        text (`str`): The text.
        token_ids (`Sequence[int]`): Its ids.
        choice (`str`, *optional*, defaults to `"all"`):
            `"content"` leaves out tokens without a letter or digit of a word that says something about an image: punctuation
            and English function words such as articles, "and", "of" and "is".

    Raises:
        `ValueError`: If no token counts, or if a tokenizer does not say where its tokens are in the text, which `"content"`
            needs.
    """
    if choice == "all":
        counted = [True] * len(token_ids)
    else:
        words = [match.span() for match in _WORD.finditer(text) if match[0].lower() not in _FUNCTION_WORDS]
        counted = [
            any(start < end_of_word and first < end for first, end_of_word in words)
            for start, end in _places(tokenizer, text, token_ids)
        ]
    if not any(counted):
        raise ValueError(f"the prompt {text[:80]!r} has no tokens that count with likelihood_tokens={choice!r}")
    return counted


def _places(tokenizer: PreTrainedTokenizerBase, text: str, token_ids: Sequence[int]) -> list[tuple[int, int]]:
    """First character of every token, and the one after its last."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"likelihood_tokens='content' needs a fast tokenizer, but this one is {type(tokenizer).__name__}"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded["input_ids"] != list(token_ids):
        raise ValueError("likelihood_tokens='content' needs a processor that encodes texts as its tokenizer does")
    return encoded["offset_mapping"]
