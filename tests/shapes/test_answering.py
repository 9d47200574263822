# SPDX-License-Identifier: Apache-2.0

import random
from collections import Counter

import pytest

from alphagrpo_ext.shapes.answering import question_rows, sample_question
from alphagrpo_ext.shapes.judge import answer_questions
from alphagrpo_ext.shapes.prompts import CATEGORIES, sample_spec, semantic_questions
from alphagrpo_ext.shapes.scene import render


@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_rows_are_balanced_and_right(split: str) -> None:
    rows = question_rows(split, 56, seed=3)
    counts = Counter((row["category"], row["solution"]) for row in rows)
    assert counts == dict.fromkeys([(category, word) for category in CATEGORIES for word in ("yes", "no")], 4)
    for row in rows:
        (probability,) = answer_questions(row["image"], [row["prompt"]])
        assert row["solution"] == ("yes" if probability >= 0.5 else "no")
    again = question_rows(split, 56, seed=3)
    assert [(row["prompt"], row["image"].tobytes()) for row in rows] == [
        (row["prompt"], row["image"].tobytes()) for row in again
    ]
    assert [row["prompt"] for row in question_rows(split, 56, seed=4)] != [row["prompt"] for row in rows]


def test_a_question_is_one_of_the_prompt() -> None:
    rng = random.Random(0)
    for wanted in (True, False) * 10:
        spec = sample_spec(rng, "evaluation")
        scene, question, answer = sample_question(spec, wanted, rng)
        assert question in [row["question"] for row in semantic_questions(spec)]
        assert answer == (answer_questions(render(scene), [question])[0] >= 0.5)
        # A right scene answers every question with yes.
        assert answer or not wanted
