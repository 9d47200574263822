# SPDX-License-Identifier: Apache-2.0

"""Yes/no questions about scenes of the shapes world, with the answers of the pixel judge."""

from __future__ import annotations

import random
from typing import Any

from alphagrpo_ext.shapes.judge import answer_questions
from alphagrpo_ext.shapes.prompts import (
    CATEGORIES,
    PromptSpec,
    sample_scene,
    sample_violation,
    semantic_questions,
    specs_of,
)
from alphagrpo_ext.shapes.scene import Scene, render


def sample_question(spec: PromptSpec, wanted: bool, rng: random.Random) -> tuple[Scene, str, bool]:
    """
    Draw a scene, and a question of a prompt about it.

    Args:
        spec (`PromptSpec`): The prompt. Its scene is right if the answer shall be yes, and wrong otherwise.
        wanted (`bool`): Whether the answer shall be yes.
        rng (`random.Random`): Source of randomness.

    Returns:
        `tuple[Scene, str, bool]`: The scene, the question, and whether the answer is yes. The answer differs from `wanted` where no
        question about the scene has that answer.
    """
    scene = sample_scene(spec, rng)
    if not wanted:
        scene = sample_violation(scene, spec, rng)
    questions = [row["question"] for row in semantic_questions(spec)]
    answers = [answer >= 0.5 for answer in answer_questions(render(scene), questions)]
    index = rng.choice([i for i, answer in enumerate(answers) if answer == wanted] or range(len(questions)))
    return scene, questions[index], answers[index]


def question_rows(split: str, num_questions: int, seed: int) -> list[dict[str, Any]]:
    """
    Rows of a dataset for the task `visual_question_answering`, round robin over the categories of prompts. Yes and no are right
    equally often, in every category.

    Args:
        split (`str`): Split of the prompts, as in [`prompt_rows`].
        num_questions (`int`): Number of rows.
        seed (`int`): Seed of scenes and questions.

    Returns:
        `list[dict]`: Rows with the columns `task`, `prompt` (the question), `image`, `solution` (`"yes"` or `"no"`) and
        `category` (of the prompt whose scene is shown).
    """
    rng = random.Random(f"questions {split} {seed}")
    rows = []
    for index in range(num_questions):
        category = CATEGORIES[index % len(CATEGORIES)]
        specs = specs_of(category, split) + (specs_of(category, "rare") if split == "train" else ())
        wanted = index // len(CATEGORIES) % 2 == 0
        answer = not wanted
        while answer != wanted:
            scene, question, answer = sample_question(rng.choice(specs), wanted, rng)
        rows.append(
            {
                "task": "visual_question_answering",
                "prompt": question,
                "image": render(scene),
                "solution": "yes" if answer else "no",
                "category": category,
            }
        )
    return rows
