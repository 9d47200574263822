# SPDX-License-Identifier: Apache-2.0

"""Prompts in the formats that people have: read, or refused by the name of the format."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shlex
import tarfile
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reward_models.arguments import PromptArguments
from reward_models.prompts.loading import load_prompts, load_unjudged_prompts, read_prompts
from reward_models.prompts.questions import from_row, load_records
from reward_models.prompts.tags import QUALITY_TAGS, SEMANTIC_TAGS


def packed(data: bytes) -> bytes:
    """The same gzip file every time, so that names of tests are the same in all workers."""
    return gzip.compress(data, mtime=0)


def make_row(prompt: Any = "a red circle", **changes: Any) -> dict[str, Any]:
    row = {
        "prompt": prompt,
        "semantic_questions": [{"question": "is there a circle ?", "tag": "Existence"}],
        "quality_questions": [{"question": "is it sharp ?", "tag": "Texture"}],
    }
    return row | changes


def load(source: Path, **arguments: Any) -> list[dict[str, Any]]:
    return list(load_prompts(str(source), "train", 1, **arguments))


ROWS = [make_row("a cat"), make_row("two\nlines")]


def test_rows_are_read_from_every_format_of_rows(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "lines.jsonl").write_text(lines)
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "lines").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode())
    (tmp_path / "array.json").write_text(json.dumps(ROWS, indent=2))
    (tmp_path / "array.jsonl").write_text(json.dumps(ROWS))
    dataset = Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict(train=dataset).save_to_disk(tmp_path / "saved_splits")
    (tmp_path / "folder" / "data").mkdir(parents=True)
    dataset.to_parquet(tmp_path / "folder" / "data" / "train-00000-of-00001.parquet")
    expected = [from_row(row) for row in ROWS]
    for path in sorted(tmp_path.iterdir()):
        assert [from_row(row) for row in load(path)] == expected, path.name
        assert read_prompts(str(path)) == ["a cat", "two\nlines"], path.name


def renamed(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": "a short name", "caption": row["prompt"]} | {k: v for k, v in row.items() if k != "prompt"}


def test_the_column_of_prompts_may_have_another_name(tmp_path: Path) -> None:
    rows = [renamed(row) for row in ROWS]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "array.json").write_text(json.dumps(rows))
    dataset = Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    dataset.remove_columns("prompt").save_to_disk(tmp_path / "caption_alone")
    expected = [from_row(row) for row in ROWS]
    for path in sorted(tmp_path.iterdir()):
        assert [from_row(row) for row in load(path, prompt_column="caption")] == expected, path.name
        assert read_prompts(str(path), "caption") == ["a cat", "two\nlines"], path.name
        message = r"no column 'title' \(prompt_column\); its columns are \[.*'caption', 'semantic_questions', 'qual"
        for read in (lambda path: load(path, prompt_column="title"), lambda path: read_prompts(str(path), "title")):
            with pytest.raises(ValueError, match=f"{path.name}.* has {message}"):
                read(path)
    with pytest.raises(ValueError, match="caption_alone has no column 'prompt'.*--prompt_column names another"):
        load(tmp_path / "caption_alone")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_column_of_a_table_may_have_another_name(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(f"id{delimiter}Caption\n1{delimiter}a cat\n")
    assert read_prompts(str(path), "caption") == ["a cat"]
    with pytest.raises(ValueError, match="without a column 'title'; its first line is .*Caption"):
        read_prompts(str(path), "title")
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n")
    with pytest.raises(ValueError, match="prompts.txt is plain text, which has no column 'caption'"):
        read_prompts(str(path), "caption")


def test_a_column_of_prompts_gets_its_new_name_in_every_format(tmp_path: Path) -> None:
    """The old one may be that of something else which a reward function gets."""
    rows = [{"prompts": "a cat", "Category": "animals"}, {"prompts": "a dog", "Category": "animals"}]
    (tmp_path / "rows.csv").write_text("prompts,Category\na cat,animals\na dog,animals\n")
    (tmp_path / "rows.txt").write_text("prompts\tCategory\na cat\tanimals\na dog\tanimals\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    expected = [{"prompt": row["prompts"], "Category": "animals"} for row in rows]
    for path in sorted(tmp_path.iterdir()):
        assert list(load_unjudged_prompts(str(path), prompt_column="prompts")) == expected, path.name


@pytest.mark.parametrize("name", ["my prompts.jsonl", "rows.parquet", "saved", "table.csv", "text.txt"])
@pytest.mark.parametrize("column", ["prompt", "caption"])
def test_prompts_without_questions_are_sent_to_the_recipe_that_makes_some(
    tmp_path: Path, name: str, column: str
) -> None:
    path = tmp_path / name
    if path.suffix == ".jsonl":
        path.write_text(json.dumps({column: "a cat"}))
    elif path.suffix in (".csv", ".txt"):
        path.write_text(f"{column},id\na cat,1\n" if path.suffix == ".csv" else "a cat\n")
    else:
        dataset = Dataset.from_list([{column: "a cat"}])
        dataset.to_parquet(path) if path.suffix else dataset.save_to_disk(path)
    with pytest.raises(ValueError) as caught:
        load(path, prompt_column=None if column == "prompt" else column)
    (command,) = re.findall(r"python recipes/decompose_prompts.py (.*)", str(caught.value))
    arguments = shlex.split(command)
    output = tmp_path / f"{path.stem}_questions.jsonl"
    named = [] if column == "prompt" else ["--prompt_column", column]
    assert arguments[:-4] == ["--input", str(path), *named, "--output", str(output)]
    assert arguments[-4:] == ["--base_url", "http://localhost:8000/v1", "--model", "NAME"]


def test_a_column_of_prompts_needs_a_file(tmp_path: Path) -> None:
    assert PromptArguments(eval_file="a.jsonl", prompt_column="caption").prompt_column == "caption"
    with pytest.raises(ValueError, match="prompt_column='caption' needs train_file or eval_file"):
        PromptArguments(prompt_column="caption")


def test_saved_splits_without_train_are_named(tmp_path: Path) -> None:
    DatasetDict(test=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"has no split 'train', but \['test'\]: give the folder of one"):
        load(tmp_path / "saved")
    assert len(load(tmp_path / "saved" / "test")) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git-LFS pointer .*git lfs pull"),
        ("a.jsonl.gz", packed(b'{"prompt": "a"}'), "compressed with gzip"),
        ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"), "text in UTF-16: save it as UTF-8"),
        ("a.jsonl", '{"prompt": "a"}'.encode("utf-16-le"), "text in UTF-16: save it as UTF-8"),
        ("a.txt", '{"prompt": "a"}'.encode("utf-32"), "text in UTF-32"),
        ("a.xlsx", b"PK\x03\x04rest", "zip archive .*Excel"),
        ("a.json", b"<!DOCTYPE html>\n<html>", "HTML page"),
        ("a.json", b'[\n {"prompt": "a"},\n', "neither JSON lines nor a valid JSON array .*line 3"),
        ("a.json", b"\xef\xbb\xbf", "the file is empty"),
        ("a.yaml", b"- prompt: a\n", "a file .yaml is not read as prompts"),
        ("a.json", b'{\n "rows": [\n  1\n ]\n}\n', r"one JSON object over several lines, with the keys \['rows'\]"),
        ("a.txt", "ein K\xe4fer".encode("latin-1"), "not valid UTF-8"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for read in (load, lambda source: read_prompts(str(source))):
        if read is load and name == "a.txt" and b"K" in content:
            message = "plain text"
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            read(path)
        message = "not valid UTF-8" if message == "plain text" else message


@pytest.mark.parametrize(
    ("content", "message"),
    [("Prompt\tCategory\na cat\tAnimals\n", "TSV table"), ("id,text\n0,a\n", "CSV table"), ("a cat\n", "plain text")],
)
def test_files_that_hold_no_questions_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"prompts.txt: the file is .*{message}.*decompose_prompts.py"):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "Prompts,Category\na cat,Colors\n",
            r"without a column 'prompt' or 'text'; its first line is \['Prompts', 'Cat",
        ),
        (
            'image\tCaption\na.jpg\t"a\ncat"\n',
            r"its first line is \['image', 'Caption'\]. --prompt_column names another",
        ),
        ("id;instruction\r\n\r\n1;a cat, red\r\n", r"its first line is \['id', 'instruction'\]. --prompt_column"),
        ("\n\nPrompts,Category\n\na cat,Colors\n", r"its first line is \['Prompts', 'Category'\]"),
        ("prompt|category\na cat|x\n", "'prompt|category' is the header of a table with '|' .*save the table as CSV"),
        ("| Prompt | Category |\n|---|---|\n| a cat | x |\n", "header of a table with '|' .*--prompt_column"),
        ("prompt\na cat\n", "'prompt' is the name of a column and not a prompt: --prompt_column prompt reads"),
        ('\n"Captions" \na cat\n', "is the name of a column and not a prompt: --prompt_column captions reads"),
    ],
)
def test_a_header_in_a_text_is_no_prompt(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content.encode())
    for read in (read_prompts, load_unjudged_prompts):
        with pytest.raises(ValueError, match=rf"prompts.txt.*{message}"):
            read(str(path))


@pytest.mark.parametrize(
    ("content", "column"),
    [
        ("Prompts,Category\na cat,Colors\na dog,Colors\n", "Prompts"),
        ("\nimage_file\tBild\na.jpg\ta cat\nb.jpg\ta dog\n", "bild"),
        ("Prompt\na cat\na dog\n", "prompt"),
        ("Beschreibung\na cat\na dog", "Beschreibung"),
        ("id,prompt\r1,a cat\r2,a dog\r", None),
        ("\n,,\nprompt,x,\na cat,1,\na dog,1,\n", None),
        ("a cat\ra dog\r\n\r", None),
    ],
)
def test_columns_and_lines_of_a_text_are_found(tmp_path: Path, content: str, column: str | None) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content.encode())
    assert read_prompts(str(path), column) == ["a cat", "a dog"]
    assert load_unjudged_prompts(str(path), prompt_column=column)["prompt"] == ["a cat", "a dog"]


def test_rows_of_a_text_are_found_by_their_column(tmp_path: Path) -> None:
    path = write_table(tmp_path / "rows.txt", [{k: v for k, v in renamed(ROWS[0]).items() if k != "prompt"}], "\t")
    assert [from_row(row) for row in load(path, prompt_column="caption")] == [from_row(ROWS[0])]


def test_prompts_with_commas_are_no_table(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    for prompts in (
        ["a photo, a caption, neon", "captions, in a comic", "a dog"],
        ["a cat, red", "prompts, a sign"],
        ["a prompt | neon", "a dog"],
        ["the word prompt", "a dog"],
    ):
        path.write_text("\n".join(prompts))
        assert read_prompts(str(path)) == prompts


def test_a_table_among_texts_of_one_prompt_each_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a sign, text, neon\nand a cat")
    assert read_prompts(str(tmp_path)) == ["a sign, text, neon\nand a cat"]
    for content in ("Prompts,Category\na cat,Colors\n", "prompt\tcategory\na cat\tColors\n"):
        (tmp_path / "b.txt").write_text(content)
        for read in (read_prompts, load_unjudged_prompts):
            with pytest.raises(ValueError, match="b.txt is a table of prompts, but .* each file holds one prompt"):
                read(str(tmp_path))


def test_bytes_that_are_no_text_are_no_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    for content in (b"a cat\na\0dog\n", b"prompt,x\na\0cat,1\n", b"a cat\n" * 1000 + b"\0"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"prompts.txt, line \d+: the file holds a zero byte"):
            read_prompts(str(path))
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "a")
    for read in (read_prompts, load):
        with pytest.raises(ValueError, match="prompts.txt: the file is a tar archive: extract it"):
            read(path)


QUESTION_COLUMNS = ("semantic_questions", "quality_questions")


def write_table(path: Path, rows: list[dict[str, Any]], delimiter: str = ",", **options: Any) -> Path:
    """A table of rows, whose lists are JSON."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, **options)
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: json.dumps(v, ensure_ascii=False) if isinstance(v, list) else v for k, v in row.items()}
            )
    return path


@pytest.mark.parametrize(
    ("name", "delimiter"),
    [("rows.csv", ","), ("rows.csv", ";"), ("rows.tsv", "\t"), ("rows.txt", "\t"), ("rows", ",")],
)
def test_rows_of_a_table_are_those_of_json_lines(tmp_path: Path, name: str, delimiter: str) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    asked = [
        {"question": 'does it say "a, b; c" ?', "tag": "text"},
        {"question": "größer ?", "tag": "Eigenes", "is_valid": False},
    ]
    rows = [
        make_row("a cat, two\nlines", category="animals", task="image_editing", image="red.png"),
        make_row("a dog", semantic_questions=asked, quality_questions=[], category="", task="", image=""),
    ]
    path = write_table(tmp_path / name, rows, delimiter)
    lines = tmp_path / "lines.jsonl"
    lines.write_text(
        "".join(
            json.dumps({k: v or None if k in ("category", "task", "image") else v for k, v in row.items()}) + "\n"
            for row in rows
        )
    )
    expected = load_prompts(str(lines), "train", 1)
    loaded = load_prompts(str(path), "train", 1)
    assert loaded.features == expected.features and list(loaded) == list(expected)
    assert load_records(path) == load_records(lines)
    # What does not read questions takes the prompts alone.
    assert read_prompts(str(path)) == ["a cat, two\nlines", "a dog"]


def test_a_tsv_needs_no_quotes(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    cells = [json.dumps(ROWS[0][name]) for name in QUESTION_COLUMNS]
    path.write_text(
        "\t".join(("Text", "Semantic_Questions ", "QUALITY_QUESTIONS")) + "\n" + "\t".join(("a cat", *cells))
    )
    assert [from_row(row) for row in load(path)] == [from_row(ROWS[0])]


def test_the_prompts_of_a_table_with_questions_may_have_another_name(tmp_path: Path) -> None:
    rows = [renamed(row) for row in ROWS]
    path = write_table(
        tmp_path / "rows.csv", [{"Caption" if k == "caption" else k: v for k, v in row.items()} for row in rows]
    )
    for column in ("caption", "Caption"):
        assert [row["prompt"] for row in load(path, prompt_column=column)] == ["a cat", "two\nlines"]
    with pytest.raises(ValueError, match="rows.csv is a table without a column 'title'"):
        load(path, prompt_column="title")


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        (
            "semantic_questions",
            "is there a cat ?",
            r"the cell is not a JSON list of questions, such as \[.*: 'is there a cat",
        ),
        ("quality_questions", "", "the cell is blank: write \\[\\] where there are no questions"),
        ("quality_questions", '{"question": "a ?", "tag": "b"}', "the cell is not a JSON list"),
        ("quality_questions", '"[]"', "the cell is not a JSON list"),
        (
            "semantic_questions",
            str(ROWS[0]["semantic_questions"]),
            "the cell is not .*Python's form of a list.*json.dumps",
        ),
        ("semantic_questions", "[" * 100_000, "the cell is not a JSON list"),
    ],
)
def test_a_cell_that_holds_no_list_is_named(tmp_path: Path, column: str, cell: str, message: str) -> None:
    path = write_table(tmp_path / "rows.csv", [ROWS[0], ROWS[0] | {column: cell}])
    for read in (load, load_records):
        with pytest.raises(ValueError, match=f"rows.csv, line 3, column '{column}': {message}") as error:
            read(path)
        assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"semantic_questions": ["is it ?"]}, r"line 3: semantic_questions\[0\] must be a mapping"),
        ({"semantic_questions": [{"question": "is it ?"}]}, r"line 3: semantic_questions\[0\] has no 'tag'"),
        (
            dict.fromkeys(QUESTION_COLUMNS, []),
            "line 3: semantic_questions and quality_questions have no valid question",
        ),
        ({"prompt": " "}, "line 3: prompt is empty"),
    ],
)
def test_rows_of_a_table_are_checked_as_those_of_json_lines(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    rows = [ROWS[0], ROWS[0] | change]
    (tmp_path / "rows.jsonl").write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    for path in (write_table(tmp_path / "rows.csv", rows), tmp_path / "rows.jsonl"):
        with pytest.raises(ValueError, match=f"{path.name}, {message}"):
            load(path)


def test_columns_of_a_table_with_questions_are_checked(tmp_path: Path) -> None:
    row = {name: value for name, value in ROWS[0].items() if name != "quality_questions"}
    with pytest.raises(
        ValueError, match=r"one.csv, line 2 has no 'quality_questions'; its fields are \['prompt', 'sem"
    ):
        load(write_table(tmp_path / "one.csv", [row]))
    with pytest.raises(ValueError, match="images.csv, line 2 has a column 'images'"):
        load(write_table(tmp_path / "images.csv", [ROWS[0] | {"images": "a.png"}]))
    with pytest.raises(ValueError, match="two.csv has the column 'quality_questions' more than once"):
        load(write_table(tmp_path / "two.csv", [ROWS[0] | {"Quality_Questions": []}]))
    # An index without a name, as pandas writes it, and blank columns at the end are no harm.
    path = write_table(tmp_path / "index.csv", [{"": 7, **ROWS[0], " ": "x"}])
    assert [from_row(row) for row in load(path)] == [from_row(ROWS[0])]


CELLS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).map(str.strip).filter(bool)


@given(
    st.lists(CELLS, min_size=1, unique=True),
    st.sampled_from([",", "\t", ";"]),
    st.sampled_from(["prompt", "Prompt", "PROMPT", "text", "Text"]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["", "\ufeff"]),
)
def test_prompts_of_every_table_are_read(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str], delimiter: str, column: str, end: str, mark: str
) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator=end)
    writer.writerow(["id", column, "note"])
    writer.writerows([index, prompt, "a, b; c\td"] for index, prompt in enumerate(prompts))
    path = tmp_path_factory.mktemp("table") / "prompts.txt"
    path.write_bytes((mark + buffer.getvalue()).encode())
    assert read_prompts(str(path)) == prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,caption\n0,a\n", r"without a column 'prompt' or 'text'; its first line is \['id', 'caption'\]"),
        ("prompt,note\na cat, b, c\n", "line 2 has 3 cells, but the header has 2"),
        ('prompt,note\n"a" cat,b\n', "line 2: not a valid table"),
        ("prompt,note\n ,b\n", "line 2: prompt is blank"),
        ("prompt,Prompt\na,b\n", "column 'prompt' more than once"),
        ("prompt,note\n", "has no prompts"),
    ],
)
def test_a_bad_table_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(path))


def test_prompts_of_arrays_and_of_folders_of_texts_are_read(tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text(json.dumps(["a cat", "a dog"]))
    (tmp_path / "objects.json").write_text(json.dumps([{"Prompt": "a cat"}, {"prompt": "a dog"}], indent=1))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("a cat\n")
    (tmp_path / "folder" / "b.txt").write_bytes(b"a dog\r\nof two lines")
    assert read_prompts(str(tmp_path / "texts.json")) == ["a cat", "a dog"]
    assert read_prompts(str(tmp_path / "objects.json")) == ["a cat", "a dog"]
    assert read_prompts(str(tmp_path / "folder")) == ["a cat", "a dog\nof two lines"]
    (tmp_path / "objects.json").write_text(json.dumps([{"caption": "a cat"}]))
    with pytest.raises(ValueError, match="entry 0 has no field 'prompt'"):
        read_prompts(str(tmp_path / "objects.json"))


@given(
    st.sampled_from([("semantic_questions", SEMANTIC_TAGS), ("quality_questions", QUALITY_TAGS)]).flatmap(
        lambda side: st.tuples(st.just(side[0]), st.sampled_from(side[1]))
    ),
    st.sampled_from([str.lower, str.upper, str.title, lambda tag: f"  {tag}\n", lambda tag: f" {tag.lower()}"]),
)
def test_tags_are_taken_in_any_spelling(side: tuple[str, str], spell: Any) -> None:
    field, tag = side
    record = from_row(make_row(**{field: [{"question": "is it so ?", "tag": spell(tag)}]}))
    assert getattr(record, field)[0].tag == tag
    own = f"{spell(tag).strip()} of shapes"
    record = from_row(make_row(**{field: [{"question": "is it so ?", "tag": f" {own} "}]}))
    assert getattr(record, field)[0].tag == own


def test_broken_images_are_named_or_left_out(tmp_path: Path) -> None:
    Image.effect_noise((40, 40), 80).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:-200])
    path = tmp_path / "edits.jsonl"
    names = ["good.png", "cut.png", None, "gone.png", "good.png"]
    path.write_text("".join(json.dumps(make_row(f"edit {i}", image=name)) + "\n" for i, name in enumerate(names)))
    with pytest.raises(ValueError) as error:
        load(path)
    for part in ("2 rows", "line 2", "cut.png", "truncated", "line 4: there is no image", "--skip_broken_rows"):
        assert part in str(error.value)
    skipped: list[str] = []
    rows = load(path, skipped=skipped)
    assert [row["prompt"] for row in rows] == ["edit 0", "edit 2", "edit 4"]
    assert [row["image"] and row["image"].mode for row in rows] == ["RGB", None, "RGB"]
    assert len(skipped) == 2 and "line 2" in skipped[0] and "gone.png" in skipped[1]
    path.write_text(json.dumps(make_row(image="gone.png")))
    with pytest.raises(ValueError, match="none of the 1 images can be read"):
        load(path, skipped=[])


def test_a_column_of_images_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps(make_row(images=["a.png", "b.png"])))
    with pytest.raises(ValueError, match="line 1 has a column 'images'"):
        load(path)
    Dataset.from_list([make_row(images=[str(path)])]).to_parquet(tmp_path / "edits.parquet")
    with pytest.raises(ValueError, match="edits.parquet has a column 'images'"):
        load(tmp_path / "edits.parquet")
