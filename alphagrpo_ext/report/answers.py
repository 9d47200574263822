# SPDX-License-Identifier: Apache-2.0

"""
Answers of a judge as text in TRL's table of completions.

A reward function that asks questions calls `log_extra("<its name>/answers", ...)` with one text per sample. So everything that
shows the table shows the answers, and the report reads them from there. Any reward function may add such a column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

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


def strict_passes(columns: Mapping[str, Sequence[Any]], num_samples: int) -> list[float]:
    """
    Whether every answer about each sample's image is yes, by a P(yes) of at least 0.5.

    Args:
        columns (`Mapping[str, Sequence[Any]]`): What reward functions gave to `log_extra`, of which answers are read.
        num_samples (`int`): Number of samples. They are the last ones of every column; a shorter column is left out.

    Returns:
        `list[float]`: 0 or 1 for every sample; NaN for one without answers, or with one that is missing.
    """
    whole = [list(values) for name, values in columns.items() if name.endswith(COLUMN_SUFFIX)]
    own = [values[-num_samples:] for values in whole if len(values) >= num_samples]
    passes = []
    for sample in range(num_samples):
        answers = [answer.p_yes for values in own for answer in parse_answers(values[sample])]
        is_known = bool(answers) and None not in answers
        passes.append(float(all(p_yes >= 0.5 for p_yes in answers)) if is_known else math.nan)
    return passes
