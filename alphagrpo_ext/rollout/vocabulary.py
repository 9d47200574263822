# SPDX-License-Identifier: Apache-2.0

"""Words of prompts that a model cannot read. A small model, such as the packaged one, has a vocabulary of whole words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from alphagrpo_ext.messages import prompt_text
from alphagrpo_ext.models.contract import UnifiedProcessor


def unknown_words(prompts: Iterable[Any], processor: UnifiedProcessor) -> list[str]:
    """
    Words that a model's tokenizer does not know, each once, in order. A tokenizer without an unknown token knows all words.

    Args:
        prompts (`Iterable[Any]`): Prompts, as [`~alphagrpo_ext.messages.prompt_text`] reads them.
        processor ([`UnifiedProcessor`]): The model's processor.
    """
    tokenizer = processor.tokenizer
    if tokenizer.unk_token_id is None:
        return []
    words = dict.fromkeys(word for prompt in prompts for word in prompt_text(prompt).split())
    return [word for word in words if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids]


def unknown_words_warning(words: Iterable[str], processor: UnifiedProcessor) -> str:
    """
    What to tell the user about words that a model does not know.

    Args:
        words (`Iterable[str]`): What [`unknown_words`] returned, at least one word.
        processor ([`UnifiedProcessor`]): The model's processor.
    """
    spelled = {word: " ".join(re.findall(r"\w+|[^\w\s]", word.lower())) for word in words}
    text = f"The model does not know these words, and reads each as an unknown one: {' '.join(map(repr, spelled))}."
    known = {word: other for word, other in spelled.items() if not unknown_words([other], processor)}
    if known:
        examples = ", ".join(f"{other!r} for {word!r}" for word, other in list(known.items())[:3])
        text += f" It reads lower case, with blanks around punctuation: write {examples}."
    return text
