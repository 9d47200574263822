# SPDX-License-Identifier: Apache-2.0

"""The opposite of a decomposition: one question about the whole prompt, to compare DVReward with."""

from __future__ import annotations

from reward_models.decomposition.base import (
    DECOMPOSERS,
    PROMPT_PLACE,
    Decomposer,
    DecomposerArguments,
    DecompositionError,
)
from reward_models.prompts.questions import PromptRecord, from_row


@DECOMPOSERS.register("holistic")
class HolisticDecomposer(Decomposer):
    """
    Makes one semantic question of a prompt and none about quality, so that the reward is P(yes) of this question.

    Args:
        template (`str`): The question, with `{prompt}` where the prompt stands.
    """

    def __init__(self, template: str) -> None:
        self.template = template

    @classmethod
    def from_arguments(cls, args: DecomposerArguments) -> HolisticDecomposer:
        return cls(args.holistic_template)

    def settings(self) -> dict[str, str | None]:
        return {"holistic_template": self.template}

    async def decompose(self, prompt: str) -> PromptRecord:
        if not prompt.strip():
            raise DecompositionError("empty prompt", "there is nothing to ask about")
        question = {"question": self.template.replace(PROMPT_PLACE, prompt), "tag": "Holistic"}
        return from_row({"prompt": prompt, "semantic_questions": [question], "quality_questions": []})
