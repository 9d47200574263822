# SPDX-License-Identifier: Apache-2.0


import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from alphagrpo_ext.shapes.judge import answer_questions
from alphagrpo_ext.shapes.scene import Scene, SceneObject, render
from reward_models.benchmarks import BENCHMARKS, Benchmark, BenchmarkPrompt
from reward_models.benchmarks.dpg_bench import tile, untile
from reward_models.benchmarks.geneval import geneval_questions
from reward_models.prompts.questions import PromptRecord, Question


ALL = ("dpg_bench", "gedit_bench", "geneval", "tiif_bench", "wise")


def make(name: str) -> Benchmark:
    return BENCHMARKS.get(name)("my-model")


def noise(seed: int, size: tuple[int, int] = (8, 6)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(256, size=(*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def paint_and_load(
    benchmark: Benchmark, prompt: BenchmarkPrompt, folder: Path, num_images: int, size: tuple[int, int] = (8, 6)
) -> None:
    """Images are missing, then there, then read as they were written, and missing again where a file is damaged."""
    assert benchmark.missing(folder, prompt, num_images) == list(range(num_images))
    images = {i: noise(i, size) for i in range(num_images)}
    benchmark.save(folder, prompt, images)
    assert benchmark.missing(folder, prompt, num_images) == []
    loaded = benchmark.load(folder, prompt, num_images)
    assert [image.tobytes() for image in loaded] == [images[i].tobytes() for i in range(num_images)]
    for path in folder.rglob("*.png"):
        content = path.read_bytes()
        for damaged in (b"", content[: len(content) // 2]):
            path.write_bytes(damaged)
            assert benchmark.missing(folder, prompt, num_images)
        path.write_bytes(content)
    assert benchmark.missing(folder, prompt, num_images) == []


def test_names_are_known_and_labels_are_names_of_folders() -> None:
    assert set(ALL) <= set(BENCHMARKS.names())
    for name in ALL:
        for label in ("a/b", "..", ""):
            with pytest.raises(ValueError, match="model_label must be a name for a file"):
                BENCHMARKS.get(name)(label)


def test_questions_of_a_file_go_before_the_benchmarks_own() -> None:
    own = (Question("Is it red?", "Attribute"),)
    given = PromptRecord("a", (Question("Is it round?", "Attribute"),), ())
    assert BenchmarkPrompt("1", "a", "all", own).record({"a": given}) is given
    assert BenchmarkPrompt("1", "a", "all", own).record({}).semantic_questions == own
    assert BenchmarkPrompt("1", "a", "all").record({}) is None
    assert BenchmarkPrompt("1", "a", "all", (Question("Is it red?", "Attribute", False),)).record({}) is None


GENEVAL_ROWS = [
    {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a circle"},
    {
        "tag": "counting",
        "include": [{"class": "cross", "count": 2}],
        "exclude": [{"class": "cross", "count": 3}],
        "prompt": "a photo of two crosses",
    },
    {
        "tag": "position",
        "include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a circle left of a square",
    },
    {
        "tag": "colors",
        "include": [{"class": "circle", "count": 1, "color": "red"}],
        "prompt": "a photo of a red circle",
    },
    {
        "tag": "others",
        "include": [{"class": "orange", "count": 3}],
        "exclude": [{"class": "bench", "count": 1}, {"class": "cup", "count": 2}],
        "prompt": "a photo of oranges",
    },
]
GENEVAL_QUESTIONS = [
    ["Is there a circle?"],
    ["Are there exactly two crosses?"],
    ["Is there a square?", "Is there a circle?", "Is the circle left of the square?"],
    ["Is there a circle?", "Is the circle red?"],
    ["Are there at least three oranges?", "Is the image free of benches?", "Are there fewer than two cups?"],
]


def test_geneval_reads_and_writes_what_its_scorer_reads(tmp_path: Path) -> None:
    benchmark = make("geneval")
    path = write_lines(tmp_path / "prompts" / "evaluation_metadata.jsonl", GENEVAL_ROWS)
    prompts = benchmark.prompts(str(path))
    assert benchmark.prompts(str(path.parent)) == prompts
    assert [(p.key, p.prompt, p.category) for p in prompts][1] == ("00001", "a photo of two crosses", "counting")
    assert benchmark.num_images == 4
    out = tmp_path / "out"
    paint_and_load(benchmark, prompts[2], out, 2)
    assert files(out) == ["00002/metadata.jsonl", "00002/samples/00000.png", "00002/samples/00001.png"]
    # As `evaluation/evaluate_images.py` walks through the folder.
    for folder in out.iterdir():
        assert folder.name.isdigit()
        assert json.loads((folder / "metadata.jsonl").read_text()) == GENEVAL_ROWS[2]
        assert all(re.match(r"\d+\.png", image.name) for image in (folder / "samples").iterdir())
    (out / "00002" / "samples" / "00000.png").unlink()
    assert benchmark.missing(out, prompts[2], 3) == [0, 2]


def test_geneval_asks_what_its_detector_checks() -> None:
    assert [[q.question for q in geneval_questions(row, "row")] for row in GENEVAL_ROWS] == GENEVAL_QUESTIONS
    tags = [q.tag for row in GENEVAL_ROWS for q in geneval_questions(row, "row")]
    assert tags[:4] == ["Existence", "Count", "Existence", "Existence"]
    assert tags[4:] == ["Spatial", "Existence", "Attribute", "Count", "Negative", "Count"]


def test_geneval_questions_are_right_about_right_and_wrong_images() -> None:
    right = render(Scene((SceneObject(1, 0, "circle", "red"), SceneObject(1, 2, "square", "blue")), "white"))
    wrong = render(Scene((SceneObject(1, 2, "circle", "red"), SceneObject(1, 0, "square", "blue")), "white"))
    questions = [q.question for q in geneval_questions(GENEVAL_ROWS[2], "row")]
    assert [round(p) for p in answer_questions(right, questions)] == [1, 1, 1]
    assert [round(p) for p in answer_questions(wrong, questions)] == [1, 1, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"include": [{"class": "cat", "count": 0}]}, r"include\[0\]: 'count' must be a positive"),
        ({"include": [{"count": 1}]}, r"include\[0\]: 'class' must be a text"),
        ({"include": [{"class": "cat", "count": 1, "position": ["near", 0]}]}, "'position' must be one of"),
        ({"include": [{"class": "cat", "count": 1, "position": ["above", 4]}]}, "an index of 'include'"),
        ({"exclude": "cats"}, "'exclude' must be a list"),
    ],
)
def test_geneval_names_what_is_malformed(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_lines(tmp_path / "metadata.jsonl", [GENEVAL_ROWS[0], {"tag": "a", "prompt": "b", **row}])
    with pytest.raises(ValueError, match=rf"metadata.jsonl, line 2.*{message}"):
        make("geneval").prompts(str(path))


DPG_COLUMNS = (
    *("item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple"),
    "question_natural_language",
)
DPG_ROWS = [
    ("partiprompts1", "a red cube", "", "1", "0", "entity", "whole", "entity - whole (cube)", "Is there a cube?"),
    ("partiprompts1", "a red cube", "", "2", "1", "attribute", "color", "", "Is the cube red?"),
    ("7", "two dogs, a wall", "", "1", "0", "other", "count", "other - count (dogs, ==2)", "Are there two dogs?"),
    ("7", "two dogs, a wall", "", "2", "1", "relation", "spatial", "", "Are the dogs on a wall?"),
    ("7", "two dogs, a wall", "", "3", "0", "global", "", "global - (photo)", "Is this a photo?"),
]


def write_dpg(folder: Path) -> Path:
    (folder / "prompts").mkdir(parents=True)
    (folder / "prompts" / "partiprompts1.txt").write_text("a red cube\n")
    (folder / "prompts" / "7.txt").write_text("two dogs, a wall")
    with (folder / "dpg_bench.csv").open("w", newline="") as file:
        csv.writer(file).writerows([DPG_COLUMNS, *DPG_ROWS])
    return folder


def test_dpg_bench_reads_folder_and_table_alike(tmp_path: Path) -> None:
    folder, benchmark = write_dpg(tmp_path / "dpg_bench"), make("dpg_bench")
    prompts = {prompt.key: prompt for prompt in benchmark.prompts(str(folder / "prompts"))}
    assert prompts == {prompt.key: prompt for prompt in benchmark.prompts(str(folder / "dpg_bench.csv"))}
    assert prompts["7"].prompt == "two dogs, a wall"
    assert [(q.question, q.tag) for q in prompts["7"].questions] == [
        ("Are there two dogs?", "Count"),
        ("Are the dogs on a wall?", "Spatial"),
        ("Is this a photo?", "Style"),
    ]
    assert [q.tag for q in prompts["partiprompts1"].questions] == ["Existence", "Attribute"]
    (folder / "dpg_bench.csv").unlink()
    assert all(prompt.questions == () for prompt in benchmark.prompts(str(folder / "prompts")))


@pytest.mark.parametrize("num_images", [1, 2, 3, 4])
def test_dpg_bench_tiles_are_where_its_scorer_crops(tmp_path: Path, num_images: int) -> None:
    images = [noise(i, (6, 6)) for i in range(num_images)]
    sheet = tile(images)
    # `crop_tuples_list` of `compute_dpg_bench.py`, for a resolution of 6.
    boxes = [(0, 0, 6, 6), (6, 0, 12, 6), (0, 6, 6, 12), (6, 6, 12, 12)]
    for image, box in zip(images, boxes, strict=False):
        assert sheet.crop(box).tobytes() == image.tobytes()
    assert [image.tobytes() for image in untile(sheet, num_images)] == [image.tobytes() for image in images]
    benchmark = make("dpg_bench")
    paint_and_load(benchmark, BenchmarkPrompt("7", "a", "all"), tmp_path, num_images, (6, 6))
    assert files(tmp_path) == ["7.png"]


def test_dpg_bench_takes_no_fifth_image(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most 4 images"):
        make("dpg_bench").save(tmp_path, BenchmarkPrompt("7", "a", "all"), {i: noise(i, (6, 6)) for i in range(5)})


def test_dpg_bench_takes_square_images_alone(tmp_path: Path) -> None:
    benchmark, prompt = make("dpg_bench"), BenchmarkPrompt("7", "a", "all")
    benchmark.check_image_size(24, 24)
    for height, width in ((24, 16), (16, 24)):
        with pytest.raises(ValueError, match=f"are {height} pixels high and {width} wide: give the same --height"):
            benchmark.check_image_size(height, width)
        with pytest.raises(ValueError, match="square tiles"):
            benchmark.save(tmp_path, prompt, {0: noise(0, (width, height))})
    with pytest.raises(ValueError, match="must have the same size"):
        benchmark.save(tmp_path, prompt, {0: noise(0, (6, 6)), 1: noise(1, (8, 8))})
    assert files(tmp_path) == []
    for name in ALL:
        if name != "dpg_bench":
            make(name).check_image_size(24, 16)


def test_dpg_bench_reads_the_folder_that_it_ships(tmp_path: Path) -> None:
    folder, benchmark = write_dpg(tmp_path / "dpg_bench"), make("dpg_bench")
    (folder / "prompts" / "partiprompts97.txt").write_text("a cat,\nand a dog\n")
    assert sorted(benchmark.texts(str(folder))) == ["a cat,\nand a dog", "a red cube", "two dogs, a wall"]
    assert benchmark.prompts(str(folder)) == benchmark.prompts(str(folder / "prompts"))
    (folder / "dpg_bench.csv").write_bytes(b"item_id,text,question_natural_language\n1,a,\xff?\n")
    with pytest.raises(ValueError, match="dpg_bench.csv: not valid UTF-8"):
        benchmark.prompts(str(folder))


def test_dpg_bench_finds_its_prompts_in_the_repository(tmp_path: Path) -> None:
    folder, benchmark = write_dpg(tmp_path / "ELLA" / "dpg_bench"), make("dpg_bench")
    for name in ("requirements.txt", "prompts.txt"):
        (tmp_path / "ELLA" / name).write_text("torch\ntransformers\n")
        (folder / name).write_text("torch\ntransformers\n")
    expected = benchmark.prompts(str(folder / "prompts"))
    for source in (folder, tmp_path / "ELLA"):
        assert benchmark.prompts(str(source)) == expected
    (folder / "prompts" / "9.TXT").write_text("a cow")
    assert "a cow" in benchmark.texts(str(folder))


def test_dpg_bench_takes_tables_and_texts_alone(tmp_path: Path) -> None:
    folder, benchmark = write_dpg(tmp_path / "dpg_bench"), make("dpg_bench")
    table = (folder / "dpg_bench.csv").read_text()
    (folder / "dpg_bench.CSV").write_text(table)
    assert benchmark.prompts(str(folder / "dpg_bench.CSV")) == benchmark.prompts(str(folder / "dpg_bench.csv"))
    # Columns without a name, as spreadsheets write them.
    (folder / "wide.csv").write_text("".join(f"{line},,\n" for line in table.splitlines()))
    assert benchmark.prompts(str(folder / "wide.csv")) == benchmark.prompts(str(folder / "dpg_bench.csv"))
    assert benchmark.texts(str(folder / "prompts" / "7.txt")) == ["two dogs, a wall"]
    for name in ("dpg_bench.tsv", "readme.md", "prompts.json"):
        (folder / name).write_text(table)
        with pytest.raises(ValueError, match=f"{name}: DPG-Bench's prompts are dpg_bench.csv, or a folder"):
            benchmark.prompts(str(folder / name))
    (folder / "prompts" / "all.txt").write_text(table)
    with pytest.raises(ValueError, match="all.txt is a table of prompts"):
        benchmark.prompts(str(folder))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            '9,"a cat",,1,0,entity,whole,,"Is there a cat?\n10,a dog,,1,0,entity,whole,,Is there a dog?',
            "not a valid table",
        ),
        ('9,"a cat,,1,0,entity,whole,,"Is there a cat?"\n', "not a valid table"),
        ("9,a cat, red,,1,0,entity,whole,,Is there a cat?", "line 7 has 10 cells, but the header has 9: quote"),
        ("9,a cat,,1,0,entity,whole,Is there a cat?", "line 7 has 8 cells, but the header has 9"),
        ("9, ,,1,0,entity,whole,,Is there a cat?", r"'text' is blank in all rows of the items \['9'\]"),
        ("9,a cat,,1,0,entity,whole,, ", "line 7, item '9': 'question_natural_language' must be a text"),
    ],
)
def test_dpg_bench_names_a_bad_row(tmp_path: Path, row: str, message: str) -> None:
    path = write_dpg(tmp_path / "dpg_bench") / "dpg_bench.csv"
    with path.open("a", newline="") as file:
        file.write(row)
    with pytest.raises(ValueError, match=f"dpg_bench.csv.*{message}"):
        make("dpg_bench").prompts(str(path))


def tiif_row(number: int) -> dict[str, Any]:
    return {"type": "color+texture", "short_description": f"short {number}", "long_description": f"long {number}"}


def test_tiif_bench_counts_lines_and_finds_its_questions(tmp_path: Path) -> None:
    write_lines(tmp_path / "testmini_prompts" / "color_texture_prompts.jsonl", [tiif_row(0), tiif_row(1)])
    negation = {"type": "negation", "short_description": "no cat", "long_description": "a room without a cat"}
    write_lines(tmp_path / "testmini_prompts" / "negation_prompts.jsonl", [negation])
    asked = {"type": "color+texture", "yn_question_list": ["Red?  ", "Rough?"], "yn_answer_list": ["yes", "yes"]}
    write_lines(
        tmp_path / "testmini_eval_prompts" / "color_texture_eval_prompts.jsonl",
        [asked | {"yn_question_list": ["Blue?", "Even?"]}, asked],
    )
    write_lines(
        tmp_path / "testmini_eval_prompts" / "negation_eval_prompts.jsonl",
        [{"type": "negation", "yn_question_list": ["No cat?", "Is there a cat?"], "yn_answer_list": ["yes", "no"]}],
    )
    benchmark = make("tiif_bench")
    prompts = {p.key: p for p in benchmark.prompts(str(tmp_path / "testmini_prompts"))}
    assert list(prompts)[:2] == ["color+texture/short_description/0", "color+texture/long_description/0"]
    assert len(prompts) == 6
    second = prompts["color+texture/long_description/1"]
    assert (second.prompt, second.category) == ("long 1", "color+texture/long")
    assert second.questions == (Question("Red?", "Attribute"), Question("Rough?", "Attribute"))
    assert prompts["negation/short_description/0"].questions == (
        Question("No cat?", "Negative"),
        Question("Is there a cat?", "Negative", is_valid=False),
    )
    paint_and_load(benchmark, second, tmp_path / "out", 1)
    # As `find_image_by_idx` of `eval_with_vlm.py` looks for it.
    assert files(tmp_path / "out") == ["color+texture/my-model/long_description/1.png"]


def test_tiif_bench_takes_answers_and_types_in_other_spellings(tmp_path: Path) -> None:
    write_lines(tmp_path / "test_prompts" / "a.jsonl", [tiif_row(0)])
    asked = {
        "type": "Color+Texture",
        "yn_question_list": list("abcd"),
        "yn_answer_list": ["Yes.", "true", "No.", "NO"],
    }
    path = write_lines(tmp_path / "test_eval_prompts" / "a.jsonl", [asked])
    for prompt in make("tiif_bench").prompts(str(tmp_path / "test_prompts")):
        assert [question.is_valid for question in prompt.questions] == [True, True, False, False]
    write_lines(path, [asked | {"yn_answer_list": ["yes", "no", "yes", "maybe"]}])
    with pytest.raises(
        ValueError, match="a.jsonl, line 1: an answer of 'yn_answer_list' must be yes or no, got 'maybe'"
    ):
        make("tiif_bench").prompts(str(tmp_path / "test_prompts"))


def test_wise_reads_arrays_and_writes_a_file_an_id(tmp_path: Path) -> None:
    entry = {"Prompt": "Candy", "Explanation": "e", "Category": "Cultural knowledge", "Subcategory": "Festival"}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "culture.json").write_text(json.dumps([entry | {"prompt_id": 1}, entry | {"prompt_id": 14}]))
    (tmp_path / "data" / "science.json").write_text(json.dumps([entry | {"prompt_id": 701}]))
    benchmark = make("wise")
    prompts = benchmark.prompts(str(tmp_path / "data"))
    assert [(p.key, p.category) for p in prompts][1:] == [("14", "Cultural knowledge"), ("701", "Cultural knowledge")]
    paint_and_load(benchmark, prompts[1], tmp_path / "out", 1)
    assert files(tmp_path / "out") == ["14.png"]
    (tmp_path / "data" / "more.json").write_text(json.dumps([entry | {"prompt_id": 14}]))
    with pytest.raises(ValueError, match="two prompts have the key '14'"):
        benchmark.prompts(str(tmp_path / "data"))


def test_tiif_bench_has_rows_without_questions(tmp_path: Path) -> None:
    row = {
        "type": "text",
        "short_description": "a sign that says tea",
        "long_description": "a wooden sign that says tea",
    }
    write_lines(tmp_path / "test_prompts" / "text_prompts.jsonl", [row])
    write_lines(tmp_path / "test_eval_prompts" / "text_eval_prompts.jsonl", [row | {"text": ["tea"]}])
    prompts = make("tiif_bench").prompts(str(tmp_path / "test_prompts"))
    assert [p.questions for p in prompts] == [(), ()]


WISE_TOPICS = ("cultural_common_sense", "natural_science", "spatio-temporal_reasoning")


def write_wise(path: Path, text: str, *ids: int) -> None:
    row = {"Explanation": "e", "Category": "Cultural knowledge", "Subcategory": "Festival"}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([{"Prompt": f"{text} {i}", **row, "prompt_id": i} for i in ids], indent=4))


def test_wise_reads_the_folder_of_its_first_release(tmp_path: Path) -> None:
    data = tmp_path / "WISE_legacy" / "data"
    data.parent.mkdir()
    for place, topic in enumerate(WISE_TOPICS):
        write_wise(data / f"{topic}.json", "riddle", 400 * place + 1, 400 * place + 2)
        # An id occurs twice in the real rewrites.
        write_wise(data / f"{topic}_rewrite.json", "solution", 400 * place + 1, 400 * place + 1)
    prompts = make("wise").prompts(str(data))
    assert [(p.key, p.prompt) for p in prompts][:3] == [("1", "riddle 1"), ("2", "riddle 2"), ("401", "riddle 401")]
    assert len(prompts) == 6
    (one,) = make("wise").prompts(str(write_rewrite(data)))
    assert one.prompt == "solution 9"


def write_rewrite(folder: Path) -> Path:
    write_wise(folder / "natural_science_rewrite.json", "solution", 9)
    return folder / "natural_science_rewrite.json"


def test_wise_reads_the_folder_of_its_verified_release(tmp_path: Path) -> None:
    data = tmp_path / "data_verified"
    for place, topic in enumerate(WISE_TOPICS):
        write_wise(data / f"{topic}_verified.json", "riddle", place + 1)
    write_wise(data / "merge.json", "riddle", 1, 2, 3)
    expected = [(str(i), f"riddle {i}") for i in (1, 2, 3)]
    for source in (data, data / "merge.json"):
        assert [(p.key, p.prompt) for p in make("wise").prompts(str(source))] == expected
    for topic in WISE_TOPICS:
        (data / f"{topic}_verified.json").unlink()
    write_rewrite(data)
    assert [(p.key, p.prompt) for p in make("wise").prompts(str(data))] == expected
    (data / "merge.json").unlink()
    assert make("wise").texts(str(data)) == ["solution 9"]


def test_wise_reads_each_topic_once_from_files_of_both_releases(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    write_wise(data / f"{WISE_TOPICS[0]}.json", "first", 1)
    for place in (1, 2):
        write_wise(data / f"{WISE_TOPICS[place]}_verified.JSON", "riddle", place + 1)
    assert make("wise").texts(str(data)) == ["first 1", "riddle 2", "riddle 3"]
    write_wise(data / f"{WISE_TOPICS[1]}.json", "first", 2)
    write_wise(data / f"{WISE_TOPICS[0]}_verified.json", "riddle", 1)
    assert make("wise").texts(str(data)) == ["riddle 1", "riddle 2", "riddle 3"]
    assert not caplog.records


def test_wise_reads_all_topics_or_warns_of_those_that_are_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    write_wise(data / f"{WISE_TOPICS[1]}.json", "riddle", 2)
    write_wise(data / "merge.json", "riddle", 1, 2, 3)
    assert make("wise").texts(str(data)) == ["riddle 1", "riddle 2", "riddle 3"]
    assert make("wise").texts(str(data / f"{WISE_TOPICS[1]}.json")) == ["riddle 2"]
    assert not caplog.records
    (data / "merge.json").unlink()
    assert make("wise").texts(str(data)) == ["riddle 2"]
    assert f"{data} has no files of the topics {WISE_TOPICS[0]}, {WISE_TOPICS[2]}, whose prompts" in caplog.text


def write_gedit(folder: Path, without: str = "", **changes: Any) -> Path:
    columns = {
        "task_type": ["color_alter", "color_alter"],
        "key": ["a1b2", "a1b2"],
        "instruction": ["make it red", "变红"],
        "instruction_language": ["en", "cn"],
        "input_image_raw": [noise(0), noise(1)],
        "Intersection_exist": [True, True],
    } | changes
    columns.pop(without, None)
    features = Features(
        {name: Value("string") for name in list(columns)[:4]}
        | {name: ImageFeature() for name in columns if "input_image" in name}
        | {"Intersection_exist": Value("bool")}
    )
    columns = {name: columns[name] for name in features}
    folder.mkdir()
    Dataset.from_dict(columns, features).to_parquet(folder / "train.parquet")
    return folder


def test_gedit_bench_writes_edited_image_and_original(tmp_path: Path) -> None:
    benchmark = make("gedit_bench")
    prompts = benchmark.prompts(str(write_gedit(tmp_path / "data")))
    assert [(p.key, p.prompt, p.category) for p in prompts] == [
        ("color_alter/en/a1b2", "make it red", "color_alter/en"),
        ("color_alter/cn/a1b2", "变红", "color_alter/cn"),
    ]
    assert benchmark.task == "image_editing"
    paint_and_load(benchmark, prompts[1], tmp_path / "out", 1)
    folder = "my-model/fullset/color_alter/cn"
    assert files(tmp_path / "out") == [f"{folder}/a1b2.png", f"{folder}/a1b2_SRCIMG.png"]
    with Image.open(tmp_path / "out" / folder / "a1b2_SRCIMG.png") as original:
        assert original.tobytes() == noise(1).tobytes()


def test_gedit_bench_edits_the_raw_image_and_keeps_the_other_for_its_scorer(tmp_path: Path) -> None:
    benchmark, folder = make("gedit_bench"), "my-model/fullset/color_alter/en"
    data = write_gedit(tmp_path / "both", input_image=[noise(2), noise(3)])
    prompt = benchmark.prompts(str(data))[0]
    assert prompt.image.decode().tobytes() == noise(0).tobytes()
    benchmark.save(tmp_path / "out", prompt, {0: noise(9)})
    with Image.open(tmp_path / "out" / folder / "a1b2_SRCIMG.png") as original:
        assert original.tobytes() == noise(2).tobytes()
    data = write_gedit(tmp_path / "one", "input_image_raw", input_image=[noise(2), noise(3)])
    prompt = benchmark.prompts(str(data))[0]
    assert prompt.image.decode().tobytes() == prompt.original.decode().tobytes() == noise(2).tobytes()
    with pytest.raises(ValueError, match="has no column 'input_image_raw'"):
        benchmark.prompts(str(write_gedit(tmp_path / "none", "input_image_raw")))


def test_texts_of_gedit_are_read_without_images(tmp_path: Path) -> None:
    broken = {"bytes": b"x", "path": None}
    data = write_gedit(tmp_path / "data", input_image_raw=[broken, None])
    assert make("gedit_bench").texts(str(data)) == ["make it red", "变红"]


@pytest.mark.parametrize("name", ["../../outside", "/etc", "a\\b", "..", "a\nb", ".hidden", "C:evil"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="row 1: key must be a name for a file"):
        make("gedit_bench").prompts(str(write_gedit(tmp_path / "gedit", key=["a", name])))
    path = tmp_path / "wise.json"
    path.write_text(json.dumps([{"Prompt": "a", "Category": "b", "prompt_id": name}]))
    with pytest.raises(ValueError, match="entry 0: prompt_id must be a name for a file"):
        make("wise").prompts(str(path))
    path = write_lines(tmp_path / "tiif" / "a.jsonl", [tiif_row(0) | {"type": name}])
    with pytest.raises(ValueError, match="line 1: type must be a name for a file"):
        make("tiif_bench").prompts(str(path))
    table = tmp_path / "dpg.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([DPG_COLUMNS, (name, *DPG_ROWS[0][1:])])
    with pytest.raises(ValueError, match="item_id must be a name for a file"):
        make("dpg_bench").prompts(str(table))


def test_broken_images_of_a_benchmark_are_found(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    noise(0, (64, 64)).save(buffer, "JPEG")
    half, nothing = {"bytes": buffer.getvalue()[:-900], "path": None}, {"bytes": b"", "path": None}
    folder = write_gedit(
        tmp_path / "data", input_image_raw=[noise(0), half], input_image=[nothing, Image.new("1", (4097, 1))]
    )
    prompts = make("gedit_bench").prompts(str(folder))
    with pytest.raises(ValueError, match="row 0: input_image: the image is not a readable image"):
        prompts[0]
    # The header is whole.
    assert prompts[1].original.decode().size == (4097, 1)
    with pytest.raises(ValueError, match="cannot be decoded"):
        prompts[1].image.decode()


def test_gedit_row_without_an_image_is_named(tmp_path: Path) -> None:
    pointer = {"bytes": b"version https://git-lfs.github.com/spec/v1", "path": None}
    prompts = make("gedit_bench").prompts(str(write_gedit(tmp_path / "data", input_image_raw=[pointer, None])))
    with pytest.raises(ValueError, match="row 0: input_image_raw: .*Git-LFS pointer"):
        prompts[0]
    with pytest.raises(ValueError, match="row 1: input_image_raw: .*missing"):
        prompts[1]


@pytest.mark.parametrize("name", ALL)
def test_prompts_that_are_not_there_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match="nowhere"):
        make(name).prompts(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["tiif_bench", "wise", "gedit_bench"])
def test_benchmarks_of_one_image_refuse_more(name: str) -> None:
    with pytest.raises(ValueError, match="one image per prompt"):
        make(name).image_path(BenchmarkPrompt("a/short_description/0", "a", "b"), 1)


@pytest.mark.parametrize(
    ("name", "most"), [("dpg_bench", 4), ("gedit_bench", 1), ("geneval", None), ("tiif_bench", 1), ("wise", 1)]
)
def test_more_images_than_the_scorer_reads_are_refused(name: str, most: int | None) -> None:
    benchmark = make(name)
    benchmark.check_num_images(most or 100)
    assert benchmark.max_images == most
    if most is not None:
        with pytest.raises(ValueError, match=f"at most {most} images per prompt, but --num_images is {most + 1}"):
            benchmark.check_num_images(most + 1)
