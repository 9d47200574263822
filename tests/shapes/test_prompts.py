# SPDX-License-Identifier: Apache-2.0

import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from alphagrpo_ext.shapes.prompts import (
    CATEGORIES,
    SPLITS,
    ObjectRequest,
    PromptSpec,
    build_dataset,
    holds,
    prompt_rows,
    prompts_of,
    quality_questions,
    sample_prompt,
    sample_scene,
    sample_spec,
    sample_violation,
    satisfies,
    semantic_questions,
    specs_of,
)
from alphagrpo_ext.shapes.scene import CELLS, Scene, SceneObject, corrupt_scene
from alphagrpo_ext.shapes.text import (
    FLAWS,
    GENERATION_SYSTEM_PROMPT,
    UNDERSTANDING_SYSTEM_PROMPT,
    is_reflection,
    parse_thought,
    reflection,
    reflection_request,
    repair,
    thought,
    vocabulary,
)


SEMANTIC_TAGS = {"Existence", "Count", "Attribute", "Spatial", "Negative", "Environment"}
QUALITY_TAGS = {"Geometry", "Texture", "Coherence"}


def _specs(num_specs, seed=0):
    rng = random.Random(seed)
    return [sample_spec(rng, rng.choice(SPLITS)) for _ in range(num_specs)]


def _wrong_scene(spec, rng):
    """A violation with up to three errors."""
    scene = sample_violation(sample_scene(spec, rng), spec, rng)
    for _ in range(rng.randrange(3)):
        scene = corrupt_scene(scene, rng)
    return scene


def _centered(scene):
    return Scene(tuple(replace(obj, dy=1, dx=1) for obj in scene.objects), scene.background)


@pytest.mark.parametrize("category", CATEGORIES)
def test_splits_are_disjoint_by_combination_and_cover_the_category(category):
    combinations = {split: {spec.combination for spec in specs_of(category, split)} for split in SPLITS}
    total = sum(map(len, combinations.values()))
    assert len(set.union(*combinations.values())) == total
    assert min(len(combinations["train"]), len(combinations["evaluation"])) >= 2
    assert len(combinations["rare"]) == pytest.approx(0.1 * total, abs=0.5)
    assert len(combinations["evaluation"]) == pytest.approx(0.25 * total, abs=0.5)


def test_rows_of_train_and_evaluation_are_disjoint():
    train, evaluation = (prompt_rows(split, 2000, seed=0) for split in ("train", "evaluation"))
    for column in ("combination", "prompt"):
        assert not {row[column] for row in train} & {row[column] for row in evaluation}
    rare = {spec.combination for category in CATEGORIES for spec in specs_of(category, "rare")}
    assert rare & {row["combination"] for row in train}


def test_splits_do_not_depend_on_the_hash_seed():
    code = (
        "from alphagrpo_ext.shapes.prompts import prompt_rows;"
        "print([row['prompt'] for row in prompt_rows('evaluation', 70, seed=3)])"
    )
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        output = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
        ).stdout
        assert output.strip() == str([row["prompt"] for row in prompt_rows("evaluation", 70, seed=3)])


def test_combination_ignores_order_where_the_meaning_does():
    circle, square = ObjectRequest("circle", "red"), ObjectRequest("square", "blue")
    pair = PromptSpec("color_attribution", (circle, square), "white")
    assert pair.combination == replace(pair, objects=(square, circle)).combination
    assert pair.combination != replace(pair, background="gray").combination
    left = PromptSpec("position", (circle, square), "white", relation="left of")
    assert left.combination == replace(left, objects=(square, circle), relation="right of").combination
    assert left.combination != replace(left, relation="right of").combination
    assert left.combination != replace(left, relation="above").combination


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_balanced_and_unique_until_exhausted(split):
    rows = prompt_rows(split, 70, seed=0)
    assert Counter(row["category"] for row in rows) == dict.fromkeys(CATEGORIES, 10)
    for category in CATEGORIES:
        prompts = [row["prompt"] for row in rows if row["category"] == category]
        specs = specs_of(category, split) + (specs_of(category, "rare") if split == "train" else ())
        assert len(set(prompts)) == min(10, sum(len(prompts_of(spec)) for spec in specs))
    assert rows == prompt_rows(split, 70, seed=0) != prompt_rows(split, 70, seed=1)


def test_dataset_has_the_rows():
    assert build_dataset("evaluation", 14, seed=0).to_list() == prompt_rows("evaluation", 14, seed=0)


def test_sampled_scenes_are_right_and_violations_wrong():
    rng = random.Random(0)
    for spec in _specs(500):
        scene = sample_scene(spec, rng)
        assert satisfies(scene, spec)
        assert not satisfies(sample_violation(scene, spec, rng), spec)


def test_relations_are_strict_and_converse():
    for first in CELLS:
        for second in CELLS:
            assert holds("left of", first, second) == (first[1] < second[1]) == holds("right of", second, first)
            assert holds("above", first, second) == (first[0] < second[0]) == holds("below", second, first)


def test_questions_have_known_tags_and_name_the_background():
    for spec in _specs(300):
        questions = semantic_questions(spec)
        assert {row["tag"] for row in questions} <= SEMANTIC_TAGS
        assert len({row["question"] for row in questions}) == len(questions)
        assert f"is the background {spec.background} ?" in [row["question"] for row in questions]
        assert all(spec.background in prompt.split() for prompt in prompts_of(spec))
    assert {row["tag"] for row in quality_questions()} == QUALITY_TAGS


def test_vocabulary_covers_all_texts():
    rng = random.Random(0)
    texts = [GENERATION_SYSTEM_PROMPT, UNDERSTANDING_SYSTEM_PROMPT, "yes no"]
    for spec in _specs(2000):
        scene, wrong, prompt = sample_scene(spec, rng), _wrong_scene(spec, rng), sample_prompt(spec, rng)
        texts += [prompt, reflection_request(prompt), thought(scene), thought(wrong), reflection(wrong, scene)]
        texts += [row["question"] for row in semantic_questions(spec) + quality_questions()]
    words = vocabulary()
    assert words == sorted(set(words))
    assert {word for text in texts for word in text.split()} == set(words)
    assert all(text == text.lower() for text in texts)


def test_thought_parses_back():
    rng = random.Random(0)
    for spec in _specs(300):
        scene = sample_scene(spec, rng)
        wrong = _wrong_scene(spec, rng)
        assert parse_thought(thought(scene)) == _centered(scene)
        assert parse_thought(thought(wrong)) == _centered(wrong)
        assert parse_thought(reflection(wrong, scene)) == _centered(scene)
    assert parse_thought(thought(Scene((), "gray"))) == Scene((), "gray")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<think> </think>",
        "<think> white : </think>",
        "<think> pink : red circle top left </think>",
        "<think> white : red circle top left",
        "<think> white : red circle left top </think>",
        "<think> white : circle top left </think>",
        "<think> white : red circle top left blue square top right </think>",
        "<think> white : red circle top left , </think>",
        "<think> white : red circle top left , blue square top left </think>",
        "<think> white : red circle top left </think> </think>",
    ],
)
def test_thought_outside_the_grammar(text):
    assert parse_thought(text) is None


def test_reflection_names_flaws_after_differences():
    scene = Scene((SceneObject(0, 0, "circle", "red"),), "white")
    blurred = reflection(scene, scene, [FLAWS["Geometry"], FLAWS["Coherence"]])
    assert blurred.startswith("<think> wrong : every shape must be sharp , background must be clean ; plan : white :")
    assert is_reflection(blurred) and parse_thought(blurred) == scene
    wrong = Scene((SceneObject(0, 0, "square", "red"),), "black")
    both = reflection(wrong, scene, list(FLAWS.values()))
    assert is_reflection(both) and "sharp" not in both
    assert not is_reflection("<think> wrong : every shape must be red ; plan : white : nothing </think>")


def test_reflection_is_short_and_names_something_only_if_something_is_wrong():
    rng = random.Random(0)
    for spec in _specs(500):
        wrong = _wrong_scene(spec, rng)
        repaired = repair(wrong, spec, rng)
        text = reflection(wrong, repaired)
        assert len(text.split()) <= 45
        assert text.startswith("<think> nothing wrong ;") == (_centered(wrong) == _centered(repaired))


@pytest.mark.parametrize(
    ("kind", "phrase"),
    [("missing", "wrong : missing"), ("extra", "wrong : extra"), ("background", "wrong : background must be")],
)
def test_reflection_names_the_error(kind, phrase):
    rng = random.Random(0)
    for spec in _specs(50):
        scene = sample_scene(spec, rng)
        if kind != "extra" or len(scene.objects) < 4:
            assert phrase in reflection(corrupt_scene(scene, rng, kind), scene)


def test_reflection_names_what_must_change():
    rng = random.Random(0)
    for spec in specs_of("colors", "train"):
        scene = sample_scene(spec, rng)
        (right,) = scene.objects
        for kind in ("color", "shape"):
            wrong = corrupt_scene(scene, rng, kind)
            (obj,) = wrong.objects
            assert f"wrong : {obj.color} {obj.shape}" in reflection(wrong, scene)
            assert f"must be {getattr(right, kind)} ;" in reflection(wrong, scene)


def test_repair_satisfies_the_spec_and_leaves_right_scenes_alone():
    rng = random.Random(0)
    for spec in _specs(1000):
        assert satisfies(repair(_wrong_scene(spec, rng), spec, rng), spec)
        scene = sample_scene(spec, rng)
        assert repair(scene, spec, rng) == scene


def test_repair_keeps_all_that_was_right():
    rng = random.Random(0)
    for spec in _specs(300):
        scene = sample_scene(spec, rng)
        missing = corrupt_scene(scene, rng, "missing")
        if spec.relation is None:
            assert set(missing.objects) <= set(repair(missing, spec, rng).objects)
        assert repair(corrupt_scene(scene, rng, "background"), spec, rng) == scene


def test_unknown_names():
    with pytest.raises(ValueError, match="`split`.*'test'"):
        prompt_rows("test", 1, seed=0)
    with pytest.raises(ValueError, match="`category`.*'style'"):
        specs_of("style", "train")
    with pytest.raises(ValueError, match="`num_prompts`.*-1"):
        prompt_rows("train", -1, seed=0)
    with pytest.raises(ValueError, match="`relation`.*'near'"):
        holds("near", (0, 0), (0, 1))
