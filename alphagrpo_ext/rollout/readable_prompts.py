# SPDX-License-Identifier: Apache-2.0

"""
Parts of prompts that a model cannot read: words that it does not know, and what its context does not hold.

A small model, such as the packaged one, has a vocabulary of whole words. Beyond its context a model has learned nothing, and what
it writes and paints means nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from alphagrpo_ext.messages import prompt_text
from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.rollout.config import RolloutConfig
from alphagrpo_ext.rollout.task import Task


def check_trajectory_room(
    row: Mapping[str, Any],
    where: str,
    task: Task,
    processor: UnifiedProcessor,
    model: UnifiedModel,
    config: RolloutConfig,
) -> None:
    """
    Check that a row fits into the model's context with the longest texts that the policy may write. Training asks for this, because
    it would learn from those texts, too.

    Args:
        row (`Mapping[str, Any]`): The row. Its image is not decoded.
        where (`str`): Name of the row for messages.
        task ([`Task`]): Its task.
        processor, model: Processor and model of the policy.
        config ([`RolloutConfig`]): Size of images, and the longest thought.

    Raises:
        `ValueError`: If it does not fit.
    """
    positions = task.max_positions(row, processor, model, config)
    if positions > model.max_positions:
        raise ValueError(
            f"{where} can take {positions} positions, more than the model's {model.max_positions}: lower num_reflection_rounds "
            f"({task.num_reflection_rounds}) or max_completion_length ({config.max_new_tokens}), or shorten the prompt "
            f"({prompt_text(row['prompt'])[:80]!r})"
        )


def check_prompt_room(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    task: Task,
    processor: UnifiedProcessor,
    model: UnifiedModel,
    config: RolloutConfig,
) -> None:
    """
    Check that prompts and images of rows fit into the model's context, with texts of a single token. Most texts are much shorter
    than the longest one, so only this is checked where nothing is trained.

    Args:
        rows (`Iterable[tuple[str, Mapping[str, Any]]]`): Rows, each with its name for messages. Images are not decoded.
        task, processor, model, config: As in [`check_trajectory_room`].

    Raises:
        `ValueError`: At the first row that does not fit.
    """
    shortest = replace(config, max_new_tokens=1)
    for where, row in rows:
        positions = task.max_positions(row, processor, model, shortest)
        if positions > model.max_positions:
            raise ValueError(
                f"{where} needs at least {positions} positions, more than the model's {model.max_positions}: shorten the prompt "
                f"({prompt_text(row['prompt'])[:80]!r}), or paint smaller images"
            )


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
