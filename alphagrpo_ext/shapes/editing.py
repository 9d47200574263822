# SPDX-License-Identifier: Apache-2.0

"""
Editing in the shapes world: a scene, an instruction to change it, and questions that check the result.

Pretraining teaches four phrasings of every edit. Two paraphrases of each, and the form in which a reflection names an error,
are never taught, and neither is a quarter of what each edit can set, such as the new color of a shape.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from .prompts import COUNT_WORDS, RELATIONS, holds, quality_questions
from .scene import CELLS, COLORS, COLUMNS, ROWS, SHAPES, Scene, SceneObject, random_object, render


EDITS = ("color", "move", "add", "remove")
HELD_OUT_FRACTION = 0.25

# `name` is a color and a shape; `value` is the new color of "color", and otherwise a place. All words occur in other texts of
# the shapes world.
_INSTRUCTIONS = {
    "taught": {
        "color": (
            "repaint the {name} {value} .",
            "draw the {name} {value} .",
            "the {name} is wrong , it must be {value} .",
            "draw a {value} {shape} and no {name} .",
        ),
        "move": (
            "repaint the {name} {value} .",
            "draw the {name} in the {value} .",
            "the {name} is wrong , it must be {value} .",
            "the {name} must be in the {value} .",
        ),
        "add": (
            "draw a {name} {value} .",
            "there must be a {name} {value} .",
            "repaint the image with a {name} {value} .",
            "a {name} is missing in the {value} .",
        ),
        "remove": (
            "draw no {name} .",
            "there must be no {name} .",
            "repaint the image with no {name} .",
            "the {name} is extra .",
        ),
    },
    "paraphrase": {
        "color": ("repaint the {name} , it must be {value} .", "there must be a {value} {shape} and no {name} ."),
        "move": ("repaint the {name} , it must be {value} .", "draw the {name} , it must be in the {value} ."),
        "add": ("the image must be with a {name} {value} .", "what is missing is a {name} {value} ."),
        "remove": ("the image must be free of the {name} .", "what is extra is the {name} ."),
    },
    "reflection": {
        "color": ("the {name} must be {value} . repaint it .",),
        "move": ("the {name} must be {value} . repaint it .",),
        "add": ("missing {name} {value} . repaint it .",),
        "remove": ("extra {name} {value} . repaint it .",),
    },
}
PHRASINGS = tuple(_INSTRUCTIONS)


@dataclass(frozen=True)
class Edit:
    """
    A scene and its change.

    Args:
        kind (`str`): One of `EDITS`.
        before, after (`Scene`): The scene, and what it shall become.
        obj (`SceneObject`): The object that is recolored, moved, added or removed; as it is before, where it exists.
        value (`str`): The new color of the edit `"color"`, and otherwise a place, e.g. `"top left"`.
    """

    kind: str
    before: Scene
    after: Scene
    obj: SceneObject
    value: str

    @property
    def combination(self) -> str:
        """What the edit sets, e.g. `"circle green"` of a circle that becomes green. Held-out edits are told by it."""
        by_object = self.kind in ("add", "remove")
        return f"{self.obj.color} {self.obj.shape}" if by_object else f"{self.obj.shape} {self.value}"

    @property
    def held_out(self) -> bool:
        """Whether the combination is never taught."""
        return self.combination in _held_out_combinations(self.kind)

    def instructions(self, phrasing: str) -> list[str]:
        """The instructions of a phrasing, which is one of `PHRASINGS`."""
        words = {"name": f"{self.obj.color} {self.obj.shape}", "shape": self.obj.shape, "value": self.value}
        return [template.format(**words) for template in _INSTRUCTIONS[phrasing][self.kind]]


def editing_rows(num_prompts: int, seed: int, phrasing: str = "paraphrase") -> list[dict[str, Any]]:
    """
    Rows of an editing dataset, round robin over `EDITS`.

    Args:
        num_prompts (`int`): Number of rows.
        seed (`int`): Seed of scenes and edits.
        phrasing (`str`, *optional*, defaults to `"paraphrase"`): One of `PHRASINGS`. Only `"taught"` occurs in pretraining.

    Returns:
        `list[dict]`: Rows with the columns `task`, `prompt` (the instruction), `image`, `category` (the edit), `combination`
        (what it sets), `held_out` (whether pretraining has no edit of this combination), `semantic_questions` and
        `quality_questions`.
    """
    if phrasing not in PHRASINGS:
        raise ValueError(f"`phrasing` must be one of {PHRASINGS}, got {phrasing!r}.")
    rng = random.Random(f"editing {seed}")
    return [_row(EDITS[index % len(EDITS)], phrasing, rng) for index in range(num_prompts)]


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


def sample_edit(kind: str, rng: random.Random) -> Edit:
    """Draw a scene of one or two objects of different shapes and an edit of a kind in `EDITS`, held out or not."""
    shapes = rng.sample(SHAPES, 1 if kind == "add" else 2)
    cells = rng.sample(CELLS, len(shapes))
    objects = [random_object(cell, rng, shape) for cell, shape in zip(cells, shapes, strict=True)]
    before = Scene(tuple(objects), rng.choice(("white", "black", "gray")))
    chosen, others = objects[0], objects[1:]
    changed: SceneObject | None = None
    if kind == "color":
        changed = replace(chosen, color=rng.choice([color for color in COLORS if color != chosen.color]))
    elif kind == "move":
        row, col = rng.choice(before.free_cells)
        changed = replace(chosen, row=row, col=col)
    elif kind == "add":
        shape = rng.choice([shape for shape in SHAPES if shape != chosen.shape])
        chosen = changed = random_object(rng.choice(before.free_cells), rng, shape)
        others = objects
    after = replace(before, objects=tuple(filter(None, (*others, changed))))
    value = changed.color if kind == "color" else _place(changed or chosen)
    return Edit(kind, before, after, chosen, value)


def sample_taught_edit(rng: random.Random) -> tuple[Edit, str]:
    """Draw an edit that is not held out, and one of its taught instructions."""
    kind = rng.choice(EDITS)
    while (edit := sample_edit(kind, rng)).held_out:
        pass
    return edit, rng.choice(edit.instructions("taught"))


def _row(kind: str, phrasing: str, rng: random.Random) -> dict[str, Any]:
    edit = sample_edit(kind, rng)
    # The questions must be able to tell the edited scene from the original one.
    while all(question in scene_questions(edit.before) for question in scene_questions(edit.after)):
        edit = sample_edit(kind, rng)
    return {
        "task": "image_editing",
        "prompt": rng.choice(edit.instructions(phrasing)),
        "image": render(edit.before),
        "category": kind,
        "combination": edit.combination,
        "held_out": edit.held_out,
        "semantic_questions": scene_questions(edit.after),
        "quality_questions": quality_questions(),
    }


def _place(obj: SceneObject) -> str:
    return f"{ROWS[obj.row]} {COLUMNS[obj.col]}"


@cache
def _held_out_combinations(kind: str) -> frozenset[str]:
    values = {"color": COLORS, "move": [f"{row} {col}" for row in ROWS for col in COLUMNS]}
    if kind in values:
        combinations = [f"{shape} {value}" for shape in SHAPES for value in values[kind]]
    else:
        combinations = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    # Ranks of hashes: a fixed share of every edit, and the same one in every process.
    ranked = sorted(combinations, key=lambda key: hashlib.sha256(f"{kind} {key}".encode()).hexdigest())
    return frozenset(ranked[: round(HELD_OUT_FRACTION * len(ranked))])
