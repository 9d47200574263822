# SPDX-License-Identifier: Apache-2.0

import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from alphagrpo_ext.shapes.judge import analyze, answer, answer_questions, read_scene, strict_pass
from alphagrpo_ext.shapes.prompts import (
    SPLITS,
    quality_questions,
    sample_scene,
    sample_spec,
    sample_violation,
    satisfies,
    semantic_questions,
)
from alphagrpo_ext.shapes.scene import (
    BACKGROUNDS,
    CELL_SIZE,
    COLORS,
    SHAPE_SIZE,
    Scene,
    SceneObject,
    corrupt_scene,
    render,
    render_array,
)


def _questions(rows):
    return [row["question"] for row in rows]


def _judge(pixels, spec):
    """Reward sqrt(semantic * quality) and whether all answers are yes."""
    image = Image.fromarray(pixels)
    semantic = answer_questions(image, _questions(semantic_questions(spec)))
    quality = answer_questions(image, _questions(quality_questions()))
    return float(np.sqrt(np.mean(semantic) * np.mean(quality))), strict_pass(semantic + quality)


def _reward(pixels, spec):
    return _judge(pixels, spec)[0]


def _pairs(num_pairs, seed=0):
    rng = random.Random(seed)
    specs = [sample_spec(rng, rng.choice(SPLITS)) for _ in range(num_pairs)]
    return [(spec, sample_scene(spec, rng)) for spec in specs]


def _noisy(pixels, sigma, generator):
    return np.clip(pixels + generator.normal(0, sigma, pixels.shape), 0, 255).astype(np.uint8)


def test_right_scenes_pass():
    judged = [_judge(render_array(scene), spec) for spec, scene in _pairs(500)]
    assert np.mean([passed and reward > 0.9 for reward, passed in judged]) >= 0.995


def test_answers_on_rendered_scenes_are_certain_and_true():
    rng = random.Random(1)
    for spec, scene in _pairs(300):
        right = answer_questions(render(scene), _questions(semantic_questions(spec)))
        assert min(right) > 0.97
        violation = sample_violation(scene, spec, rng)
        assert min(answer_questions(render(violation), _questions(semantic_questions(spec)))) < 0.05
        # Of another prompt, exactly the scenes that satisfy it answer all questions with yes.
        other = sample_spec(rng, "train")
        answers = answer_questions(render(scene), _questions(semantic_questions(other)))
        assert all(value > 0.97 or value < 0.05 for value in answers)
        assert strict_pass(answers) == satisfies(scene, other)


def test_corrupted_scenes_score_lower():
    rng = random.Random(2)
    lower = [
        _reward(render_array(sample_violation(scene, spec, rng)), spec) < _reward(render_array(scene), spec)
        for spec, scene in _pairs(500)
    ]
    assert np.mean(lower) >= 0.99


def test_wrong_color_scores_lower():
    rng = random.Random(3)
    pairs = [(spec, scene) for spec, scene in _pairs(500) if all(request.color for request in spec.objects)]
    lower = [
        _reward(render_array(corrupt_scene(scene, rng, "color")), spec) < _reward(render_array(scene), spec) - 0.05
        for spec, scene in pairs
    ]
    assert np.mean(lower) >= 0.99


def test_noise_and_empty_images_score_low():
    generator = np.random.default_rng(0)
    for spec, scene in _pairs(100):
        pixels = render_array(scene)
        assert _reward(generator.integers(0, 256, pixels.shape, dtype=np.uint8), spec) < 0.2
        reward, passed = _judge(render_array(Scene((), spec.background)), spec)
        assert reward < 0.5 and not passed


def test_score_falls_with_noise_and_spreads():
    generator = np.random.default_rng(0)
    pairs = _pairs(60)
    means = [
        np.mean([_reward(_noisy(render_array(scene), sigma, generator), spec) for spec, scene in pairs])
        for sigma in (0, 10, 20, 30, 40, 60, 100)
    ]
    assert (np.diff(means) < -0.02).all()
    assert 0.2 < means[2] < 0.9
    # A group in the sense of GRPO: one prompt, members of different quality.
    for spec, scene in pairs[:10]:
        group = [_reward(_noisy(render_array(scene), sigma, generator), spec) for sigma in np.linspace(5, 35, 8)]
        assert np.std(group) > 0.05


def _half_painted(scene, rng):
    pixels = render_array(scene)
    for obj in scene.objects:
        top, left = obj.row * CELL_SIZE + obj.dy, obj.col * CELL_SIZE + obj.dx
        pixels[top + SHAPE_SIZE // 2 : top + SHAPE_SIZE, left : left + SHAPE_SIZE] = BACKGROUNDS[scene.background]
    return pixels


def _dotted(scene, rng):
    pixels = render_array(scene)
    dots = pixels[::4, ::4]
    dots[(dots == BACKGROUNDS[scene.background]).all(axis=-1)] = (
        BACKGROUNDS["black"] if scene.background == "white" else BACKGROUNDS["white"]
    )
    return pixels


def _with_junk(scene, rng):
    pixels = render_array(scene)
    row, col = rng.choice(scene.free_cells)
    size = rng.choice((2, 3, 4))
    top, left = (CELL_SIZE * line + rng.randrange(CELL_SIZE - size + 1) for line in (row, col))
    pixels[top : top + size, left : left + size] = rng.choice(list(COLORS.values()))
    return pixels


def _blurred(scene, rng):
    return np.asarray(render(scene).filter(ImageFilter.GaussianBlur(1)))


def _cut_by_border(scene, rng):
    return np.roll(render_array(scene), CELL_SIZE // 2, axis=1)


@pytest.mark.parametrize("hack", [_half_painted, _dotted, _with_junk, _blurred, _cut_by_border])
def test_reward_hacks_score_lower(hack):
    rng = random.Random(0)
    for spec, scene in _pairs(100):
        reward, passed = _judge(hack(scene, rng), spec)
        assert reward < _reward(render_array(scene), spec) - 0.08
        assert not passed


def test_averaged_images_score_low():
    rng = random.Random(0)
    for spec, _ in _pairs(50):
        average = np.mean([render_array(sample_scene(spec, rng)) for _ in range(16)], axis=0).astype(np.uint8)
        assert _reward(average, spec) < 0.5


def test_relation_with_several_objects():
    circle, square = SceneObject(0, 0, "circle", "red"), SceneObject(2, 2, "square", "blue")
    image = render(Scene((circle, square, SceneObject(0, 2, "circle", "green")), "white"))
    questions = ["is the circle left of the square ?", "is the circle right of the square ?"]
    left, right = answer_questions(image, questions)
    assert left > 0.97 and right < 0.05


def test_understands_free_punctuation_and_nothing_else():
    image = render(Scene((SceneObject(0, 0, "circle", "red"),), "white"))
    plain, free, *unknown = answer_questions(
        image, ["is there a red circle ?", "Is there a red circle?", "is there a star ?", "is the circle happy ?", ""]
    )
    assert plain == free > 0.97
    assert unknown == [None, None, None]


def test_batch_equals_single_images():
    pairs = _pairs(16)
    generator = np.random.default_rng(0)
    images = np.stack([_noisy(render_array(scene), 25, generator) for _, scene in pairs])
    belief = analyze(images)
    for index, (spec, _) in enumerate(pairs):
        questions = _questions(semantic_questions(spec) + quality_questions())
        batched = [answer(belief, index, question) for question in questions]
        single = answer_questions(Image.fromarray(images[index]), questions)
        np.testing.assert_allclose(batched, single, atol=1e-4)


def test_beliefs_are_distributions():
    images = np.random.default_rng(0).integers(0, 256, (8, 24, 24, 3), dtype=np.uint8)
    images[:4] = np.stack([render_array(scene) for _, scene in _pairs(4)])
    belief = analyze(images)
    total = belief.objects.sum(axis=(-1, -2)) + belief.empty
    assert (total <= 1 + 1e-5).all() and (belief.background.sum(axis=-1) <= 1 + 1e-5).all()
    assert (total[:4] > 0.99).all() and (total[4:] < 0.5).all()


def test_reads_the_scene_of_an_image():
    rng, generator = random.Random(0), np.random.default_rng(0)
    scenes = [sample_scene(sample_spec(rng, "train"), rng) for _ in range(100)]
    pixels = np.stack([render_array(scene) for scene in scenes])
    belief = analyze(pixels)
    assert [read_scene(belief, index) for index in range(100)] == scenes
    noisy = analyze(np.stack([_noisy(array, 40, generator) for array in pixels]))
    assert sum(read_scene(noisy, index) == scene for index, scene in enumerate(scenes)) > 80


def test_empty_batch():
    assert analyze(np.zeros((0, 24, 24, 3), dtype=np.uint8)).objects.shape == (0, 3, 3, 4, 4)


def test_strict_pass():
    assert strict_pass([0.5, 1.0])
    assert not strict_pass([0.49, 1.0])
    assert not strict_pass([None, 1.0])


def test_wrong_size():
    with pytest.raises(ValueError, match=r"\(24, 24\).*\(20, 24\)"):
        answer_questions(Image.new("RGB", (20, 24)), [])
    with pytest.raises(ValueError, match=r"24, 24, 3.*\(2, 20, 24, 3\)"):
        analyze(np.zeros((2, 20, 24, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="float32"):
        analyze(np.zeros((2, 24, 24, 3), dtype=np.float32))
