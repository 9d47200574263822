# SPDX-License-Identifier: Apache-2.0

"""
Answers of a judge as text in TRL's table of completions.

A reward function that asks questions calls `log_extra("<its name>/answers", ...)` with one text per sample. So everything that
shows the table shows the answers, and the report reads them from there. Any reward function may add such a column.
"""

from __future__ import annotations

from collections.abc import Sequence

from alphagrpo_ext.report.records import Answer


COLUMN_SUFFIX = "/answers"


def format_answers(answers: Sequence[Answer]) -> str:
    """
    Format answers as text.

    Args:
        answers (`Sequence[Answer]`): Answers about one image.

    Returns:
        `str`: One line per question: P(yes) with four decimals or `-`, kind, tag and question, separated by tabs. Other white
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
    Parse the text of [`format_answers`].

    Args:
        text (`str`, *optional*): The text; `None` for a sample without answers.

    Raises:
        `ValueError`: If a line does not have this form. The message shows the line.
    """
    answers = []
    for line in text.split("\n") if text else []:
        parts = line.split("\t")
        if len(parts) != 4:
            raise ValueError(f"an answer must be 'P(yes), kind, tag, question' with tabs between, but is {line!r}")
        p_yes, kind, tag, question = parts
        answers.append(Answer(question, tag, kind, None if p_yes == "-" else float(p_yes)))
    return answers
