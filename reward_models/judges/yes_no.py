# SPDX-License-Identifier: Apache-2.0

"""P(yes) from the distribution of an answer's first token."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from transformers import PreTrainedTokenizerBase


QUESTION_PROMPT = (
    "Look at the image and answer the question about it. If you cannot tell, answer no.\n"
    "Question: {question}\n"
    "Answer with one word, yes or no."
)
"""Text that follows the image in a request to a judge."""

# Spaces, punctuation, and the characters that tokenizers write for a space or a line break.
_SURROUNDING = " \t\r\n.,;:!?'\"`*_()[]{}<>-|\u2581\u0120\u010a"


def read_word(text: str) -> bool | None:
    """Return `True` for a yes and `False` for a no, ignoring case, spaces and punctuation; else `None`."""
    return {"yes": True, "no": False}.get(text.strip(_SURROUNDING).lower())


def read_plain_answer(text: str) -> float | None:
    """Return 1 for an answer that starts with the word yes, 0 for one that starts with no, else `None`."""
    words = text.strip(_SURROUNDING).split()
    word = read_word(words[0]) if words else None
    return None if word is None else float(word)


def yes_probability(log_probs: Iterable[tuple[str, float]]) -> float | None:
    """
    Compute `p_yes / (p_yes + p_no)`, each summed over its spellings.

    Args:
        log_probs (`Iterable[tuple[str, float]]`):
            Candidates for the first token of the answer: text and log-probability, or logit.

    Returns:
        `float` or `None`: P(yes) in [0, 1]; `None` if no candidate is a yes or a no.
    """
    by_word: dict[bool, list[float]] = {True: [], False: []}
    for token, log_prob in log_probs:
        word = read_word(token)
        if word is not None and log_prob > -math.inf:
            by_word[word].append(log_prob)
    if not by_word[True] and not by_word[False]:
        return None
    # Relative to the largest, because some engines send -9999 for tokens that they did not consider.
    largest = max(by_word[True] + by_word[False])
    yes, no = (math.fsum(math.exp(value - largest) for value in by_word[word]) for word in (True, False))
    return yes / (yes + no)


def yes_no_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """
    Return the ids of all spellings of yes and of no in a vocabulary.

    Raises:
        `ValueError`: If it has no single token for one of them, so that one token cannot tell the answer.
    """
    ids: dict[bool, list[int]] = {True: [], False: []}
    for token, token_id in tokenizer.get_vocab().items():
        word = read_word(token)
        if word is not None:
            ids[word].append(token_id)
    for word, name in ((True, "yes"), (False, "no")):
        if not ids[word]:
            raise ValueError(f"the tokenizer has no single token for '{name}', so this model cannot be a judge")
    return sorted(ids[True]), sorted(ids[False])


def yes_probability_of_logits(logits: torch.Tensor, yes_ids: list[int], no_ids: list[int]) -> list[float]:
    """
    Compute P(yes) from whole next-token distributions.

    Args:
        logits (`torch.Tensor` of shape `(questions, vocabulary)`): Logits of the first token of each answer.
        yes_ids, no_ids (`list[int]`): Token ids from [`yes_no_token_ids`].

    Returns:
        `list[float]`: P(yes) per question.
    """
    logits = logits.float()
    yes, no = (logits[:, ids].logsumexp(dim=-1) for ids in (yes_ids, no_ids))
    return torch.sigmoid(yes - no).tolist()
