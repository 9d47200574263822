# SPDX-License-Identifier: Apache-2.0

"""Every row is checked, whatever holds it, and its image reaches the policy upright and opaque."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Value
from datasets import Image as ImageFeature
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from alphagrpo_ext.images import read_image
from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.rollout.task import TASKS
from alphagrpo_ext.trainer import AlphaGRPOConfig, AlphaGRPOTrainer
from alphagrpo_ext.trainer.checks.rows import RowCheck, check_rows
from alphagrpo_ext.trainer.reward_functions import ARGUMENTS
from alphagrpo_ext.trainer.step import new_step
from reward_models import DVReward
from support.trainers import brightness


MakeTrainer = Callable[..., AlphaGRPOTrainer]
PROMPT = "a red circle on a white background"
QUESTIONS = {
    "semantic_questions": [{"question": "is there a red circle ?", "tag": "existence"}],
    "quality_questions": [{"question": "is every shape complete and sharp ?", "tag": " GEOMETRY "}],
}


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def dataset(*prompts: Any, **columns: list[Any]) -> Dataset:
    return Dataset.from_list([{"prompt": prompt, **QUESTIONS} for prompt in prompts]).map(
        lambda row, index: {name: values[index] for name, values in columns.items()}, with_indices=True
    )


CHAT = dataset(*[user(PROMPT)] * 5, user("  "))
TAGGED = Dataset.from_list([{"prompt": PROMPT, **QUESTIONS}] * 2).map(
    lambda row, index: {
        "semantic_questions": [{"question": "is there a red circle ?", "tag": "" if index else "Count"}]
    },
    with_indices=True,
)


@pytest.mark.parametrize(
    ("bad", "message"), [(CHAT, "row 5: prompt has no user message"), (TAGGED, "row 1: semantic_")]
)
@pytest.mark.parametrize(
    "hold",
    [
        lambda bad: {"train_dataset": bad},
        lambda bad: {"eval_dataset": bad},
        lambda bad: {"eval_dataset": {"good": dataset(PROMPT), "bad": bad}},
        lambda bad: {"eval_dataset": DatasetDict(bad=bad)},
    ],
    ids=["training", "evaluation", "dict", "DatasetDict"],
)
def test_a_malformed_row_is_found_in_every_form(
    make_trainer: MakeTrainer, hold: Any, bad: Dataset, message: str
) -> None:
    with pytest.raises(ValueError, match=f"(train|eval)_dataset.*{message}"):
        make_trainer(datasets={"train_dataset": dataset(PROMPT), **hold(bad)}, reward_funcs=DVReward("shapes"))


@pytest.mark.parametrize(
    ("bad", "message"), [(CHAT, "row 5: prompt has no user message"), (TAGGED, "row 1: semantic_")]
)
@pytest.mark.parametrize("wrap", [lambda reward: reward, lambda reward: partial(reward)], ids=["plain", "partial"])
def test_a_stream_is_checked_as_it_comes(
    make_trainer: MakeTrainer, bad: Dataset, message: str, wrap: Callable[[DVReward], Callable]
) -> None:
    stream = bad.to_iterable_dataset()
    options = {"reward_funcs": wrap(DVReward("shapes")), "think": False, "max_steps": 8}
    trainer = make_trainer(datasets={"train_dataset": stream}, **options)
    with pytest.raises(ValueError, match=f"train_dataset, {message}"):
        trainer.train()
    held = {"train_dataset": dataset(PROMPT), "eval_dataset": IterableDatasetDict(bad=stream)}
    with pytest.raises(ValueError, match=f"eval_dataset\\['bad'\\], {message}"):
        make_trainer(datasets=held, **options).evaluate()


def test_a_stream_may_name_tasks_and_hold_images(make_trainer: MakeTrainer) -> None:
    picture = Image.new("LA", (40, 20), (0, 0))

    def rows() -> Any:
        yield {"prompt": PROMPT, "task": "image_editing", "image": picture}
        yield {"prompt": PROMPT, "task": None, "image": None}
        # A batch is read while the one before it is trained on.
        yield {"prompt": PROMPT, "task": None, "image": None}
        yield {"prompt": PROMPT, "task": "image_editing", "image": None}

    seen: list[str] = []

    def reward(images: list[Image.Image], task: list[str], **kwargs: Any) -> list[float]:
        seen.extend(task)
        return brightness(images)

    # The type of the images is known or not.
    features = Features({"prompt": Value("string"), "task": Value("string"), "image": ImageFeature()})
    for known in (features, None):
        stream = IterableDataset.from_generator(rows, features=known)
        trainer = make_trainer(
            datasets={"train_dataset": stream}, reward_funcs=reward, think=False, max_steps=4, shuffle_dataset=False
        )
        with pytest.raises(ValueError, match="train_dataset, row 3 of task 'image_editing' has no 'image'"):
            trainer.train()
        assert {"image_editing", "reasoning_t2i"} <= set(seen)
        seen.clear()


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_dataset_without_prompts_is_named(make_trainer: MakeTrainer, is_stream: bool) -> None:
    rows, other = dataset(PROMPT, PROMPT), Dataset.from_list([{"text": PROMPT}] * 8)
    other = other.to_iterable_dataset() if is_stream else other
    label = "a stream" if is_stream else "{}"
    message = label + " has no column 'prompt'; its columns are text: rename"
    with pytest.raises(ValueError, match=message.format("train_dataset")):
        make_trainer(datasets={"train_dataset": other}, think=False)
    with pytest.raises(ValueError, match=message.format(r"eval_dataset\['hard'\]")):
        make_trainer(datasets={"train_dataset": rows, "eval_dataset": {"hard": other}}, think=False)
    trainer = make_trainer(datasets={"train_dataset": rows}, think=False)
    with pytest.raises(ValueError, match="eval_dataset(, row 0)? has no (column )?'prompt'"):
        trainer.evaluate(other)


@pytest.mark.parametrize("prompt", [PROMPT, user(PROMPT)], ids=["text", "messages"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_the_column_images_is_refused_by_its_name(make_trainer: MakeTrainer, prompt: Any, is_stream: bool) -> None:
    rows = dataset(prompt, prompt, images=[[Image.new("RGB", (24, 24))]] * 2)
    held = rows.to_iterable_dataset() if is_stream else rows
    with pytest.raises(ValueError, match="has a column 'images'"):
        make_trainer(datasets={"train_dataset": held}, think=False).train()


@pytest.mark.parametrize("name", sorted({*ARGUMENTS} - {"images", "task"}))
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_column_that_a_reward_would_not_get_is_refused(
    make_trainer: MakeTrainer, name: str, is_stream: bool
) -> None:
    rows = dataset(PROMPT, PROMPT, **{name: ["x", "y"]})
    held = rows.to_iterable_dataset() if is_stream else rows
    with pytest.raises(ValueError, match=f"has a column '{name}', but reward functions get something else"):
        make_trainer(datasets={"train_dataset": held}, think=False)
    with pytest.raises(ValueError, match=f"eval_dataset.* has a column '{name}'"):
        make_trainer(datasets={"train_dataset": dataset(PROMPT)}, think=False).evaluate(held)


@pytest.mark.parametrize(
    ("given", "label"),
    [
        ([{"prompt": PROMPT}], "eval_dataset"),
        ("shapes", "eval_dataset"),
        ({"easy": dataset(PROMPT), "hard": [{"prompt": PROMPT}]}, r"eval_dataset\['hard'\]"),
        ({"easy": dataset(PROMPT), "hard": None}, r"eval_dataset\['hard'\]"),
        ({"hard": {"first": dataset(PROMPT)}}, r"eval_dataset\['hard'\]"),
    ],
    ids=["list", "name", "dict of lists", "None in a dict", "dict in a dict"],
)
def test_an_evaluation_of_another_form_is_refused(make_trainer: MakeTrainer, given: Any, label: str) -> None:
    with pytest.raises(TypeError, match=f"^{label} must be a datasets.Dataset or a datasets.IterableDataset, but is "):
        make_trainer(datasets={"train_dataset": dataset(PROMPT), "eval_dataset": given}, think=False)
    trainer = make_trainer(datasets={"train_dataset": dataset(PROMPT)}, think=False)
    with pytest.raises(TypeError, match=f"^{label} must be a datasets.Dataset"):
        trainer.evaluate(given)


@pytest.mark.parametrize("num_rows", [0, 1])
def test_a_stream_with_too_few_rows_is_no_training(make_trainer: MakeTrainer, num_rows: int) -> None:
    features = Features({"prompt": Value("string")})
    rows = [{"prompt": PROMPT}] * num_rows
    stream = IterableDataset.from_generator(lambda: iter(rows), features=features)
    two_groups = {"per_device_train_batch_size": 8, "num_generations": 4}
    with pytest.raises(ValueError, match="nothing was trained: train_dataset gave too few rows for one rollout"):
        make_trainer(datasets={"train_dataset": stream}, think=False, max_steps=2, **two_groups).train()


def test_no_steps_are_no_training(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="nothing was trained: max_steps is 0"):
        make_trainer(datasets={"train_dataset": dataset(PROMPT)}, think=False, max_steps=0).train()


def test_no_rows_are_no_evaluation(make_trainer: MakeTrainer) -> None:
    held = {"train_dataset": dataset(PROMPT)}
    stream = IterableDataset.from_generator(lambda: iter([]), features=Features({"prompt": Value("string")}))
    for held_out in (stream, {"hard": stream}):
        with pytest.raises(ValueError, match="nothing was evaluated: eval_dataset gave no row"):
            make_trainer(datasets=held, think=False).evaluate(held_out)
    with pytest.raises(ValueError, match="eval_dataset is a dict without a dataset"):
        make_trainer(datasets=held | {"eval_dataset": {}}, think=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_device_eval_batch_size": 3}, "per_device_eval_batch_size=3: .*num_generations=4 must divide"),
        ({"num_generations_eval": 3}, "an evaluation paints 4 samples .*num_generations_eval=3 must divide"),
    ],
)
def test_an_evaluation_has_whole_groups(make_trainer: MakeTrainer, settings: dict[str, int], message: str) -> None:
    held = {"train_dataset": dataset(PROMPT), "eval_dataset": dataset(PROMPT)}
    with pytest.raises(ValueError, match=message):
        make_trainer(datasets=held, **settings).evaluate()
    with pytest.raises(ValueError, match=message):
        make_trainer(datasets=held, **settings, eval_on_start=True)


def test_a_dataset_that_is_put_in_place_of_another_is_checked(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(datasets={"train_dataset": dataset(PROMPT), "eval_dataset": {"easy": dataset(PROMPT)}})
    assert "eval_easy_loss" in trainer.evaluate()
    for other in (CHAT, {"hard": CHAT}):
        trainer.eval_dataset = other
        with pytest.raises(ValueError, match="eval_dataset, row 5: prompt has no user message"):
            trainer.evaluate()


@pytest.mark.parametrize(
    ("prompt", "task", "has_image", "message"),
    [
        (user([{"type": "image"}, {"type": "text", "text": PROMPT}]), "reasoning_t2i", False, "the policy sees 0"),
        (user([{"type": "image"}, {"type": "text", "text": PROMPT}]), "reasoning_t2i", True, "the policy sees 0"),
        (user([{"type": "image"}, {"type": "image"}, {"type": "text", "text": "x"}]), "image_editing", True, "sees 1"),
        (user([{"type": "image"}, {"type": "text", "text": PROMPT}]), "image_editing", True, None),
        (user(PROMPT), "image_editing", True, None),
    ],
)
def test_places_for_images_are_counted(
    make_check: Callable[..., RowCheck], prompt: Any, task: str, has_image: bool, message: str | None
) -> None:
    row = {"prompt": prompt, "task": task, "image": Image.new("RGB", (4, 4)) if has_image else None}
    if message is None:
        make_check()(row, "row 0")
    else:
        with pytest.raises(ValueError, match=message):
            make_check()(row, "row 0")


@pytest.fixture(scope="module")
def make_check(
    make_shapes_bagel: Callable[[], BagelModel], shapes_processor: BagelProcessor
) -> Callable[..., RowCheck]:
    model = make_shapes_bagel()

    def make(max_completion_length: int = 16) -> RowCheck:
        args = AlphaGRPOConfig(
            "unused",
            image_height=24,
            image_width=24,
            max_completion_length=max_completion_length,
            bf16=False,
            report_to="none",
        )
        tasks = {name: args.make_task(name) for name in TASKS.names()}
        return RowCheck(tasks, "reasoning_t2i", shapes_processor, model, {name: args.eval_rollout() for name in tasks})

    return make


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["a ", "yellow "]), st.integers(1, 900)), min_size=1, max_size=6))
def test_the_longest_row_is_that_of_most_tokens(
    make_check: Callable[..., RowCheck], sizes: list[tuple[str, int]]
) -> None:
    check = make_check()
    prompts = [word * count for word, count in sizes]
    fits = [
        check.tasks["reasoning_t2i"].max_positions(
            {"prompt": prompt}, check.processor, check.model, check.configs["reasoning_t2i"]
        )
        <= check.model.max_positions
        for prompt in prompts
    ]
    rows = Dataset.from_dict({"prompt": prompts})
    if all(fits):
        check_rows(rows, check, "rows")
    else:
        with pytest.raises(ValueError, match=f"rows, row {fits.index(False)} of task 'reasoning_t2i' can take"):
            check_rows(rows, check, "rows")


def test_an_image_that_no_task_looks_at_is_announced(
    make_check: Callable[..., RowCheck], caplog: pytest.LogCaptureFixture
) -> None:
    pictures = [None, Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4))]
    with caplog.at_level(logging.WARNING):
        check_rows(dataset(PROMPT, PROMPT, PROMPT, image=pictures), make_check(), "train_dataset")
    assert "train_dataset: 2 rows (the first is row 1) have an 'image'" in caplog.text


def test_broken_images_are_found_before_training(make_check: Callable[..., RowCheck], tmp_path: Path) -> None:
    Image.effect_noise((40, 40), 80).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:-200])
    paths = [str(tmp_path / name) for name in ("good.png", "cut.png", "good.png", "gone.png")]
    columns = {"prompt": [PROMPT] * 4, "task": ["image_editing"] * 4, "image": paths}
    as_paths = Dataset.from_dict(columns)
    for rows in (as_paths, as_paths.cast_column("image", ImageFeature())):
        with pytest.raises(ValueError) as error:
            check_rows(rows, make_check(), "train_dataset")
        for part in (
            "2 rows",
            "train_dataset, row 1: ",
            "cut.png",
            "train_dataset, row 3: there is no image",
            "gone.png",
        ):
            assert part in str(error.value)
        check_rows(rows.select([0, 2]), make_check(), "train_dataset")


def picture_with(kind: str) -> Image.Image:
    gray = np.full((20, 40), 60, dtype=np.uint8)
    gray[:5, :5] = 200
    picture = Image.fromarray(gray)
    if kind == "sideways":
        picture.getexif()[0x0112] = 6
    return (
        picture
        if kind == "sideways"
        else picture.convert(kind)
        if kind != "I;16"
        else Image.fromarray(gray * np.uint16(257))
    )


@pytest.mark.parametrize("kind", ["sideways", "LA", "P", "1", "CMYK", "I;16"])
def test_images_in_every_holder_are_the_same(tmp_path: Path, kind: str) -> None:
    picture = picture_with(kind)
    if kind == "LA":
        picture.putalpha(Image.fromarray(np.eye(20, 40, dtype=np.uint8) * 255))
    path = tmp_path / ("picture.png" if kind == "sideways" else "picture.tiff")
    picture.save(path, exif=picture.getexif())
    expected = np.asarray(read_image(path))
    assert expected.shape == ((40, 20, 3) if kind == "sideways" else (20, 40, 3))
    holders = [str(path), path, path.read_bytes(), {"bytes": path.read_bytes(), "path": None}, Image.open(path)]
    rows = Dataset.from_dict({"image": [str(path)]})
    holders += [rows[0]["image"], rows.cast_column("image", ImageFeature())[0]["image"]]
    args = AlphaGRPOConfig("unused", bf16=False, report_to="none")
    for holder in holders:
        step = new_step([{"prompt": PROMPT, "image": holder}] * 2, args, 0, 2, None)
        assert step.rows[0]["image"] is step.rows[1]["image"]
        assert np.array_equal(np.asarray(step.rows[0]["image"]), expected)


def test_an_edit_is_sampled_from_the_upright_photo(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    picture = picture_with("sideways")
    picture.save(tmp_path / "photo.jpg", exif=picture.getexif())
    rows = dataset(PROMPT, PROMPT, image=[str(tmp_path / "photo.jpg")] * 2)
    for held in (rows, rows.cast_column("image", ImageFeature())):
        trainer = make_trainer(datasets={"train_dataset": held}, task="image_editing", think=False)
        trainer.train()
        (update,) = trainer.recorder.updates
        sizes = {
            segment.image.size
            for t in update.trajectories
            for segment in t.segments
            if getattr(segment, "image", None)
        }
        assert any(height > width for width, height in sizes)
