# SPDX-License-Identifier: Apache-2.0

from typing import Any

import pytest
from datasets import Dataset

from reward_models.answering.exact import ExactAnswer, given_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("yes", "yes"),
        (" Yes . \n", "yes"),
        ("<think> a red circle </think> no", "no"),
        ("the thought was opened by the template </think>\n\nTwo  red\tcircles!", "two red circles"),
        ("<think> one </think> yes <think> another </think> no", "no"),
        ("1.5", "1.5"),
        ("<think> yes", None),
        ("<think> yes </think>", None),
        (" . ", None),
    ],
)
def test_given_answer(text: str, answer: str | None) -> None:
    assert given_answer(text) == answer


def test_rewards() -> None:
    reward = ExactAnswer()
    texts = [["<think> x </think> Yes."], ["no"], ["<think> 3"], [], ["first", "3"]]
    assert reward(completions=[""] * 5, texts=texts, solution=["yes", "yes", 3, "yes", 3]) == [1.0, 0.0, 0.0, 0.0, 1.0]
    # As TRL calls it without the project's trainer. A row without an answer is not scored.
    completions = [[{"role": "assistant", "content": "no"}], [{"role": "assistant", "content": "no"}]]
    assert reward(completions=completions, solution=["no", None]) == [1.0, None]


PAINTED = {"task": "reasoning_t2i", "prompt": "a circle", "solution": None}
ASKED = {"task": "visual_question_answering", "prompt": "is there a circle ?", "solution": "yes"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAINTED, ASKED], None),
        ([{"prompt": "is it ?", "solution": "yes"}], None),
        ([PAINTED], "no row has an answer"),
        ([{"prompt": "is it ?"}], "no row has an answer"),
        ([ASKED, ASKED | {"solution": None}], "row 1: 'solution' must be the answer to the question, but is None"),
        ([PAINTED, ASKED | {"solution": " ? "}], "row 1: 'solution' must be the answer"),
    ],
)
def test_datasets_are_checked(rows: list[dict[str, Any]], message: str | None) -> None:
    for dataset in (rows, Dataset.from_list(rows)):
        if message is None:
            ExactAnswer().validate_dataset(dataset)
        else:
            with pytest.raises(ValueError, match=message):
                ExactAnswer().validate_dataset(dataset)
