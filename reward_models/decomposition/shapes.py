# SPDX-License-Identifier: Apache-2.0

"""A decomposer that inverts the grammar of the shapes world, without a language model."""

from __future__ import annotations

from functools import cache

from alphagrpo_ext.shapes.prompts import (
    CATEGORIES,
    SPLITS,
    PromptSpec,
    prompts_of,
    quality_questions,
    semantic_questions,
    specs_of,
)
from alphagrpo_ext.shapes.text import vocabulary
from reward_models.decomposition.base import DECOMPOSERS, Decomposer, DecompositionError
from reward_models.prompts.questions import PromptRecord, from_row


@DECOMPOSERS.register("shapes")
class ShapesDecomposer(Decomposer):
    """Returns the shapes world's own questions for a prompt in its grammar."""

    async def decompose(self, prompt: str) -> PromptRecord:
        spec = _specs_by_prompt().get(prompt)
        if spec is None:
            raise DecompositionError("not a prompt of the shapes world", _why_outside_grammar(prompt))
        questions = {"semantic_questions": semantic_questions(spec), "quality_questions": quality_questions()}
        return from_row({"prompt": prompt, **questions})


@cache
def _specs_by_prompt() -> dict[str, PromptSpec]:
    # No two specs share a phrasing, so the table of all phrasings inverts the grammar.
    return {
        prompt: spec
        for category in CATEGORIES
        for split in SPLITS
        for spec in specs_of(category, split)
        for prompt in prompts_of(spec)
    }


def _why_outside_grammar(prompt: str) -> str:
    known_words = set(vocabulary())
    unknown = [word for word in prompt.split() if word not in known_words]
    if unknown:
        return f"its grammar does not have the word {unknown[0]!r}"
    example = next(iter(_specs_by_prompt()))
    return f"its grammar has these words, but not in this order; a valid prompt is, for example, {example!r}"
