# Copyright 2026 The AlphaGRPO-Ext Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from collections import Counter

import pytest

from alphagrpo_ext.shapes import answer_questions, strict_pass, vocabulary
from alphagrpo_ext.shapes.editing import EDITS, editing_rows
from reward_models.questions import from_row


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
