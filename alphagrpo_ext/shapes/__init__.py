# SPDX-License-Identifier: Apache-2.0

"""
The shapes world: a complete text-to-image benchmark that fits into a unit test.

An image has 24x24 pixels in a 3x3 grid of cells; up to four shapes in four colors lie in cells of their own, on a
uniform background (`scene`). Prompts of seven categories, GenEval's in miniature, come with their yes/no questions and
are split by attribute combination, not by string (`prompts`). A thought plans a scene, a reflection names what is
wrong with one and plans its repair (`text`). A judge reads the answers off the pixels as soft probabilities (`judge`).
"""

from .judge import SceneBelief, analyze, answer, answer_questions, strict_pass
from .prompts import (
    CATEGORIES,
    SPLITS,
    ObjectRequest,
    PromptSpec,
    build_dataset,
    prompt_rows,
    prompts_of,
    quality_questions,
    sample_pretraining_spec,
    sample_prompt,
    sample_scene,
    sample_spec,
    sample_violation,
    satisfies,
    semantic_questions,
    specs_of,
    split_of,
)
from .scene import IMAGE_SIZE, Scene, SceneObject, corrupt_scene, render, render_array
from .text import (
    GENERATION_SYSTEM_PROMPT,
    UNDERSTANDING_SYSTEM_PROMPT,
    parse_thought,
    reflection,
    reflection_request,
    repair,
    thought,
    vocabulary,
)


__all__ = [
    "CATEGORIES",
    "GENERATION_SYSTEM_PROMPT",
    "IMAGE_SIZE",
    "SPLITS",
    "UNDERSTANDING_SYSTEM_PROMPT",
    "ObjectRequest",
    "PromptSpec",
    "Scene",
    "SceneBelief",
    "SceneObject",
    "analyze",
    "answer",
    "answer_questions",
    "build_dataset",
    "corrupt_scene",
    "parse_thought",
    "prompt_rows",
    "prompts_of",
    "quality_questions",
    "reflection",
    "reflection_request",
    "render",
    "render_array",
    "repair",
    "sample_pretraining_spec",
    "sample_prompt",
    "sample_scene",
    "sample_spec",
    "sample_violation",
    "satisfies",
    "semantic_questions",
    "specs_of",
    "split_of",
    "strict_pass",
    "thought",
    "vocabulary",
]
