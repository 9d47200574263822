# SPDX-License-Identifier: Apache-2.0

import random
from collections import Counter

import pytest

from alphagrpo_ext.shapes.editing import EDITS, PHRASINGS, editing_rows, sample_taught_edit
from alphagrpo_ext.shapes.judge import answer_questions, strict_pass
from alphagrpo_ext.shapes.text import vocabulary
from reward_models.prompts.questions import from_row


ROWS = editing_rows(200, seed=0)


@pytest.mark.parametrize("phrasing", PHRASINGS)
def test_rows_are_valid_and_say_nothing_unknown(phrasing: str) -> None:
    known, rows = set(vocabulary()), editing_rows(200, 0, phrasing)
    for row in rows:
        assert from_row(row).valid_semantic_questions
        assert set(row["prompt"].split()) <= known
    assert Counter(row["category"] for row in rows) == dict.fromkeys(EDITS, 50)
    assert 0.15 < sum(row["held_out"] for row in rows) / len(rows) < 0.35


def test_taught_edits_share_no_instruction_and_no_combination_with_held_out_ones() -> None:
    rng = random.Random(0)
    taught = [sample_taught_edit(rng) for _ in range(2000)]
    held_out = {(row["category"], row["combination"]) for row in editing_rows(2000, 0) if row["held_out"]}
    # A quarter of 16 colors of shapes, of 36 places of shapes, and twice of 16 colored shapes.
    assert Counter(kind for kind, _ in held_out) == {"color": 4, "move": 9, "add": 4, "remove": 4}
    assert not held_out & {(edit.kind, edit.combination) for edit, _ in taught}
    others = {row["prompt"] for phrasing in PHRASINGS[1:] for row in editing_rows(2000, 0, phrasing)}
    assert not others & {instruction for _, instruction in taught}
    assert all(instruction in edit.instructions("taught") for edit, instruction in taught)


def test_unknown_phrasing_is_named() -> None:
    with pytest.raises(ValueError, match="`phrasing` must be one of .*, got 'spoken'"):
        editing_rows(1, 0, "spoken")


@pytest.mark.parametrize("edit", EDITS)
def test_the_image_as_it_is_does_not_pass(edit: str) -> None:
    for row in ROWS:
        if row["category"] == edit:
            questions = [question["question"] for question in row["semantic_questions"]]
            assert not strict_pass(answer_questions(row["image"], questions)), row["prompt"]


def test_rows_repeat_by_seed() -> None:
    assert [row["prompt"] for row in editing_rows(8, 0)] == [row["prompt"] for row in editing_rows(8, 0)]
    assert [row["prompt"] for row in editing_rows(8, 0)] != [row["prompt"] for row in editing_rows(8, 1)]
