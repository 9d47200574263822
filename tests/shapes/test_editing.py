# SPDX-License-Identifier: Apache-2.0

from collections import Counter

import pytest

from alphagrpo_ext.shapes.editing import EDITS, editing_rows
from alphagrpo_ext.shapes.judge import answer_questions, strict_pass
from alphagrpo_ext.shapes.text import vocabulary
from reward_models.prompts.questions import from_row


ROWS = editing_rows(200, seed=0)


def test_rows_are_valid_and_say_nothing_unknown() -> None:
    known = set(vocabulary())
    for row in ROWS:
        assert from_row(row).valid_semantic_questions
        assert set(row["prompt"].split()) <= known
    assert Counter(row["category"] for row in ROWS) == dict.fromkeys(EDITS, 50)


@pytest.mark.parametrize("edit", EDITS)
def test_the_image_as_it_is_does_not_pass(edit: str) -> None:
    for row in ROWS:
        if row["category"] == edit:
            questions = [question["question"] for question in row["semantic_questions"]]
            assert not strict_pass(answer_questions(row["image"], questions)), row["prompt"]


def test_rows_repeat_by_seed() -> None:
    assert [row["prompt"] for row in editing_rows(8, 0)] == [row["prompt"] for row in editing_rows(8, 0)]
    assert [row["prompt"] for row in editing_rows(8, 0)] != [row["prompt"] for row in editing_rows(8, 1)]
