# SPDX-License-Identifier: Apache-2.0


import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from alphagrpo_ext.shapes.editing import editing_rows
from recipe_tools import processes
from reward_models.evaluation.kept_scores import KeptScores
from reward_models.judges.shapes import ShapesJudge
from support.recipe_modules import load_recipe, run_recipe


RECIPE = load_recipe("export_benchmark")
QUICK = ("--num_timesteps", "3", "--max_new_tokens", "12")
ROWS = [
    {
        "tag": "single_object",
        "include": [{"class": "circle", "count": 1}],
        "prompt": "draw a circle on a white background",
    },
    {
        "tag": "counting",
        "include": [{"class": "cross", "count": 2}],
        "exclude": [{"class": "cross", "count": 3}],
        "prompt": "draw two crosses on a white background",
    },
]


def run(*options: str | Path) -> None:
    run_recipe(RECIPE, RECIPE.ExportArguments, *options)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write_geneval(folder: Path) -> Path:
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_geneval_is_painted_scored_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ("--benchmark", "geneval", "--prompts", write_geneval(tmp_path), "--num_images", "2", *QUICK)
    run(*arguments, "--judge", "shapes", "--batch_size", "2", "--output_dir", out)
    images = [f"0000{i}/samples/0000{j}.png" for i in range(2) for j in range(2)]
    assert files(out / "images") == sorted([*images, "00000/metadata.jsonl", "00001/metadata.jsonl"])
    assert "2 of 2 prompts have questions" in capsys.readouterr().out
    evaluation = json.loads((out / "evaluation.json").read_text())["evaluations"][0]
    assert [category["name"] for category in evaluation["categories"]] == ["single_object", "counting"]
    assert [tag["name"] for tag in evaluation["tags"]] == ["Existence", "Count"]
    assert evaluation["total"]["reward"]["num_samples"] == 4
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines if line["prompt_index"] == 1] == [f"images/{name}" for name in images[2:]]

    painted = {name: (out / "images" / name).read_bytes() for name in images}
    times = {name: (out / "images" / name).stat().st_mtime_ns for name in images}
    assert painted[images[0]] != painted[images[1]]
    (out / "images" / images[1]).unlink()
    run(*arguments, "--output_dir", out)
    # The image that was missing alone, from the noise of its place.
    assert {name: (out / "images" / name).stat().st_mtime_ns for name in images if name != images[1]} == {
        name: value for name, value in times.items() if name != images[1]
    }
    with Image.open(out / "images" / images[1]) as image:
        assert max(abs(a - b) for a, b in zip(image.tobytes(), load(painted[images[1]], tmp_path), strict=True)) <= 1
    with pytest.raises(ValueError, match="were made with other settings: take another output_dir"):
        run(*arguments, "--seed", "1", "--output_dir", out)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded though nothing is left to paint")

    monkeypatch.setattr(processes, "load_model", fail)
    run(*arguments, "--judge", "shapes", "--output_dir", out)


def test_images_of_a_prompt_that_has_changed_are_not_taken_for_its_own(tmp_path: Path) -> None:
    prompts, out = write_geneval(tmp_path), tmp_path / "out"
    arguments = ("--benchmark", "geneval", "--prompts", prompts, "--num_images", "1", *QUICK, "--output_dir", out)
    run(*arguments)
    first = out / "images/00000/samples/00000.png"
    painted = first.read_bytes()

    # Another file with the same prompts, and one more, goes on.
    longer = tmp_path / "longer.jsonl"
    longer.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {**ROWS[0], "prompt": "draw a square"}]))
    run(*arguments[:3], longer, *arguments[4:])
    assert (out / "images/00002/samples/00000.png").exists()
    assert first.read_bytes() == painted

    for changed in (
        [{**ROWS[0], "prompt": "draw a cross"}, ROWS[1]],
        [{**ROWS[0], "include": []}, ROWS[1]],
        ROWS[::-1],
    ):
        prompts.write_text("".join(json.dumps(row) + "\n" for row in changed))
        with pytest.raises(ValueError, match="the images of '00000' in .* are of another prompt than the one"):
            run(*arguments)
    assert first.read_bytes() == painted

    # What was removed is painted anew.
    prompts.write_text("".join(json.dumps(row) + "\n" for row in [{**ROWS[0], "prompt": "draw a cross"}, ROWS[1]]))
    shutil.rmtree(out / "images/00000")
    run(*arguments)
    assert json.loads((out / "images/00000/metadata.jsonl").read_text())["prompt"] == "draw a cross"


def test_a_folder_without_images_belongs_to_nobody(tmp_path: Path) -> None:
    """A run that stopped before its first image has left its settings there."""
    arguments = (
        "--benchmark",
        "geneval",
        "--prompts",
        write_geneval(tmp_path),
        *QUICK,
        "--output_dir",
        tmp_path / "out",
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out/export.json").write_text(json.dumps({"digest": "of other settings"}))
    run(*arguments, "--num_images", "1")
    with pytest.raises(ValueError, match="were made with other settings"):
        run(*arguments, "--num_images", "2")


def test_scoring_that_was_stopped_asks_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    arguments = ("--benchmark", "geneval", "--prompts", write_geneval(tmp_path), "--num_images", "2", *QUICK)
    arguments += ("--judge", "shapes", "--batch_size", "2", "--output_dir", out)
    asked, kept = [], []
    answer, keep = ShapesJudge.answer, KeptScores.keep

    async def counted(self: ShapesJudge, image: Image.Image, questions: Any) -> Any:
        asked.append(image.tobytes())
        return await answer(self, image, questions)

    def stopped(self: KeptScores, *score: Any) -> None:
        kept.append(score)
        if len(kept) == 3:
            raise KeyboardInterrupt
        keep(self, *score)

    monkeypatch.setattr(ShapesJudge, "answer", counted)
    monkeypatch.setattr(KeptScores, "keep", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    # A line that was being written when the process died.
    with (out / "scores.jsonl").open("a") as file:
        file.write('{"key": "ab')
    first = asked[:2]
    asked.clear()
    run(*arguments)
    assert len(asked) == 2
    assert set(asked).isdisjoint(first)
    resumed = [(out / name).read_bytes() for name in ("samples.jsonl", "summary.csv")]
    (out / "scores.jsonl").unlink()
    run(*arguments)
    assert len(asked) == 2 + 4
    assert resumed == [(out / name).read_bytes() for name in ("samples.jsonl", "summary.csv")]
    # With the same answers another reward, which is another score.
    run(*arguments, "--aggregation", "mean")
    assert len(asked) == 2 + 4 + 4


def load(data: bytes, folder: Path) -> bytes:
    (folder / "before.png").write_bytes(data)
    with Image.open(folder / "before.png") as image:
        return image.tobytes()


def test_dpg_bench_is_painted_in_tiles_and_scored_by_tile(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "stock1.txt").write_text("draw a red circle on a white background")
    columns = ("item_id", "text", "category_broad", "category_detailed", "question_natural_language")
    with (tmp_path / "dpg_bench.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, ("stock1", "", "entity", "whole", "Is there a circle?")])
    out = tmp_path / "out"
    arguments = ("--benchmark", "dpg_bench", "--prompts", tmp_path / "prompts", "--judge", "shapes", *QUICK)
    run(*arguments, "--output_dir", out)
    assert files(out / "images") == ["stock1.png"]
    with Image.open(out / "images" / "stock1.png") as image:
        assert image.size == (48, 48)
    evaluation = json.loads((out / "evaluation.json").read_text())["evaluations"][0]
    assert evaluation["total"]["reward"]["num_samples"] == 4


def test_edits_are_written_beside_their_originals_and_refined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = editing_rows(2, seed=0)
    columns = {
        "task_type": [row["category"] for row in rows],
        "key": ["k0", "k1"],
        "instruction": [row["prompt"] for row in rows],
        "instruction_language": ["en", "en"],
        # One is twice as wide as it is high.
        "input_image_raw": [rows[0]["image"], rows[1]["image"].resize((48, 24))],
    }
    features = Features({name: Value("string") for name in list(columns)[:4]} | {"input_image_raw": ImageFeature()})
    (tmp_path / "data").mkdir()
    Dataset.from_dict(columns, features).to_parquet(tmp_path / "data" / "train.parquet")
    questions = tmp_path / "questions.jsonl"
    record = {name: rows[0][name] for name in ("prompt", "semantic_questions", "quality_questions")}
    questions.write_text(json.dumps(record) + "\n")
    out = tmp_path / "out"
    run(
        *("--benchmark", "gedit_bench", "--prompts", tmp_path / "data", "--questions", questions, "--judge", "shapes"),
        *("--num_rounds", "1", "--model_label", "ours", "--output_dir", out, *QUICK),
    )
    assert files(out / "images") == [
        f"ours/fullset/{row['category']}/en/k{i}{suffix}.png"
        for i, row in sorted(enumerate(rows), key=lambda entry: entry[1]["category"])
        for suffix in ("", "_SRCIMG")
    ]
    sizes = []
    for i, row in enumerate(rows):
        with Image.open(out / "images" / f"ours/fullset/{row['category']}/en/k{i}.png") as image:
            sizes.append(image.size)
    assert sizes[0] == (24, 24)
    assert sizes[1][0] > sizes[1][1]
    assert "1 of 2 prompts have questions" in capsys.readouterr().out


def write_edits(folder: Path) -> list[str]:
    """Four rows of GEdit-Bench, the first of which has half an image and the third none. Returns their folders of edits."""
    rows, buffer = editing_rows(4, seed=0), io.BytesIO()
    rows[0]["image"].resize((96, 96)).save(buffer, "JPEG")
    images = [{"bytes": buffer.getvalue()[:-200], "path": None}, rows[1]["image"], None, rows[3]["image"]]
    columns = {
        "task_type": [row["category"] for row in rows],
        "key": [f"k{i}" for i in range(4)],
        "instruction": [row["prompt"] for row in rows],
        "instruction_language": ["en"] * 4,
        "input_image": [row["image"] for row in rows],
        "input_image_raw": images,
    }
    names = list(columns)
    features = Features({n: Value("string") for n in names[:4]} | {n: ImageFeature() for n in names[4:]})
    folder.mkdir()
    Dataset.from_dict(columns, features).to_parquet(folder / "train.parquet")
    return [row["category"] for row in rows]


def test_broken_rows_are_named_before_anything_is_painted_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    categories, out = write_edits(tmp_path / "data"), tmp_path / "out"
    arguments = ("--benchmark", "gedit_bench", "--prompts", tmp_path / "data", "--model_label", "ours", *QUICK)
    with pytest.raises(ValueError, match="--skip_broken_rows") as raised:
        run(*arguments, "--output_dir", out)
    listed = str(raised.value).splitlines()
    assert listed[0] == f"2 rows of {tmp_path / 'data'} cannot be read:"
    assert f"row 0 ({categories[0]}/en/k0): the image cannot be decoded" in listed[1]
    assert "row 2: input_image_raw: the image is missing" in listed[2]
    assert not out.exists()
    run(*arguments, "--skip_broken_rows", "--output_dir", out)
    painted = [f"ours/fullset/{categories[i]}/en/k{i}{end}.png" for i in (1, 3) for end in ("", "_SRCIMG")]
    assert files(out / "images") == sorted(painted)
    printed = capsys.readouterr().out
    assert "2 prompts are painted" in printed and "row 2: input_image_raw: the image is missing" in printed
    run(*arguments, "--skip_broken_rows", "--judge", "shapes", "--output_dir", out)
    assert "No prompt has questions" in capsys.readouterr().out


def test_images_that_the_scorer_cannot_read_are_refused_before_they_are_painted(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "stock1.txt").write_text("draw a red circle on a white background")
    arguments = ("--benchmark", "dpg_bench", "--prompts", tmp_path / "prompts", "--height", "24", "--width", "48")
    with pytest.raises(ValueError, match="square tiles"):
        run(*arguments, "--output_dir", tmp_path / "out")
    with pytest.raises(ValueError, match="at most 4 images per prompt, but --num_images is 5"):
        run(*arguments[:4], "--num_images", "5", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "prompts is missing"),
        (("--prompts", "p", "--questions", "q"), "questions are answered by a judge"),
        (("--prompts", "p", "--num_images", "0"), "num_images must be at least 1"),
        (("--prompts", "p", "--height", "24"), "give height and width, or neither"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(*arguments)
