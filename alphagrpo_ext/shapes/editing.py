# SPDX-License-Identifier: Apache-2.0

"""Editing in the shapes world: a scene, an instruction to change it, and questions that check the result."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

from .prompts import COUNT_WORDS, RELATIONS, holds, quality_questions
from .scene import COLORS, COLUMNS, ROWS, SHAPES, Scene, SceneObject, random_object, render


EDITS = ("color", "move", "add", "remove")


def editing_rows(num_prompts: int, seed: int) -> list[dict[str, Any]]:
    """
    Rows of an editing dataset, round robin over `EDITS`. No training teaches these instructions.

    Args:
        num_prompts (`int`): Number of rows.
        seed (`int`): Seed of scenes and edits.

    Returns:
        `list[dict]`: Rows with the columns `task`, `prompt` (the instruction), `image`, `category` (the edit),
        `semantic_questions` and `quality_questions`.
    """
    rng = random.Random(f"editing {seed}")
    return [_row(EDITS[index % len(EDITS)], rng) for index in range(num_prompts)]


def scene_questions(scene: Scene) -> list[dict[str, str]]:
    """Questions that identify a scene of at most two objects of different shapes, except for their exact cells."""
    # Sorted by shape, so that the questions do not depend on the order of the objects in the scene.
    objects = sorted(scene.objects, key=lambda obj: obj.shape)
    questions = [{"question": f"is there a {obj.color} {obj.shape} ?", "tag": "Existence"} for obj in objects]
    for first, second in itertools.pairwise(objects):
        questions += [
            {"question": f"is the {first.shape} {relation} the {second.shape} ?", "tag": "Spatial"}
            for relation in RELATIONS
            if holds(relation, first.cell, second.cell)
        ]
    number = len(scene.objects)
    count = "is there exactly one object" if number == 1 else f"are there exactly {COUNT_WORDS[number]} objects"
    questions.append({"question": f"{count} in the image ?", "tag": "Count"})
    questions.append({"question": f"is the background {scene.background} ?", "tag": "Environment"})
    return questions


def _row(edit: str, rng: random.Random) -> dict[str, Any]:
    while True:
        before, instruction, after = _sample_edit(edit, rng)
        # The questions must be able to tell the edited scene from the original one.
        if not all(question in scene_questions(before) for question in scene_questions(after)):
            break
    return {
        "task": "image_editing",
        "prompt": f"{instruction} . repaint it .",
        "image": render(before),
        "category": edit,
        "semantic_questions": scene_questions(after),
        "quality_questions": quality_questions(),
    }


def _sample_edit(edit: str, rng: random.Random) -> tuple[Scene, str, Scene]:
    shapes = rng.sample(SHAPES, 1 if edit == "add" else 2)
    cells = rng.sample([(row, col) for row in range(len(ROWS)) for col in range(len(COLUMNS))], len(shapes))
    objects = [random_object(cell, rng, shape) for cell, shape in zip(cells, shapes, strict=True)]
    before = Scene(tuple(objects), rng.choice(("white", "black", "gray")))
    chosen, others = objects[0], objects[1:]
    if edit == "color":
        color = rng.choice([color for color in COLORS if color != chosen.color])
        changed = replace(chosen, color=color)
        instruction = f"the {chosen.color} {chosen.shape} must be {color}"
    elif edit == "move":
        row, col = rng.choice(before.free_cells)
        changed = replace(chosen, row=row, col=col)
        instruction = f"the {chosen.color} {chosen.shape} must be {ROWS[row]} {COLUMNS[col]}"
    elif edit == "add":
        shape = rng.choice([shape for shape in SHAPES if shape != chosen.shape])
        changed, others = random_object(rng.choice(before.free_cells), rng, shape), objects
        instruction = f"missing {_place(changed)}"
    else:
        changed = None
        instruction = f"extra {_place(chosen)}"
    return before, instruction, replace(before, objects=tuple(filter(None, (*others, changed))))


def _place(obj: SceneObject) -> str:
    return f"{obj.color} {obj.shape} {ROWS[obj.row]} {COLUMNS[obj.col]}"
