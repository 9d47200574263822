# SPDX-License-Identifier: Apache-2.0

"""
Answers to questions, as text in a column of TRL's table of completions.

A reward function that answers questions calls `log_extra("<its name>/answers", ...)` with one such text a sample. The table
shows it to people, and a report reads it back.
"""

from __future__ import annotations

from collections.abc import Sequence

from alphagrpo_ext.report.records import Answer


COLUMN_SUFFIX = "/answers"


def format_answers(answers: Sequence[Answer]) -> str:
    """
    Args:
        answers (`Sequence[Answer]`): Answers about one image.

    Returns:
        `str`: One line a question: P(yes) with four decimals or `-`, kind, tag and question, with a tab between. Other white
        space becomes a single blank.
    """
    return "\n".join(
        "\t".join(
            (
                "-" if answer.p_yes is None else f"{answer.p_yes:.4f}",
                *(" ".join(part.split()) for part in (answer.kind, answer.tag, answer.question)),
            )
        )
        for answer in answers
    )


def parse_answers(text: str | None) -> list[Answer]:
    """
    Read them back.

    Args:
        text (`str`, *optional*): What [`format_answers`] made; `None` for a sample without any.

    Raises:
        `ValueError`: If a line is not of that form. The message shows it.
    """
    answers = []
    for line in text.split("\n") if text else []:
        parts = line.split("\t")
        if len(parts) != 4:
            raise ValueError(f"an answer must be 'P(yes), kind, tag, question' with tabs between, but is {line!r}")
        p_yes, kind, tag, question = parts
        answers.append(Answer(question, tag, kind, None if p_yes == "-" else float(p_yes)))
    return answers
