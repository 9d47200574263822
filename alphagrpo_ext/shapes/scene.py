# SPDX-License-Identifier: Apache-2.0

"""Scenes of the shapes world and their renderer."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image


IMAGE_SIZE = 24
GRID_SIZE = 3
CELL_SIZE = 8
SHAPE_SIZE = 6
NUM_OFFSETS = CELL_SIZE - SHAPE_SIZE + 1
MAX_OBJECTS = 4

ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
CELLS = tuple((row, col) for row in range(GRID_SIZE) for col in range(GRID_SIZE))

COLORS = {"red": (255, 0, 0), "green": (0, 190, 0), "blue": (0, 0, 255), "yellow": (255, 230, 0)}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128)}

# Any two shapes differ in >= 8 pixels at all offsets. An upright cross would differ from the circle in 4 only.
_BITMAPS = {
    "circle": ("..##..", ".####.", "######", "######", ".####.", "..##.."),
    "square": ("######", "######", "######", "######", "######", "######"),
    "triangle": ("..##..", "..##..", ".####.", ".####.", "######", "######"),
    "cross": ("##..##", ".####.", "..##..", "..##..", ".####.", "##..##"),
}
SHAPES = tuple(_BITMAPS)
MASKS = {name: np.array([[pixel == "#" for pixel in line] for line in lines]) for name, lines in _BITMAPS.items()}

CORRUPTIONS = ("color", "shape", "missing", "extra", "moved", "background")


@dataclass(frozen=True, order=True)
class SceneObject:
    """
    One shape in one cell of the grid.

    Args:
        row (`int`): Row of the cell, 0 (top) to 2 (bottom).
        col (`int`): Column of the cell, 0 (left) to 2 (right).
        shape (`str`): One of `SHAPES`.
        color (`str`): One of `COLORS`.
        dy (`int`, *optional*, defaults to `1`): Offset of the 6x6 bitmap from the top of its cell in pixels, 0 to 2.
        dx (`int`, *optional*, defaults to `1`): Offset of the 6x6 bitmap from the left of its cell in pixels, 0 to 2.
    """

    row: int
    col: int
    shape: str
    color: str
    dy: int = 1
    dx: int = 1

    def __post_init__(self) -> None:
        for name, allowed in (("shape", SHAPES), ("color", tuple(COLORS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}.")
        for name, size in (("row", GRID_SIZE), ("col", GRID_SIZE), ("dy", NUM_OFFSETS), ("dx", NUM_OFFSETS)):
            if getattr(self, name) not in range(size):
                raise ValueError(f"`{name}` must be in [0, {size - 1}], got {getattr(self, name)!r}.")

    @property
    def cell(self) -> tuple[int, int]:
        """Row and column."""
        return self.row, self.col


@dataclass(frozen=True)
class Scene:
    """
    At most four objects, each in its own cell, on a uniform background.

    Args:
        objects (`tuple[SceneObject, ...]`):
            The objects, which are kept sorted by row and column so that equal scenes compare equal.
        background (`str`): One of `BACKGROUNDS`.
    """

    objects: tuple[SceneObject, ...]
    background: str

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"`background` must be one of {tuple(BACKGROUNDS)}, got {self.background!r}.")
        if len(self.objects) > MAX_OBJECTS:
            raise ValueError(f"`objects` must hold at most {MAX_OBJECTS} objects, got {len(self.objects)}.")
        if len({obj.cell for obj in self.objects}) < len(self.objects):
            raise ValueError(f"`objects` must lie in different cells, got {self.objects}.")
        object.__setattr__(self, "objects", tuple(sorted(self.objects)))

    @property
    def free_cells(self) -> list[tuple[int, int]]:
        """Cells without an object, in reading order."""
        taken = {obj.cell for obj in self.objects}
        return [cell for cell in CELLS if cell not in taken]


def render_array(scene: Scene) -> np.ndarray:
    """Pixels of a scene, `uint8` of shape `(24, 24, 3)`."""
    pixels = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    pixels[:] = BACKGROUNDS[scene.background]
    for obj in scene.objects:
        top, left = obj.row * CELL_SIZE + obj.dy, obj.col * CELL_SIZE + obj.dx
        pixels[top : top + SHAPE_SIZE, left : left + SHAPE_SIZE][MASKS[obj.shape]] = COLORS[obj.color]
    return pixels


def render(scene: Scene) -> Image.Image:
    """The 24x24 RGB image of a scene."""
    return Image.fromarray(render_array(scene))


def random_object(
    cell: tuple[int, int], rng: random.Random, shape: str | None = None, color: str | None = None
) -> SceneObject:
    """An object in the middle of `cell`. Its shape and color are drawn at random unless they are given."""
    return SceneObject(*cell, shape or rng.choice(SHAPES), color or rng.choice(tuple(COLORS)))


def corrupt_scene(scene: Scene, rng: random.Random, kind: str | None = None) -> Scene:
    """
    Make one plausible error. The result always renders differently.

    Args:
        scene (`Scene`): The scene to corrupt.
        rng (`random.Random`): Source of randomness.
        kind (`str`, *optional*):
            One of `CORRUPTIONS`. Drawn among those that the scene admits when omitted; `"moved"` moves an object to a
            free cell or swaps two different ones.

    Returns:
        `Scene`: The corrupted scene.

    Raises:
        `ValueError`: `kind` is unknown, or the scene has no object to change or no room for another one.
    """
    possible = [
        name
        for name in CORRUPTIONS
        if name == "background" or (len(scene.objects) < MAX_OBJECTS if name == "extra" else scene.objects)
    ]
    kind = kind or rng.choice(possible)
    if kind not in possible:
        raise ValueError(f"`kind` must be one of {possible} for this scene, got {kind!r}.")
    if kind == "background":
        return replace(scene, background=_another(scene.background, BACKGROUNDS, rng))
    if kind == "extra":
        return replace(scene, objects=(*scene.objects, random_object(rng.choice(scene.free_cells), rng)))

    chosen = rng.choice(scene.objects)
    others = tuple(obj for obj in scene.objects if obj != chosen)
    if kind == "missing":
        return replace(scene, objects=others)
    if kind == "color":
        return replace(scene, objects=(*others, replace(chosen, color=_another(chosen.color, COLORS, rng))))
    if kind == "shape":
        return replace(scene, objects=(*others, replace(chosen, shape=_another(chosen.shape, SHAPES, rng))))
    partners = [obj for obj in others if (obj.shape, obj.color) != (chosen.shape, chosen.color)]
    if partners and rng.random() < 0.5:
        partner = rng.choice(partners)
        rest = tuple(obj for obj in others if obj != partner)
        return replace(scene, objects=(*rest, _move(chosen, partner.cell), _move(partner, chosen.cell)))
    return replace(scene, objects=(*others, _move(chosen, rng.choice(scene.free_cells))))


def _another(value: str, values: Iterable[str], rng: random.Random) -> str:
    return rng.choice([other for other in values if other != value])


def _move(obj: SceneObject, cell: tuple[int, int]) -> SceneObject:
    return replace(obj, row=cell[0], col=cell[1])
