# SPDX-License-Identifier: Apache-2.0

import asyncio

import pytest

from alphagrpo_ext.shapes.prompts import CATEGORIES, prompt_rows
from reward_models.decomposition.base import DECOMPOSERS, DecomposerArguments, DecompositionError, failure_reason
from reward_models.decomposition.shapes import ShapesDecomposer
from reward_models.prompts.questions import from_row


def test_the_shapes_decomposer_inverts_the_grammar() -> None:
    rows = [row for split in ("train", "rare", "evaluation") for row in prompt_rows(split, 700, seed=3)]
    assert {row["category"] for row in rows} == set(CATEGORIES)
    decomposer = ShapesDecomposer()
    for row in rows:
        assert asyncio.run(decomposer.decompose(row["prompt"])) == from_row(row)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            "a red cat on a white background",
            "not a prompt of the shapes world: its grammar does not have the word 'cat'",
        ),
        ("circle a", "these words, but not in this order; a valid prompt is, for example, 'a "),
        ("", "not in this order"),
    ],
)
def test_a_prompt_outside_the_grammar_is_a_failure(prompt: str, message: str) -> None:
    with pytest.raises(DecompositionError, match=message) as error:
        asyncio.run(ShapesDecomposer().decompose(prompt))
    assert failure_reason(error.value) == "not a prompt of the shapes world"


def test_decomposers_have_names() -> None:
    assert DECOMPOSERS.names() == ["holistic", "openai", "shapes"]
    assert isinstance(DECOMPOSERS.get("shapes").from_arguments(DecomposerArguments()), ShapesDecomposer)
