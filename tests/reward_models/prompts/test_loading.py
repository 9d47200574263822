# SPDX-License-Identifier: Apache-2.0


import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset

from alphagrpo_ext.image_rows import RowImage
from reward_models.prompts.loading import has_questions, load_prompts, load_unjudged_prompts, read_prompts
from reward_models.prompts.questions import from_row, validate_dataset


def make_row(prompt: Any = "a cat", **changes: Any) -> dict[str, Any]:
    row = {
        "prompt": prompt,
        "semantic_questions": [{"question": "Is there a cat?", "tag": "Existence", "is_valid": True}],
        "quality_questions": [{"question": "Is it sharp?", "tag": "Geometry", "is_valid": False}],
    }
    return row | changes


def write_rows(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(source: str) -> Dataset:
    return load_prompts(source, "train", 1)


def make_image(path: Path, color: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (4, 4), color).save(path)
    return path


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a dataset where `load_dataset` looks for one that it has downloaded before, and cuts it off from the Hub."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")

    def put(dataset: Dataset) -> str:
        (tmp_path / "prompts").mkdir()
        dataset.to_parquet(tmp_path / "prompts" / "train.parquet")
        built = load_dataset(str(tmp_path / "prompts"), split="train", cache_dir=tmp_path / "built")
        folder = Path(built.cache_files[0]["filename"]).parent
        owner, *rest = folder.relative_to(tmp_path / "built").parts
        shutil.copytree(folder, tmp_path.joinpath("hub", "someone___prompts", *rest))
        return "someone/prompts"

    return put


def test_no_file_means_the_shapes_world() -> None:
    dataset = load_prompts(None, "evaluation", 14)
    assert len(dataset) == 14
    assert "category" in dataset.column_names


def test_a_file_is_loaded_with_its_questions_alone(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", make_row("ein Käfer", source="web"), make_row("b", quality_questions=[]))
    dataset = load(path)
    assert dataset.column_names == ["prompt", "semantic_questions", "quality_questions"]
    assert dataset.to_list() == [make_row("ein Käfer"), make_row("b", quality_questions=[])]
    validate_dataset(dataset)


def test_prompts_may_be_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a cat"}]
    dataset = load(write_rows(tmp_path / "a.jsonl", make_row(messages)))
    assert from_row(dataset[0]).prompt == messages
    with pytest.raises(ValueError, match="a.jsonl: prompts must be all text or all messages"):
        load(write_rows(tmp_path / "a.jsonl", make_row(messages), make_row()))


def test_a_folder_is_loaded_in_the_order_of_names_without_failures(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", make_row("third"))
    write_rows(tmp_path / "a.jsonl", make_row("first"), make_row("second"))
    write_rows(tmp_path / "a.jsonl.failed.jsonl", {"prompt": "x", "reason": "timeout", "detail": "y"})
    (tmp_path / "notes.txt").write_text("not for reading")
    assert list(load(str(tmp_path))["prompt"]) == ["first", "second", "third"]
    with pytest.raises(ValueError, match=r"has no files \*.jsonl"):
        (tmp_path / "empty").mkdir()
        load(str(tmp_path / "empty"))


def test_extra_columns_are_kept_and_image_paths_start_at_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_image(tmp_path / "data" / "images" / "red.png", "red")
    blue = make_image(tmp_path / "elsewhere" / "blue.png", "blue")
    path = write_rows(
        tmp_path / "data" / "a.jsonl",
        make_row("a", task="image_editing", image="images/red.png", category="color", source="web"),
        make_row("b", task="image_editing", image=str(blue)),
        make_row("c", image=None),
        make_row("d", image={"bytes": None, "path": "images/red.png"}),
    )
    monkeypatch.chdir(tmp_path / "elsewhere")
    dataset = load(path)
    assert set(dataset.column_names) == {*make_row(), "task", "image", "category"}
    assert isinstance(dataset.features["image"], RowImage)
    assert list(dataset["task"]) == ["image_editing", "image_editing", None, None]
    assert list(dataset["category"]) == ["color", None, None, None]
    colors = [image and image.getpixel((0, 0)) for image in dataset["image"]]
    assert colors == [(255, 0, 0), (0, 0, 255), None, (255, 0, 0)]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (make_row(""), "line 2: prompt is empty"),
        (
            make_row(semantic_questions=[{"question": "Is it?", "tag": " "}]),
            "line 2: semantic_questions[0]: 'tag' is blank",
        ),
        (make_row(task=3), "line 2: task must be a string, got 3"),
        (make_row(category=["a"]), "line 2: category must be a string, got ['a']"),
        (make_row(image="gone.png"), "line 2: there is no image "),
        (make_row(image=7), "line 2: image must be the path of a file, got 7"),
        (make_row(image={"bytes": "iVBOR", "path": None}), "line 2: image must be the path of a file, got {'bytes'"),
        ([1], "line 2: expected a mapping, got list"),
    ],
)
def test_a_malformed_row_is_named_with_file_and_line(tmp_path: Path, second: Any, message: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", make_row(), second)
    for source in (path, str(tmp_path)):
        with pytest.raises(ValueError) as error:
            load(source)
        assert str(error.value).startswith(f"{path}, {message}")


def test_bytes_that_are_no_text_are_named_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(make_row()).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match="a.jsonl, line 2: not valid UTF-8"):
        load(str(path))
    path.write_bytes(path.read_bytes().splitlines()[0])
    assert len(load(str(path))) == 1


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a.jsonl has no records"):
        load(write_rows(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("source", ["gone.jsonl", "./gone", "/gone", "a/b/c", "gone.txt", "data/"])
@pytest.mark.parametrize("loader", [load, read_prompts])
def test_a_path_that_leads_nowhere_is_not_taken_for_a_dataset(source: str, loader: Any) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        loader(source)


def test_a_dataset_is_loaded_by_its_name(tmp_path: Path, publish: Any) -> None:
    red = make_image(tmp_path / "red.png", "red")
    rows = [make_row("a", image=str(red), task="image_editing", source="web"), make_row("b", image=None, task=None)]
    for row in rows:
        row["semantic_questions"] = json.dumps(row["semantic_questions"])
    name = publish(Dataset.from_list(rows).cast_column("image", Image()))
    dataset = load(name)
    assert set(dataset.column_names) == {*make_row(), "task", "image"}
    assert [from_row(row) for row in dataset] == [from_row(make_row("a")), from_row(make_row("b"))]
    assert dataset[0]["semantic_questions"] == make_row()["semantic_questions"]
    assert dataset[0]["image"].getpixel((0, 0)) == (255, 0, 0)
    assert dataset[1]["image"] is None
    assert read_prompts(name) == ["a", "b"]


def test_a_dataset_s_malformed_row_is_named(publish: Any) -> None:
    name = publish(Dataset.from_list([make_row(), make_row("  ")]))
    with pytest.raises(ValueError, match="dataset someone/prompts, row 1: prompt is empty"):
        load(name)
    with pytest.raises(ValueError, match="dataset someone/prompts, row 1: prompt is blank"):
        read_prompts(name)


def test_a_dataset_s_columns_are_checked(publish: Any) -> None:
    name = publish(Dataset.from_list([{"text": "a cat"}]))
    with pytest.raises(ValueError, match=r"someone/prompts has no column 'prompt'; its columns are \['text'\]"):
        load(name)
    with pytest.raises(ValueError, match="someone/prompts has no column 'prompt'"):
        read_prompts(name)


def test_a_dataset_s_extra_columns_are_brought_into_their_form(tmp_path: Path, publish: Any) -> None:
    red = make_image(tmp_path / "red.png", "red")
    dataset = load(publish(Dataset.from_list([make_row(category=3, task=None, image=str(red))])))
    assert dataset.features["task"] == dataset.features["category"] == Value("string")
    assert (dataset[0]["task"], dataset[0]["category"]) == (None, "3")
    assert dataset[0]["image"].getpixel((0, 0)) == (255, 0, 0)


def test_a_dataset_s_extra_columns_must_have_a_fitting_type(publish: Any) -> None:
    labels = Dataset.from_dict({"category": [0]}, Features({"category": ClassLabel(names=["color"])}))
    name = publish(datasets.concatenate_datasets([Dataset.from_list([make_row()]), labels], axis=1))
    with pytest.raises(ValueError, match="column 'category' must be of type Value.*, but is ClassLabel"):
        load(name)


def test_a_dataset_that_cannot_be_loaded_is_named(publish: Any) -> None:
    with pytest.raises(ValueError, match="nobody/nothing is neither a file nor a dataset"):
        load("nobody/nothing")


def test_prompts_are_read_from_text_once_each(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  a dog \nein Käfer\u2028x\na cat".encode())
    assert read_prompts(str(path)) == ["a cat", "a dog", "ein Käfer\u2028x"]


def test_prompts_are_read_from_json_lines(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "p.jsonl", {"prompt": "a cat", "id": 1}, {"prompt": "two\nlines"}, {"prompt": "a cat "}
    )
    assert read_prompts(path) == ["a cat", "two\nlines"]


def test_prompts_are_read_from_a_folder(tmp_path: Path) -> None:
    write_rows(tmp_path / "folder" / "p.jsonl", {"prompt": "a cat"}, {"prompt": "a dog"})
    assert read_prompts(str(tmp_path / "folder")) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "line 2 has no field 'prompt'"),
        ("a", "line 2 has no field 'prompt'"),
        ({"prompt": " "}, "line 2: prompt is blank"),
        ({"prompt": ["a"]}, "line 2: prompt must be a string, got ['a']"),
    ],
)
def test_a_line_without_a_prompt_is_named(tmp_path: Path, row: Any, message: str) -> None:
    path = write_rows(tmp_path / "p.jsonl", {"prompt": "a"}, row)
    with pytest.raises(ValueError) as error:
        read_prompts(path)
    assert str(error.value) == f"{path}, {message}"


def test_half_of_a_character_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a \\ud83d"}\n')
    with pytest.raises(ValueError, match="line 1: prompt has an unpaired surrogate"):
        read_prompts(str(path))


@pytest.mark.parametrize(("data", "message"), [(b"\n \n", "has no prompts"), (b"\xff\n", "not valid UTF-8")])
def test_a_text_file_without_prompts_or_text_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "prompts.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / "prompts.txt"))


def test_a_side_without_questions_has_the_same_type(tmp_path: Path) -> None:
    dataset = load(write_rows(tmp_path / "a.jsonl", make_row(quality_questions=[])))
    assert dataset.features["prompt"] == Value("string")
    assert dataset.features["quality_questions"] == dataset.features["semantic_questions"]


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("a.jsonl", '{"prompt": "a cat", "style": "ink"}\n{"prompt": "a dog", "n": 2}\n', [("ink", None), (None, 2)]),
        ("a.json", '["a cat", "a dog"]', [(None, None)] * 2),
        ("a.json", '[{"Prompt": "a cat", "semantic_questions": []}, {"Prompt": "a dog"}]', [(None, None)] * 2),
        ("a.csv", "style,prompt,n\nink,a cat,\n,a dog,2\n", [("ink", None), (None, "2")]),
        ("a.csv", "prompt\na cat\na dog\n", [(None, None)] * 2),
        ("a.txt", "a cat\n\na dog\n", [(None, None)] * 2),
    ],
)
def test_rows_without_questions_keep_their_columns(
    tmp_path: Path, name: str, text: str, rows: list[tuple[Any, Any]]
) -> None:
    path = tmp_path / name
    path.write_text(text)
    dataset = load_unjudged_prompts(str(path))
    assert dataset["prompt"][:] == ["a cat", "a dog"]
    assert [(row.get("style"), row.get("n")) for row in dataset] == rows
    assert not has_questions(dataset)


def test_datasets_without_questions_keep_their_columns(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in (1, 2):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"prompt {number}")
    assert load_unjudged_prompts(str(tmp_path / "texts"))["prompt"][:] == ["prompt 1", "prompt 2"]
    Dataset.from_dict({"caption": ["a", "a"], "style": ["x", "y"]}).to_parquet(tmp_path / "a.parquet")
    dataset = load_unjudged_prompts(str(tmp_path / "a.parquet"), prompt_column="caption")
    assert list(dataset) == [{"prompt": "a", "style": "x"}, {"prompt": "a", "style": "y"}]


def test_an_image_beside_a_prompt_without_questions_is_read(tmp_path: Path) -> None:
    make_image(tmp_path / "red.png", "red")
    rows = [{"prompt": "repaint it", "image": name} for name in ("red.png", "gone.png")]
    file = write_rows(tmp_path / "a.jsonl", *rows)
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: .*gone.png"):
        load_unjudged_prompts(file)
    (tmp_path / "a.csv").write_text("prompt,image\na cat,red.png\na dog,\n")
    cat, dog = load_unjudged_prompts(str(tmp_path / "a.csv"))
    assert cat["image"].getpixel((0, 0)) == (255, 0, 0) and dog["image"] is None
    skipped: list[str] = []
    (row,) = load_unjudged_prompts(file, skipped)
    assert row["image"].getpixel((0, 0)) == (255, 0, 0) and "line 2" in skipped[0]


def test_questions_are_seen_in_lists_and_in_cells(tmp_path: Path) -> None:
    question = {"question": "is it ?", "tag": "Count"}
    rows = [{"prompt": "a", "quality_questions": questions} for questions in ([], [question])]
    assert has_questions(load_unjudged_prompts(write_rows(tmp_path / "a.jsonl", *rows)))
    for cell, found in (("[]", False), ("", False), (json.dumps([question]).replace('"', '""'), True)):
        (tmp_path / "a.csv").write_text(f'prompt,semantic_questions\na cat,"{cell}"\n')
        assert has_questions(load_unjudged_prompts(str(tmp_path / "a.csv"))) == found


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"caption": "b"}\n',
            "line 2 has no field 'prompt'",
        ),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": " "}\n', "line 2: prompt is empty"),
        ("a.jsonl", '{"prompt": "a"}\n["b"]\n', "line 2 has no field 'prompt'"),
        (
            "a.jsonl",
            '{"prompt": "a", "n": 1}\n{"prompt": "b", "n": "x"}\n',
            "the values of 'n' are not all of one type",
        ),
        ("a.txt", "\n", "has no records"),
        ("a.csv", "prompt,n,N\na,1,2\n", "has the column 'n' more than once"),
    ],
)
def test_malformed_rows_without_questions_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_unjudged_prompts(str(tmp_path / name))
