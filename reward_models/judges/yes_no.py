# SPDX-License-Identifier: Apache-2.0

"""
P(yes) from the distribution of an answer's first word.

Yes and no must hold a minimum of the probability. Where they hold a millionth of it, as in a model that thinks first, their
ratio says nothing about the question.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from alphagrpo_ext.ranges import check_number
from reward_models.endpoints.thoughts import THOUGHT_NAME, end_of_thought


QUESTION_PROMPT = (
    "Look at the image and answer the question about it. If you cannot tell, answer no.\n"
    "Question: {question}\n"
    "Answer with one word, yes or no."
)
"""Text that follows the image in a request to a judge."""

DEFAULT_MIN_ANSWER_MASS = 0.5
"""Smallest probability that yes and no must hold together."""

# Sums of float32 probabilities are exact to about this.
_ROUNDING = 1e-6
# Some engines round log-probabilities, so that a certain token's may be slightly above 0.
_LARGEST_LOG_PROB = 0.01
# The sum of probabilities that are rounded so.
_LARGEST_MASS = 1.02

# Spaces, punctuation, and the characters that tokenizers write for a space or a line break.
_SURROUNDING = " \t\r\n.,;:!?'\"`*_()[]{}<>-|\u2581\u0120\u010a\u201c\u201d\u2018\u2019"
_SPACES = str.maketrans("\u2581\u0120\u010a", "  \n")

LONGEST_LEAD = 1000
"""Number of characters, behind a finished thought, that are looked at for an answer. It begins with its word."""

# What may precede an answer: tags and special tokens, boxes, a label such as "Answer:", punctuation and space.
_LEAD = re.compile(
    rf"""(?:
        <(?!\s*(?:/\s*)?(?:yes|no)\b|{THOUGHT_NAME})[^<>]{{1,64}}>
      | \[(?!/?(?:yes|no)\]|{THOUGHT_NAME})/?[a-z_]{{2,32}}\]
      | \\(?:boxed|text|textbf|mathrm|[(\[])
      | (?:(?:the|my|final|correct|short)\s+)*answer["'`*_\s]*(?:\bis\b|[:=\u2013-])
      | [\s{re.escape(_SURROUNDING)}\#$=~/\\\u2013\u2014\u2022\u00ab\u00bb\ufffd]
    )*""",
    re.IGNORECASE | re.VERBOSE,
)
# A yes or no that stands alone: "No, there is none" is an answer, "No idea" and "Yes and no" are none.
_PLAIN_ANSWER = re.compile(
    r"""(?P<word>yes|no)(?![^\W_])
        (?:\s*</?[^<>]*>|[\]})>|"'`*_$\\\u2019\u201d\u00bb])*
        (?: \W*$
          | [.,;:!?\u2026\u3002\uff0c\uff01]
          | \s*[\n(\u2013\u2014]
          | \s+-+\s
          | \s+(?:it|its|there|this|that|these|those|the|they|he|she|we|i|you|as|because|since|in|on|at)\b
        )""",
    re.IGNORECASE | re.VERBOSE,
)
# "Note" only begins like an answer, "Yes and no" is none. "Yes, no cat is there" and "No idea" may be, by the question.
_OTHER_WORD = re.compile(r"(?:yes|no)[^\W_]", re.IGNORECASE)
_UNDECIDED = re.compile(r"(yes|no)\W{0,8}(?:/|\W(?:and|or)\W)\W{0,8}(?!\1)(?:yes|no)\b", re.IGNORECASE)
_BOTH = re.compile(r"(yes|no)\W+(?:(?:and|or|but|also|maybe)\W+)*(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class YesNo:
    """
    Yes and no in the distribution of one token.

    Args:
        p_yes (`float`): Share of yes in the probability of both; NaN if it is not known.
        mass (`float`): Probability of both together; NaN if it is not known.
        token (`str`, *optional*): The likeliest token, or the one that was written.
    """

    p_yes: float
    mass: float
    token: str = ""

    def answer(self, min_answer_mass: float) -> float | None:
        """Return P(yes) in [0, 1], or `None` if yes and no hold less than `min_answer_mass` or nothing is known."""
        # Comparisons with NaN are false.
        is_answer = self.mass > 0 and self.mass >= min_answer_mass - _ROUNDING and 0 <= self.p_yes <= 1
        return self.p_yes if is_answer else None


def check_min_answer_mass(value: float) -> None:
    """
    Check a minimum of the probability of yes and no.

    Raises:
        `ValueError`: If it is not in [0, 1].
    """
    check_number("min_answer_mass", value, "[0, 1]")


def read_word(text: str) -> bool | None:
    """Return `True` for a yes and `False` for a no, ignoring case, spaces and punctuation; else `None`."""
    return {"yes": True, "no": False}.get(text.strip(_SURROUNDING).lower())


def answer_start(text: str) -> int:
    """
    Return where the first word of an answer begins: behind a finished thought, tags, special tokens, boxes, a label such as
    "Answer:", punctuation and space. Without such a word that is the end of the text.
    """
    text = text.translate(_SPACES)
    start = end_of_thought(text)
    return _LEAD.match(text, start, start + LONGEST_LEAD).end()


def is_other_than_its_token(text: str) -> bool:
    """
    Whether an answer whose first token is yes or no is neither, so that the probability of the token says nothing: the token only
    begins another word, such as "Note", or both words follow each other, as in "Yes and no".
    """
    text = text.translate(_SPACES)
    answer = text[answer_start(text) :][:LONGEST_LEAD]
    return _OTHER_WORD.match(answer) is not None or _UNDECIDED.match(answer) is not None


def read_plain_answer(text: str) -> float | None:
    """
    Return 1 for an answer yes and 0 for a no, else `None`. The word must stand alone or begin a sentence about it: "Yes.",
    "**No**" and "No, there is none" are answers, "No idea" and "Yes and no" are not.
    """
    text = text.translate(_SPACES)
    answer = text[answer_start(text) :][:LONGEST_LEAD]
    match = _PLAIN_ANSWER.match(answer)
    both = _BOTH.match(answer)
    if match is None or (both is not None and both[1].lower() != both[2].lower()):
        return None
    return float(match["word"].lower() == "yes")


def read_yes_no(log_probs: Iterable[tuple[str, float | None]]) -> YesNo:
    """
    Sum yes and no over their spellings.

    Args:
        log_probs (`Iterable[tuple[str, float | None]]`):
            Candidates for a token: text and log-probability. What an engine did not consider has one of -9999, which adds
            nothing. Candidates that are neither a yes nor a no do not matter. One that is listed twice counts once.

    Raises:
        `ValueError`: If the log-probability of a yes or no is missing, NaN, infinite or positive, or yes and no together are
            more probable than 1.
    """
    masses: dict[bool, list[float]] = {True: [], False: []}
    # Some engines list the token that was written a second time.
    for token, log_prob in dict.fromkeys(log_probs):
        word = read_word(token)
        if word is None:
            continue
        if log_prob is None or not math.isfinite(log_prob) or log_prob > _LARGEST_LOG_PROB:
            raise ValueError(f"the log-probability of {token!r} is {log_prob}")
        masses[word].append(math.exp(log_prob))
    yes, no = math.fsum(masses[True]), math.fsum(masses[False])
    mass = yes + no
    if mass > _LARGEST_MASS:
        raise ValueError(
            f"yes and no have probabilities of {yes:.3g} and {no:.3g}, which is more than 1 together: the log-probabilities are "
            f"those of no distribution"
        )
    return YesNo(yes / mass if mass > 0 else math.nan, min(mass, 1.0))


def yes_probability(
    log_probs: Iterable[tuple[str, float | None]], min_answer_mass: float = DEFAULT_MIN_ANSWER_MASS
) -> float | None:
    """
    Compute `p_yes / (p_yes + p_no)`, each summed over its spellings.

    Args:
        log_probs (`Iterable[tuple[str, float | None]]`):
            Candidates for the first word of the answer: text and log-probability.
        min_answer_mass (`float`, *optional*, defaults to `0.5`):
            Smallest `p_yes + p_no` of an answer, in [0, 1].

    Returns:
        `float` or `None`: P(yes) in [0, 1]; `None` if yes and no hold too little of the probability or more than all of it, or
        the log-probability of one of them is missing, NaN, infinite or positive.
    """
    try:
        return read_yes_no(log_probs).answer(min_answer_mass)
    except ValueError:
        return None


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


def yes_no_of_logits(logits: torch.Tensor, yes_ids: list[int], no_ids: list[int]) -> list[YesNo]:
    """
    Sum yes and no in whole next-token distributions.

    Args:
        logits (`torch.Tensor` of shape `(questions, vocabulary)`): Logits of the first token of each answer.
        yes_ids, no_ids (`list[int]`): Token ids from [`yes_no_token_ids`].

    Returns:
        `list[YesNo]`: One entry per question. It is NaN where a logit is NaN or plus infinity; minus infinity is a token that
        is ruled out.
    """
    logits = logits.float()
    yes, no = (logits[:, ids].logsumexp(dim=-1) for ids in (yes_ids, no_ids))
    # Plus infinity and NaN anywhere make the sum over the vocabulary infinite or NaN, and with it the difference NaN.
    mass = (torch.logaddexp(yes, no) - logits.logsumexp(dim=-1)).exp()
    p_yes = torch.sigmoid(yes - no)
    return [YesNo(p, m) for p, m in zip(p_yes.tolist(), mass.tolist(), strict=True)]


def yes_probability_of_logits(
    logits: torch.Tensor, yes_ids: list[int], no_ids: list[int], min_answer_mass: float = DEFAULT_MIN_ANSWER_MASS
) -> list[float | None]:
    """
    Compute P(yes) from whole next-token distributions, as [`yes_probability`] does from candidates.

    Args:
        logits (`torch.Tensor` of shape `(questions, vocabulary)`): Logits of the first token of each answer.
        yes_ids, no_ids (`list[int]`): Token ids from [`yes_no_token_ids`].
        min_answer_mass (`float`, *optional*, defaults to `0.5`): Smallest `p_yes + p_no` of an answer, in [0, 1].

    Returns:
        `list[float | None]`: P(yes) per question; `None` if yes and no hold too little of the probability, or a logit is NaN or
        plus infinity.
    """
    return [reading.answer(min_answer_mass) for reading in yes_no_of_logits(logits, yes_ids, no_ids)]
