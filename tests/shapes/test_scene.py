# SPDX-License-Identifier: Apache-2.0

import itertools
import random

import numpy as np
import pytest

from alphagrpo_ext.shapes.prompts import sample_scene, sample_spec
from alphagrpo_ext.shapes.scene import (
    BACKGROUNDS,
    CELL_SIZE,
    COLORS,
    CORRUPTIONS,
    MASKS,
    NUM_OFFSETS,
    SHAPE_SIZE,
    SHAPES,
    Scene,
    SceneObject,
    corrupt_scene,
    render,
    render_array,
)


def _scenes(num_scenes, seed=0):
    rng = random.Random(seed)
    return [sample_scene(sample_spec(rng, "train"), rng) for _ in range(num_scenes)]


def _cell_masks(shape):
    for dy, dx in itertools.product(range(NUM_OFFSETS), repeat=2):
        mask = np.zeros((CELL_SIZE, CELL_SIZE), dtype=bool)
        mask[dy : dy + SHAPE_SIZE, dx : dx + SHAPE_SIZE] = MASKS[shape]
        yield mask


def test_shapes_differ_at_all_offsets():
    for first, second in itertools.combinations(SHAPES, 2):
        assert min((a != b).sum() for a in _cell_masks(first) for b in _cell_masks(second)) >= 8


def test_render_paints_object_in_its_cell():
    scene = Scene((SceneObject(2, 1, "square", "red", dy=0, dx=2),), "gray")
    pixels = render_array(scene)
    painted = (pixels == COLORS["red"]).all(axis=-1)
    assert painted[16:22, 10:16].all() and painted.sum() == 36
    assert (pixels[~painted] == BACKGROUNDS["gray"]).all()
    np.testing.assert_array_equal(np.asarray(render(scene)), pixels)


def test_scene_does_not_depend_on_order_of_objects():
    for scene in _scenes(50):
        assert Scene(scene.objects[::-1], scene.background) == scene


@pytest.mark.parametrize("kind", [None, *CORRUPTIONS])
def test_corruption_renders_differently(kind):
    rng = random.Random(1)
    for scene in _scenes(200):
        if kind == "extra" and len(scene.objects) == 4:
            continue
        assert (render_array(corrupt_scene(scene, rng, kind)) != render_array(scene)).any()


def test_corruption_changes_what_it_names():
    rng = random.Random(2)
    for scene in _scenes(50):
        assert corrupt_scene(scene, rng, "background").objects == scene.objects
        assert len(corrupt_scene(scene, rng, "missing").objects) == len(scene.objects) - 1
        recolored = corrupt_scene(scene, rng, "color")
        assert [(obj.cell, obj.shape) for obj in recolored.objects] == [(obj.cell, obj.shape) for obj in scene.objects]
        moved = corrupt_scene(scene, rng, "moved")
        assert sorted((obj.shape, obj.color) for obj in moved.objects) == sorted(
            (obj.shape, obj.color) for obj in scene.objects
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "star"}, "`shape`.*'star'"),
        ({"color": "pink"}, "`color`.*'pink'"),
        ({"row": 3}, "`row`.*3"),
        ({"dx": -1}, "`dx`.*-1"),
    ],
)
def test_invalid_object(arguments, message):
    with pytest.raises(ValueError, match=message):
        SceneObject(**({"row": 0, "col": 0, "shape": "circle", "color": "red"} | arguments))


def test_invalid_scene():
    objects = tuple(SceneObject(row, col, "circle", "red") for row in range(2) for col in range(3))
    with pytest.raises(ValueError, match="`background`.*'pink'"):
        Scene((), "pink")
    with pytest.raises(ValueError, match="at most 4"):
        Scene(objects[:5], "white")
    with pytest.raises(ValueError, match="different cells"):
        Scene((objects[0], objects[0]), "white")


def test_invalid_corruption():
    with pytest.raises(ValueError, match="`kind`.*'missing'"):
        corrupt_scene(Scene((), "white"), random.Random(0), "missing")
