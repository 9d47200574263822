# SPDX-License-Identifier: Apache-2.0

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphagrpo_ext.report import Answer
from alphagrpo_ext.report.answers import format_answers, parse_answers


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
