# SPDX-License-Identifier: Apache-2.0

"""Prompts of the shapes world, their yes/no questions, and the splits of their attribute combinations."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from .scene import BACKGROUNDS, CELLS, COLORS, SHAPES, Scene, SceneObject, corrupt_scene, random_object


if TYPE_CHECKING:
    from datasets import Dataset


CATEGORIES = (
    "single_object",
    "two_objects",
    "counting",
    "colors",
    "position",
    "color_attribution",
    "negative",
)
RELATIONS = ("left of", "right of", "above", "below")
COUNT_WORDS = {1: "one", 2: "two", 3: "three", 4: "four"}
SPLITS = ("train", "rare", "evaluation")

RARE_FRACTION = 0.1
EVALUATION_FRACTION = 0.25

_FRAMES = (
    "{content} on a {background} background",
    "{content} , on {background}",
    "a {background} background with {content}",
    "draw {content} on a {background} background",
)
_CONVERSE = {"right of": "left of", "below": "above"}


@dataclass(frozen=True)
class ObjectRequest:
    """
    Objects that a prompt asks for.

    Args:
        shape (`str`): One of `SHAPES`.
        color (`str`, *optional*): One of `COLORS`. `None` allows any color.
        count (`int`, *optional*, defaults to `1`): How many of them, 1 to 4.
    """

    shape: str
    color: str | None = None
    count: int = 1

    @property
    def phrase(self) -> str:
        """The request as a noun phrase, e.g. `"a circle"` or `"three red circles"`."""
        article = "a" if self.count == 1 else COUNT_WORDS[self.count]
        return f"{article} {noun(self.shape, self.color, self.count)}"

    def matches(self, obj: SceneObject) -> bool:
        """Whether the object is of this shape and, if one is asked for, of this color."""
        return obj.shape == self.shape and self.color in (None, obj.color)


@dataclass(frozen=True)
class PromptSpec:
    """
    The meaning of a prompt. A scene is right if it holds the requested objects and no others.

    Args:
        category (`str`): One of `CATEGORIES`.
        objects (`tuple[ObjectRequest, ...]`): The requested objects, in the order in which the prompt names them.
        background (`str`): One of `BACKGROUNDS`.
        relation (`str`, *optional*): One of `RELATIONS`: where the first object is, seen from the second.
        excluded (`str`, *optional*): Shape that the image must not hold.
    """

    category: str
    objects: tuple[ObjectRequest, ...]
    background: str
    relation: str | None = None
    excluded: str | None = None

    @property
    def combination(self) -> str:
        """Canonical key of the attribute combination; equal for prompts that mean the same."""
        parts = [f"{request.count} {request.color or 'any'} {request.shape}" for request in self.objects]
        if self.relation is None:
            parts.sort()
        elif self.relation in _CONVERSE:
            parts = [_CONVERSE[self.relation], *reversed(parts)]
        else:
            parts = [self.relation, *parts]
        if self.excluded is not None:
            parts.append(f"no {self.excluded}")
        return " | ".join([self.category, *parts, self.background])

    @property
    def requested(self) -> list[ObjectRequest]:
        """The requests, each repeated `count` times: one per object of a right scene."""
        return [request for request in self.objects for _ in range(request.count)]


def noun(shape: str, color: str | None = None, count: int = 1) -> str:
    """`"circle"`, `"red circle"` or `"red circles"`."""
    if count != 1:
        shape += "es" if shape.endswith("s") else "s"
    return shape if color is None else f"{color} {shape}"


def holds(relation: str, cell: tuple[int, int], reference: tuple[int, int]) -> bool:
    """Whether `cell` (row, column) lies strictly in `relation` to the cell `reference`."""
    if relation not in RELATIONS:
        raise ValueError(f"`relation` must be one of {RELATIONS}, got {relation!r}.")
    axis = 1 if relation in ("left of", "right of") else 0
    if relation in _CONVERSE:
        cell, reference = reference, cell
    return cell[axis] < reference[axis]


def prompts_of(spec: PromptSpec) -> list[str]:
    """All phrasings of a prompt: lower case, words and punctuation separated by blanks."""
    phrases = [request.phrase for request in spec.objects]
    if spec.relation is not None:
        content = f"{phrases[0]} {spec.relation} {phrases[1]}"
    elif spec.excluded is not None:
        content = f"{phrases[0]} but no {spec.excluded}"
    else:
        content = " and ".join(phrases)
    return [frame.format(content=content, background=spec.background) for frame in _FRAMES]


def sample_prompt(spec: PromptSpec, rng: random.Random) -> str:
    """One phrasing, drawn at random."""
    return rng.choice(prompts_of(spec))


def semantic_questions(spec: PromptSpec) -> list[dict[str, str]]:
    """The yes/no questions that decide whether an image is what the prompt asks for. Yes is always the good answer."""
    questions = []
    for request in spec.objects:
        named = request.color if spec.category in ("counting", "negative") else None
        questions.append(_question(f"is there a {noun(request.shape, named)} ?", "Existence"))
        if request.count > 1:
            name = noun(request.shape, request.color, request.count)
            questions.append(_question(f"are there exactly {COUNT_WORDS[request.count]} {name} ?", "Count"))
        elif request.color is not None and named is None:
            questions.append(_question(f"is the {request.shape} {request.color} ?", "Attribute"))
    if spec.relation is not None:
        first, second = spec.objects
        questions.append(_question(f"is the {first.shape} {spec.relation} the {second.shape} ?", "Spatial"))
    if spec.excluded is not None:
        questions.append(_question(f"is the image free of {noun(spec.excluded, count=2)} ?", "Negative"))
    total = len(spec.requested)
    if total == 1:
        questions.append(_question("is there exactly one object in the image ?", "Count"))
    else:
        questions.append(_question(f"are there exactly {COUNT_WORDS[total]} objects in the image ?", "Count"))
    questions.append(_question(f"is the background {spec.background} ?", "Environment"))
    return questions


def quality_questions() -> list[dict[str, str]]:
    """The yes/no questions about how well an image is drawn, which are the same for every prompt."""
    return [
        _question("is every shape complete and sharp ?", "Geometry"),
        _question("are all colors solid ?", "Texture"),
        _question("is the background clean and uniform ?", "Coherence"),
    ]


def _question(question: str, tag: str) -> dict[str, str]:
    return {"question": question, "tag": tag}


def sample_scene(spec: PromptSpec, rng: random.Random) -> Scene:
    """Draw a right scene with random cells and random colors where none are requested."""
    if spec.relation is None:
        cells = rng.sample(CELLS, len(spec.requested))
    else:
        cells = rng.choice([pair for pair in itertools.permutations(CELLS, 2) if holds(spec.relation, *pair)])
    objects = (
        random_object(cell, rng, request.shape, request.color)
        for cell, request in zip(cells, spec.requested, strict=True)
    )
    return Scene(tuple(objects), spec.background)


def satisfies(scene: Scene, spec: PromptSpec) -> bool:
    """Whether the scene is right: the requested objects in the requested relation, no others, on the background."""
    if scene.background != spec.background or len(scene.objects) != len(spec.requested):
        return False
    # No two requests of one prompt can match the same object, so counting suffices.
    matched = [[obj for obj in scene.objects if request.matches(obj)] for request in spec.objects]
    if any(len(objects) != request.count for objects, request in zip(matched, spec.objects, strict=True)):
        return False
    return spec.relation is None or holds(spec.relation, matched[0][0].cell, matched[1][0].cell)


def sample_violation(scene: Scene, spec: PromptSpec, rng: random.Random) -> Scene:
    """Corrupt a right `scene` so that it does not satisfy `spec`, e.g. to get a flawed image that is refined."""
    while satisfies(corrupted := corrupt_scene(scene, rng), spec):
        pass
    return corrupted


def _enumerate(category: str) -> Iterator[PromptSpec]:
    colored = [ObjectRequest(shape, color) for shape in SHAPES for color in COLORS]
    plain = [ObjectRequest(shape) for shape in SHAPES]
    for background in BACKGROUNDS:
        if category == "single_object":
            for request in plain:
                yield PromptSpec(category, (request,), background)
        elif category == "two_objects":
            for pair in itertools.permutations(plain, 2):
                yield PromptSpec(category, pair, background)
        elif category == "counting":
            for request, count in itertools.product(colored, (2, 3, 4)):
                yield PromptSpec(category, (ObjectRequest(request.shape, request.color, count),), background)
        elif category == "colors":
            for request in colored:
                yield PromptSpec(category, (request,), background)
        elif category == "position":
            for pair, relation in itertools.product(itertools.permutations(plain, 2), RELATIONS):
                yield PromptSpec(category, pair, background, relation=relation)
        elif category == "color_attribution":
            for first, second in itertools.permutations(colored, 2):
                if first.shape != second.shape and first.color != second.color:
                    yield PromptSpec(category, (first, second), background)
        elif category == "negative":
            for request, excluded in itertools.product(colored, SHAPES):
                if request.shape != excluded:
                    yield PromptSpec(category, (request,), background, excluded=excluded)


@cache
def _combination_splits() -> dict[str, str]:
    # Ranks of hashes instead of thresholds: every category has its share of every split, however few combinations.
    splits = {}
    for category in CATEGORIES:
        combinations = {spec.combination for spec in _enumerate(category)}
        ranked = sorted(combinations, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
        num_evaluation = max(2, round(EVALUATION_FRACTION * len(ranked)))
        num_rare = max(1, round(RARE_FRACTION * len(ranked)))
        for rank, combination in enumerate(ranked):
            if rank < num_evaluation:
                splits[combination] = "evaluation"
            else:
                splits[combination] = "rare" if rank < num_evaluation + num_rare else "train"
    return splits


@cache
def specs_of(category: str, split: str) -> tuple[PromptSpec, ...]:
    """
    All prompt meanings of a category whose combination lies in a split.

    Args:
        category (`str`): One of `CATEGORIES`.
        split (`str`): One of `SPLITS`.

    Returns:
        `tuple[PromptSpec, ...]`: The specs, in a fixed order.
    """
    if category not in CATEGORIES:
        raise ValueError(f"`category` must be one of {CATEGORIES}, got {category!r}.")
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {SPLITS}, got {split!r}.")
    return tuple(spec for spec in _enumerate(category) if split_of(spec) == split)


def split_of(spec: PromptSpec) -> str:
    """The split of the spec's combination: `"train"`, `"rare"` (10%) or `"evaluation"` (25%)."""
    return _combination_splits()[spec.combination]


def sample_spec(rng: random.Random, split: str) -> PromptSpec:
    """Draw a spec of exactly this split (`"train"` is without `"rare"`), with equal probability of every category."""
    return rng.choice(specs_of(rng.choice(CATEGORIES), split))


def prompt_rows(split: str, num_prompts: int, seed: int) -> list[dict]:
    """
    Rows of a prompt dataset, round robin over the categories.

    Args:
        split (`str`):
            `"train"` (the prompts of reinforcement learning: train and rare combinations alike), `"rare"` (the rare
            ones alone), or `"evaluation"` (combinations in neither pretraining nor reinforcement learning).
        num_prompts (`int`): Number of rows. A category whose prompts are exhausted starts again.
        seed (`int`): Seed of the order.

    Returns:
        `list[dict]`: Rows with the columns `prompt`, `category`, `combination`, `semantic_questions` and
        `quality_questions`; a question is `{"question": str, "tag": str}`.
    """
    if num_prompts < 0:
        raise ValueError(f"`num_prompts` must not be negative, got {num_prompts}.")
    streams = []
    for category in CATEGORIES:
        specs = specs_of(category, split)
        if split == "train":
            specs += specs_of(category, "rare")
        pairs = [(spec, prompt) for spec in specs for prompt in prompts_of(spec)]
        random.Random(f"{category} {seed}").shuffle(pairs)
        streams.append(itertools.cycle(pairs))
    return [
        {
            "prompt": prompt,
            "category": spec.category,
            "combination": spec.combination,
            "semantic_questions": semantic_questions(spec),
            "quality_questions": quality_questions(),
        }
        for spec, prompt in (next(streams[index % len(streams)]) for index in range(num_prompts))
    ]


def build_dataset(split: str, num_prompts: int, seed: int) -> Dataset:
    """`prompt_rows` as a `datasets.Dataset`."""
    from datasets import Dataset

    return Dataset.from_list(prompt_rows(split, num_prompts, seed))
