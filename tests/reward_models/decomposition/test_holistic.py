# SPDX-License-Identifier: Apache-2.0

import asyncio

import pytest

from reward_models.decomposition.base import DECOMPOSERS, DecomposerArguments, DecompositionError


def test_asks_one_question_about_the_whole_prompt() -> None:
    args = DecomposerArguments(decomposer="holistic", holistic_template="is there {prompt} ?")
    decomposer = DECOMPOSERS.get("holistic").from_arguments(args)
    record = asyncio.run(decomposer.decompose("a {red} circle"))
    assert record.prompt == "a {red} circle"
    assert record.quality_questions == ()
    assert [(q.question, q.tag, q.is_valid) for q in record.semantic_questions] == [
        ("is there a {red} circle ?", "Holistic", True)
    ]


def test_the_default_question_is_for_any_prompt() -> None:
    decomposer = DECOMPOSERS.get("holistic").from_arguments(DecomposerArguments())
    (question,) = asyncio.run(decomposer.decompose("two cats")).valid_semantic_questions
    assert question.question.startswith("Does the image show exactly") and question.question.endswith(" two cats")


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ValueError, match="holistic_template must contain {prompt}, but is 'is it good"):
        DecomposerArguments(holistic_template="is it good ?")
    decomposer = DECOMPOSERS.get("holistic").from_arguments(DecomposerArguments())
    with pytest.raises(DecompositionError, match="empty prompt"):
        asyncio.run(decomposer.decompose(" "))
