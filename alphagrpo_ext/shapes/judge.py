# SPDX-License-Identifier: Apache-2.0

"""
The pixel judge of the shapes world: reads an image back into beliefs about its scene and answers yes/no questions.

Analysis by synthesis. The cost of a pixel under a palette color is its squared distance, saturating at 1: a wrong
pixel. The cost of a hypothesis about a cell (empty, or a shape of a color at an offset) is the sum over its 64 pixels;
a softmax over all hypotheses and a constant-cost `junk` one gives the cell's posterior. Questions are answered exactly
under the product of these posteriors, hence softly: an imperfect image gets a probability between 0 and 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from alphagrpo_ext.images import to_rgb

from .prompts import COUNT_WORDS, RELATIONS, noun
from .scene import (
    BACKGROUNDS,
    CELL_SIZE,
    COLORS,
    GRID_SIZE,
    IMAGE_SIZE,
    MASKS,
    MAX_OBJECTS,
    NUM_OFFSETS,
    SHAPE_SIZE,
    SHAPES,
    Scene,
    SceneObject,
)


# Squared RGB distance (channels in [0, 1]) from which a pixel counts as wrong. Palette colors are > 0.56 apart.
_SATURATION = 0.25
# In wrong pixels per cell. Shapes differ in >= 8 at all offsets, so a drawn scene is read with certainty.
_CELL_TEMPERATURE = 1.4
_JUNK_COST = 12.0
# In wrong pixels as a fraction of the image. Objects cover at most a quarter of it.
_BACKGROUND_TEMPERATURE = 0.06
_UNKNOWN_BACKGROUND_COST = 0.6
# Cost at which a quality answer has fallen to 1/e.
_GEOMETRY_SCALE = 8.0
_TEXTURE_SCALE = 0.16
_CLEANNESS_SCALE = 5.0

_NUM_CELLS = GRID_SIZE**2
_CELL_PIXELS = CELL_SIZE**2
_PALETTE = np.array([*BACKGROUNDS.values(), *COLORS.values()], dtype=np.float32) / 255
_BACKGROUND_NAMES, _COLOR_NAMES = tuple(BACKGROUNDS), tuple(COLORS)


def _template_masks() -> np.ndarray:
    """Masks of all shapes at all offsets within a cell, `float32` of shape `(shapes * offsets, 64)`."""
    masks = np.zeros((len(SHAPES), NUM_OFFSETS, NUM_OFFSETS, CELL_SIZE, CELL_SIZE), dtype=np.float32)
    for index, shape in enumerate(SHAPES):
        for dy in range(NUM_OFFSETS):
            for dx in range(NUM_OFFSETS):
                masks[index, dy, dx, dy : dy + SHAPE_SIZE, dx : dx + SHAPE_SIZE] = MASKS[shape]
    return masks.reshape(-1, _CELL_PIXELS)


_TEMPLATES = _template_masks()


@dataclass(frozen=True)
class SceneBelief:
    """
    What the judge believes about a batch of B images. All values are probabilities.

    Args:
        background (`np.ndarray` of shape `(B, 3)`):
            Posterior of the backgrounds; the rest to 1 is the probability of none of them.
        objects (`np.ndarray` of shape `(B, 3, 3, shapes, colors)`):
            Probability that the cell (row, column) holds an object of this shape and color.
        empty (`np.ndarray` of shape `(B, 3, 3)`):
            Probability that the cell is empty; the rest to 1 is the probability that it holds something else.
        geometry (`np.ndarray` of shape `(B,)`): How well the worst object fits its shape; 0 without objects.
        texture (`np.ndarray` of shape `(B,)`):
            How close the pixels of the worst object are to its color; 0 without objects.
        cleanness (`np.ndarray` of shape `(B,)`): How close the pixels outside of objects are to the background.
    """

    background: np.ndarray
    objects: np.ndarray
    empty: np.ndarray
    geometry: np.ndarray
    texture: np.ndarray
    cleanness: np.ndarray


def analyze(images: np.ndarray) -> SceneBelief:
    """
    Read a batch of images.

    Args:
        images (`np.ndarray` of shape `(B, 24, 24, 3)`): RGB images, `uint8`.

    Returns:
        `SceneBelief`: The beliefs about all images.

    Raises:
        `ValueError`: The images have another shape or type.
    """
    expected = (IMAGE_SIZE, IMAGE_SIZE, 3)
    if images.ndim != 4 or images.shape[1:] != expected or images.dtype != np.uint8:
        raise ValueError(
            f"`images` must be uint8 of shape (B, {', '.join(map(str, expected))}), got {images.dtype} of shape "
            f"{images.shape}."
        )
    costs = _pixel_costs(images)
    backgrounds, colors = costs[..., : len(BACKGROUNDS)], costs[..., len(BACKGROUNDS) :]

    background_cost = _append(backgrounds.mean(axis=(1, 2)), _UNKNOWN_BACKGROUND_COST)
    background = _softmax(-background_cost / _BACKGROUND_TEMPERATURE)[:, :-1]
    # Objects are judged in front of the most likely background, so that doubt about the background does not lower their score.
    best = background.argmax(axis=1)
    behind = np.take_along_axis(backgrounds, best[:, None, None, None], axis=-1)

    empty_cost = behind.sum(axis=2)
    # (B, cells, colors, shapes * offsets): painting the mask replaces the background's cost by the color's.
    object_cost = empty_cost[..., None] + np.swapaxes(colors - behind, 2, 3) @ _TEMPLATES.T
    object_cost = object_cost.reshape(len(images), _NUM_CELLS, len(COLORS) * len(_TEMPLATES))
    hypotheses = _append(np.concatenate([object_cost, empty_cost], axis=-1), _JUNK_COST)
    posterior = _softmax(-hypotheses / _CELL_TEMPERATURE)
    by_shape = posterior[..., :-2].reshape(len(images), GRID_SIZE, GRID_SIZE, len(COLORS), len(SHAPES), NUM_OFFSETS**2)

    # Soft version of the best reconstruction: how likely each cell is an object rather than empty, if it is no junk.
    presence = _softmax(-hypotheses[..., :-1] / _CELL_TEMPERATURE)[..., :-1].sum(axis=-1)
    chosen = object_cost.argmin(axis=-1)
    color, template = np.divmod(chosen, len(_TEMPLATES))
    mask = _TEMPLATES[template]
    painted = np.take_along_axis(colors, color[..., None, None], axis=-1)[..., 0]
    texture_cost = (mask * painted).sum(axis=-1) / mask.sum(axis=-1)
    # Squaring the costs makes a few specks weigh more than faint noise everywhere.
    residual = behind[..., 0] ** 2 * (1 - presence[..., None] * mask)
    any_object = 1 - np.prod(1 - presence, axis=1)
    return SceneBelief(
        background=background,
        objects=by_shape.sum(axis=-1).swapaxes(-1, -2),
        empty=posterior[..., -2].reshape(len(images), GRID_SIZE, GRID_SIZE),
        geometry=any_object * _worst(object_cost.min(axis=-1) / _GEOMETRY_SCALE, presence),
        texture=any_object * _worst(texture_cost / _TEXTURE_SCALE, presence),
        cleanness=np.exp(-residual.sum(axis=(1, 2)) / _CLEANNESS_SCALE),
    )


def answer(belief: SceneBelief, index: int, question: str) -> float | None:
    """
    Answer one question about one image.

    Args:
        belief (`SceneBelief`): The beliefs about a batch of images.
        index (`int`): Index of the image in the batch.
        question (`str`): A question in one of the templates; case, and blanks around punctuation, do not matter.

    Returns:
        `float` or `None`: P(yes) in [0, 1], or `None` for a question outside the templates.
    """
    parsed = _parse(_words(question))
    if parsed is None:
        return None
    kind, arguments = parsed
    return float(np.clip(_ANSWERS[kind](belief, index, *arguments), 0.0, 1.0))


def is_answerable(question: str) -> bool:
    """Whether a question is in one of the templates, so that it has an answer about every image."""
    return _parse(_words(question)) is not None


def answer_questions(image: Image.Image, questions: Sequence[str]) -> list[float | None]:
    """`answer` to several questions about one 24x24 image; raises a `ValueError` for an image of another size."""
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"`image` must be of size {(IMAGE_SIZE, IMAGE_SIZE)}, got {image.size}.")
    belief = analyze(np.asarray(to_rgb(image))[None])
    return [answer(belief, 0, question) for question in questions]


def read_scene(belief: SceneBelief, index: int) -> Scene:
    """
    The likeliest scene of an image, with objects centered in their cells.

    A cell that is neither empty nor a good object counts as the object that it resembles most.

    Args:
        belief (`SceneBelief`): The beliefs about a batch of images.
        index (`int`): Index of the image in the batch.

    Returns:
        `Scene`: The scene. Of more than four objects it has the four likeliest.
    """
    found = []
    for row in range(GRID_SIZE):
        for col in range(GRID_SIZE):
            objects, empty = belief.objects[index, row, col], belief.empty[index, row, col]
            if objects.sum() > empty:
                shape, color = np.unravel_index(objects.argmax(), objects.shape)
                margin = float(objects.sum() - empty)
                found.append((margin, SceneObject(row, col, SHAPES[shape], _COLOR_NAMES[color])))
    likeliest = sorted(found, key=lambda item: -item[0])[:MAX_OBJECTS]
    background = _BACKGROUND_NAMES[int(belief.background[index].argmax())]
    return Scene(tuple(obj for _, obj in likeliest), background)


def strict_pass(answers: Sequence[float | None]) -> bool:
    """Whether all questions could be answered and every answer is yes (P(yes) >= 0.5)."""
    return all(value is not None and value >= 0.5 for value in answers)


def _words(question: str) -> str:
    return " ".join(re.findall(r"[\w-]+", question.lower()))


def _pixel_costs(images: np.ndarray) -> np.ndarray:
    """Cost of every pixel under every palette color, of shape `(B, cells, 64, palette)`, values in [0, 1]."""
    pixels = images.reshape(len(images), GRID_SIZE, CELL_SIZE, GRID_SIZE, CELL_SIZE, 3).swapaxes(2, 3)
    pixels = pixels.reshape(len(images), _NUM_CELLS, _CELL_PIXELS, 3).astype(np.float32) / 255
    distances = (pixels**2).sum(axis=-1, keepdims=True) - 2 * pixels @ _PALETTE.T + (_PALETTE**2).sum(axis=-1)
    return np.clip(distances / _SATURATION, 0, 1)


def _append(costs: np.ndarray, constant: float) -> np.ndarray:
    return np.concatenate([costs, np.full_like(costs[..., :1], constant)], axis=-1)


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _worst(costs: np.ndarray, presence: np.ndarray) -> np.ndarray:
    """`exp(-cost)` of the worst cell of each image. A cell counts in proportion to the probability of an object in it."""
    return (1 - presence * (1 - np.exp(-costs))).min(axis=-1)


def _probability(belief: SceneBelief, index: int, shape: str | None, color: str | None = None) -> np.ndarray:
    """Probability that each cell holds such an object, of shape `(3, 3)`."""
    shapes = slice(None) if shape is None else [SHAPES.index(shape)]
    colors = slice(None) if color is None else [_COLOR_NAMES.index(color)]
    return belief.objects[index][:, :, shapes][..., colors].sum(axis=(-1, -2))


def _exists(belief: SceneBelief, index: int, shape: str, color: str | None) -> float:
    return 1 - np.prod(1 - _probability(belief, index, shape, color))


def _has_color(belief: SceneBelief, index: int, shape: str, color: str) -> float:
    # P(none of another color) - P(none at all)
    other = _probability(belief, index, shape) - _probability(belief, index, shape, color)
    return np.prod(1 - other) - np.prod(1 - _probability(belief, index, shape))


def _count(belief: SceneBelief, index: int, count: int, shape: str | None, color: str | None) -> float:
    # A cell that is not empty holds an object, which may be junk. Junk has no shape.
    present = 1 - belief.empty[index] if shape is None else _probability(belief, index, shape, color)
    counts = np.array([1.0])
    for probability in present.ravel():
        counts = np.convolve(counts, [1 - probability, probability])
    return counts[count]


def _related(belief: SceneBelief, index: int, shape: str, relation: str, reference: str) -> float:
    if relation in ("right of", "below"):
        shape, reference = reference, shape
    axis = 0 if relation in ("left of", "right of") else 1
    none_first = np.prod(1 - _probability(belief, index, shape), axis=axis)
    none_second = np.prod(1 - _probability(belief, index, reference), axis=axis)
    # The first `shape` is in line i and a `reference` in a later line. These cells are disjoint, so the product is exact.
    return sum(
        np.prod(none_first[:i]) * (1 - none_first[i]) * (1 - np.prod(none_second[i + 1 :]))
        for i in range(GRID_SIZE - 1)
    )


def _free_of(belief: SceneBelief, index: int, shape: str) -> float:
    # Junk is no evidence of absence.
    known_others = belief.objects[index].sum(axis=(-1, -2)) - _probability(belief, index, shape)
    return np.prod(belief.empty[index] + known_others)


def _background_is(belief: SceneBelief, index: int, background: str) -> float:
    return belief.background[index, _BACKGROUND_NAMES.index(background)]


_ANSWERS = {
    "exists": _exists,
    "has_color": _has_color,
    "count": _count,
    "related": _related,
    "free_of": _free_of,
    "background_is": _background_is,
    "geometry": lambda belief, index: belief.geometry[index],
    "texture": lambda belief, index: belief.texture[index],
    "cleanness": lambda belief, index: belief.cleanness[index],
}

_SHAPE = f"({'|'.join(SHAPES)})"
_COLOR = f"({'|'.join(COLORS)})"
_PLURALS = {noun(shape, count=2): shape for shape in SHAPES}
_COUNTS = {word: count for count, word in COUNT_WORDS.items()}
_PATTERNS = {
    "exists": rf"is there a (?:{_COLOR} )?{_SHAPE}",
    "has_color": rf"is the {_SHAPE} {_COLOR}",
    "count_one": rf"is there exactly one (?:{_COLOR} )?{_SHAPE}",
    "count": rf"are there exactly ({'|'.join(_COUNTS)}) (?:{_COLOR} )?({'|'.join(_PLURALS)})",
    "count_one_object": "is there exactly one object in the image",
    "count_objects": rf"are there exactly ({'|'.join(_COUNTS)}) objects in the image",
    "related": rf"is the {_SHAPE} ({'|'.join(RELATIONS)}) the {_SHAPE}",
    "free_of": rf"is the image free of ({'|'.join(_PLURALS)})",
    "background_is": rf"is the background ({'|'.join(BACKGROUNDS)})",
    "geometry": "is every shape complete and sharp",
    "texture": "are all colors solid",
    "cleanness": "is the background clean and uniform",
}


@lru_cache(maxsize=4096)
def _parse(words: str) -> tuple[str, tuple] | None:
    """The kind of a question and the arguments of its answer."""
    for kind, pattern in _PATTERNS.items():
        match = re.fullmatch(pattern, words)
        if match is None:
            continue
        groups = match.groups()
        if kind == "exists":
            return "exists", groups[::-1]
        if kind == "count_one":
            return "count", (1, *groups[::-1])
        if kind == "count":
            return "count", (_COUNTS[groups[0]], _PLURALS[groups[2]], groups[1])
        if kind == "count_one_object":
            return "count", (1, None, None)
        if kind == "count_objects":
            return "count", (_COUNTS[groups[0]], None, None)
        if kind == "free_of":
            return "free_of", (_PLURALS[groups[0]],)
        return kind, groups
    return None
