# SPDX-License-Identifier: Apache-2.0

"""Texts about scenes: plans before drawing, reflections on a flawed image, and the vocabulary of all texts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from .prompts import (
    CATEGORIES,
    SPLITS,
    PromptSpec,
    holds,
    prompts_of,
    quality_questions,
    semantic_questions,
    specs_of,
)
from .scene import BACKGROUNDS, CELLS, COLORS, COLUMNS, ROWS, SHAPES, Scene, SceneObject, random_object


GENERATION_SYSTEM_PROMPT = "plan first , then draw ."
UNDERSTANDING_SYSTEM_PROMPT = "look , then answer ."
REFLECTION_PROMPT = "the request was : {prompt} . what is wrong ? repaint it ."
KEEP_VERDICT = "<think> nothing wrong"
REPAINT_VERDICT = "<think> wrong"
_MAX_NAMED_DIFFERENCES = 2


def thought(scene: Scene) -> str:
    """The plan of a scene, e.g. `"<think> white : red circle top left , blue square bottom right </think>"`."""
    return f"<think> {_plan(scene)} </think>"


def parse_thought(text: str) -> Scene | None:
    """
    Read the plan of a thought or of a reflection. Text around the `<think>` block does not matter.

    Args:
        text (`str`): Text that holds one `<think> ... </think>` block.

    Returns:
        `Scene` or `None`: The planned scene with objects centered in their cells, or `None` where the text is not in
        the grammar or plans an impossible scene.
    """
    words = text.split()
    if words.count("<think>") != 1 or words.count("</think>") != 1:
        return None
    words = words[words.index("<think>") + 1 : words.index("</think>")]
    if "plan" in words:
        words = words[words.index("plan") + 2 :]
    if len(words) < 3 or words[0] not in BACKGROUNDS or words[1] != ":":
        return None
    if words[2:] == ["nothing"]:
        return Scene((), words[0])
    objects = [_parse_object(part.split()) for part in " ".join(words[2:]).split(" , ")]
    if None in objects:
        return None
    try:
        return Scene(tuple(objects), words[0])
    except ValueError:
        return None


def reflection_request(prompt: str) -> str:
    """The turn that asks for a refinement of the image that was drawn for `prompt`."""
    return REFLECTION_PROMPT.format(prompt=prompt)


def reflection(wrong: Scene, right: Scene) -> str:
    """
    Name what is wrong with an image, then plan the repaired one, in at most 45 words.

    Args:
        wrong (`Scene`): What the image shows.
        right (`Scene`): What it shall show.

    Returns:
        `str`: E.g. `"<think> wrong : red circle top left must be blue ; plan : white : blue circle top left
        </think>"`. It names two differences at most; offsets within cells do not count.
    """
    differences = _differences(wrong, right)[:_MAX_NAMED_DIFFERENCES]
    verdict = f"wrong : {' , '.join(differences)}" if differences else "nothing wrong"
    return f"<think> {verdict} ; plan : {_plan(right)} </think>"


def is_reflection(text: str) -> bool:
    """Whether a text is in the grammar of [`reflection`]: a verdict, then the plan of a possible scene, and nothing else."""
    words = text.split()
    if len(words) < 2 or (words[0], words[-1]) != ("<think>", "</think>") or parse_thought(text) is None:
        return False
    verdict, separator, _ = " ".join(words[1:-1]).partition(" ; plan : ")
    if not separator:
        return False
    if verdict == "nothing wrong":
        return True
    if not verdict.startswith("wrong : "):
        return False
    differences = verdict.removeprefix("wrong : ").split(" , ")
    return len(differences) <= _MAX_NAMED_DIFFERENCES and all(map(_is_difference, differences))


def repair(wrong: Scene, spec: PromptSpec, rng: random.Random) -> Scene:
    """
    The scene that satisfies `spec` and keeps as much of `wrong` as possible.

    Objects are kept, then recolored or reshaped, then moved, then added. Objects that remain are removed.

    Args:
        wrong (`Scene`): The scene to repair.
        spec (`PromptSpec`): The prompt that the repaired scene satisfies.
        rng (`random.Random`): Source of randomness for what neither `spec` nor `wrong` determines.

    Returns:
        `Scene`: The repaired scene; equal to `wrong` if that already satisfies `spec`.
    """
    requests = spec.requested
    kept: list[SceneObject | None] = [None] * len(requests)
    available = list(wrong.objects)
    for max_changes, (index, request) in itertools.product(range(3), enumerate(requests)):
        for obj in available if kept[index] is None else ():
            repainted = replace(obj, shape=request.shape, color=request.color or obj.color)
            if (repainted.shape != obj.shape) + (repainted.color != obj.color) <= max_changes:
                kept[index] = repainted
                available.remove(obj)
                break

    cells = _place([obj and obj.cell for obj in kept], spec.relation, rng)
    objects = tuple(
        replace(obj, row=cell[0], col=cell[1]) if obj else random_object(cell, rng, request.shape, request.color)
        for obj, cell, request in zip(kept, cells, requests, strict=True)
    )
    return Scene(objects, spec.background)


def vocabulary() -> list[str]:
    """The sorted list of all words that occur in texts of the shapes world."""
    return list(_vocabulary())


@cache
def _vocabulary() -> tuple[str, ...]:
    texts = [GENERATION_SYSTEM_PROMPT, UNDERSTANDING_SYSTEM_PROMPT, reflection_request(""), "yes no"]
    texts += ["<think> wrong : missing extra must be background nothing wrong ; plan : , </think>"]
    texts += [*BACKGROUNDS, *COLORS, *SHAPES, *ROWS, *COLUMNS]
    texts += [row["question"] for row in quality_questions()]
    for category, split in itertools.product(CATEGORIES, SPLITS):
        for spec in specs_of(category, split):
            texts += prompts_of(spec)
            texts += [row["question"] for row in semantic_questions(spec)]
    return tuple(sorted({word for text in texts for word in text.split()}))


def _plan(scene: Scene) -> str:
    return f"{scene.background} : {' , '.join(map(_name, scene.objects)) or 'nothing'}"


def _name(obj: SceneObject) -> str:
    return f"{obj.color} {obj.shape} {ROWS[obj.row]} {COLUMNS[obj.col]}"


def _parse_object(words: list[str]) -> SceneObject | None:
    if len(words) != 4:
        return None
    color, shape, row, column = words
    if color not in COLORS or shape not in SHAPES or row not in ROWS or column not in COLUMNS:
        return None
    return SceneObject(ROWS.index(row), COLUMNS.index(column), shape, color)


def _is_difference(text: str) -> bool:
    """Whether a text names an error and its repair as [`_differences`] does."""
    words = text.split()
    if words[:3] == ["background", "must", "be"]:
        return len(words) == 4 and words[3] in BACKGROUNDS
    if words[:1] in (["extra"], ["missing"]):
        return _parse_object(words[1:]) is not None
    if _parse_object(words[:4]) is None or words[4:6] != ["must", "be"]:
        return False
    target = words[6:]
    if len(target) == 1:
        return target[0] in COLORS or target[0] in SHAPES
    if len(target) != 2:
        return False
    return (target[0] in ROWS and target[1] in COLUMNS) or (target[0] in COLORS and target[1] in SHAPES)


def _differences(wrong: Scene, right: Scene) -> list[str]:
    centered = [{replace(obj, dy=1, dx=1) for obj in scene.objects} for scene in (wrong, right)]
    surplus, lacking = sorted(centered[0] - centered[1]), sorted(centered[1] - centered[0])
    repainted, moved = [], []
    # An object that only moved is described as moved, even if another one is now in its old cell.
    for obj in list(surplus):
        target = next((other for other in lacking if (other.shape, other.color) == (obj.shape, obj.color)), None)
        if target is not None:
            moved.append(f"{_name(obj)} must be {ROWS[target.row]} {COLUMNS[target.col]}")
            surplus.remove(obj)
            lacking.remove(target)
    for obj in list(surplus):
        target = next((other for other in lacking if other.cell == obj.cell), None)
        if target is not None:
            changes = [target.color] * (target.color != obj.color) + [target.shape] * (target.shape != obj.shape)
            repainted.append(f"{_name(obj)} must be {' '.join(changes)}")
            surplus.remove(obj)
            lacking.remove(target)
    background = [f"background must be {right.background}"] * (wrong.background != right.background)
    extra, missing = [f"extra {_name(obj)}" for obj in surplus], [f"missing {_name(obj)}" for obj in lacking]
    return [*background, *extra, *missing, *repainted, *moved]


def _place(cells: list[tuple[int, int] | None], relation: str | None, rng: random.Random) -> Sequence[tuple[int, int]]:
    """Give every object a cell: its own if it has one and the relation allows it, else a random free one."""
    if relation is None:
        free = [cell for cell in CELLS if cell not in cells]
        rng.shuffle(free)
        return [cell or free.pop() for cell in cells]
    pairs = [pair for pair in itertools.permutations(CELLS, 2) if holds(relation, *pair)]
    return min(pairs, key=lambda pair: (sum(a != b for a, b in zip(cells, pair, strict=True)), rng.random()))
