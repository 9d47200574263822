# SPDX-License-Identifier: Apache-2.0

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphagrpo_ext.report import Answer
from alphagrpo_ext.report.answers import format_answers, parse_answers, strict_passes


words = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
answers = st.builds(
    Answer, words, words, st.sampled_from(("semantic", "quality")), st.none() | st.floats(0, 1, allow_nan=False)
)


@given(st.lists(answers, min_size=1))
def test_answers_survive_the_table(given_answers: list[Answer]) -> None:
    """But for white space, and for digits beyond the fourth."""
    parsed = parse_answers(format_answers(given_answers))
    for answer, back in zip(given_answers, parsed, strict=True):
        assert (back.question, back.tag, back.kind) == (
            " ".join(answer.question.split()),
            " ".join(answer.tag.split()),
            answer.kind,
        )
        assert back.p_yes == (None if answer.p_yes is None else pytest.approx(answer.p_yes, abs=5.1e-5))


@pytest.mark.parametrize("text", [None, ""])
def test_no_answers(text: str | None) -> None:
    assert parse_answers(text) == []


def test_malformed_answers_are_named() -> None:
    with pytest.raises(ValueError, match="'0.5 Count'"):
        parse_answers("0.5 Count")


def test_an_image_passes_strictly_if_every_answer_of_every_reward_is_yes() -> None:
    def text(*p_yes: float | None) -> str:
        return format_answers([Answer("?", "Color", "semantic", p) for p in p_yes])

    columns = {
        "first/answers": [text(0.0), text(0.5, 1.0), text(0.9), text(1.0, None), None],
        "second/answers": [text(1.0), text(0.7), text(0.4), text(1.0), None],
        "short/answers": [text(0.0)],
        "first": [0.0] * 5,
    }
    *known, missing, unasked = strict_passes(columns, 4)
    assert known == [1.0, 0.0] and math.isnan(missing) and math.isnan(unasked)
