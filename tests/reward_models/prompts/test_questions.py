# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from datasets import Dataset, Features, List, Value

from reward_models.prompts.questions import PromptRecord, Question, from_row, load_records, validate_dataset


def make_row(**changes):
    row = {
        "prompt": "two red squares",
        "semantic_questions": [
            {"question": "Are there two squares?", "tag": "Count"},
            {"question": "Is it nice?", "tag": "Style", "is_valid": False},
        ],
        "quality_questions": [{"question": "Are the edges straight?", "tag": "Geometry", "is_valid": True}],
    }
    return {**row, **changes}


def test_from_row_keeps_all_questions_and_scores_the_valid_ones():
    record = from_row(make_row())
    assert record == PromptRecord(
        prompt="two red squares",
        semantic_questions=(
            Question("Are there two squares?", "Count", True),
            Question("Is it nice?", "Style", False),
        ),
        quality_questions=(Question("Are the edges straight?", "Geometry", True),),
    )
    assert record.valid_semantic_questions == record.semantic_questions[:1]
    assert record.valid_quality_questions == record.quality_questions


def test_from_row_accepts_json_strings_and_none_filled_keys():
    row = make_row()
    as_json = {key: value if key == "prompt" else json.dumps(value) for key, value in row.items()}
    assert from_row(as_json) == from_row(row)
    row["semantic_questions"][0] |= {"is_valid": None, "comment": None}
    assert from_row(row) == from_row(make_row())


def test_from_row_accepts_chat_prompts_and_one_empty_side():
    messages = [{"role": "user", "content": "two red squares"}]
    record = from_row(make_row(prompt=messages, quality_questions=[]))
    assert record.prompt == messages
    assert record.quality_questions == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "row 3: prompt is empty"),
        ({"prompt": 7}, "row 3: prompt must be a string or a list of messages, got int"),
        ({"semantic_questions": None}, "row 3: semantic_questions must be a list of questions, got NoneType"),
        (
            {"semantic_questions": {"question": ["Is it?"], "tag": ["Count"]}},
            "row 3: semantic_questions must be a list of questions, got dict; declare the column as a list of structs",
        ),
        ({"quality_questions": "[{"}, "row 3: quality_questions is a string but not valid JSON"),
        ({"quality_questions": '"text"'}, "row 3: quality_questions must be a list of questions, got str"),
        (
            {"semantic_questions": ["Is it?"]},
            "row 3: semantic_questions[0] must be a mapping with 'question' and 'tag', got str",
        ),
        (
            {"semantic_questions": [{"question": "Is it?", "tag": "Count"}, {"tag": "Count"}]},
            "row 3: semantic_questions[1] has no 'question'",
        ),
        ({"quality_questions": [{"question": "Is it?"}]}, "row 3: quality_questions[0] has no 'tag'"),
        (
            {"quality_questions": [{"question": 5, "tag": "Geometry"}]},
            "row 3: quality_questions[0]: 'question' must be a string, got 5",
        ),
        (
            {"semantic_questions": [{"question": " ", "tag": "Count"}]},
            "row 3: semantic_questions[0]: 'question' is blank",
        ),
        (
            {"semantic_questions": [{"question": "Is it?", "tag": "Count", "is_valid": "no"}]},
            "row 3: semantic_questions[0]: 'is_valid' must be true or false, got 'no'",
        ),
        (
            {
                "semantic_questions": [{"question": "Is it?", "tag": "Count", "is_valid": False}],
                "quality_questions": [],
            },
            "row 3: semantic_questions and quality_questions have no valid question between them",
        ),
    ],
)
def test_malformed_row_is_named_with_its_field(changes, message):
    with pytest.raises(ValueError) as error:
        from_row(make_row(**changes), where="row 3")
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("field", ["prompt", "semantic_questions", "quality_questions"])
def test_missing_field_is_named(field):
    row = make_row()
    del row[field]
    with pytest.raises(ValueError, match=f"row 3 has no '{field}'"):
        from_row(row, where="row 3")


def test_load_records_reads_json_lines(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [make_row(prompt="a café"), make_row(prompt="b")]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    assert load_records(path) == [from_row(row) for row in rows]


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        ("{not json", "line 2: not valid JSON"),
        (json.dumps(make_row(prompt="")), "line 2: prompt is empty"),
        ("[1]", "line 2: expected a mapping, got list"),
    ],
)
def test_load_records_names_file_and_line(tmp_path, second_line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(make_row()) + "\n" + second_line + "\n")
    with pytest.raises(ValueError) as error:
        load_records(path)
    assert str(error.value).startswith(f"{path}, {message}")


def test_load_records_rejects_a_file_without_records(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl has no records"):
        load_records(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_validate_dataset_names_the_row(streaming):
    good = Dataset.from_list([make_row(), make_row(prompt="b")])
    bad = Dataset.from_list([make_row(), make_row(prompt="b"), make_row(prompt="")])
    if streaming:
        good, bad = good.to_iterable_dataset(), bad.to_iterable_dataset()
    validate_dataset(good)
    with pytest.raises(ValueError, match="row 2: prompt is empty"):
        validate_dataset(bad)


def test_validate_dataset_takes_plain_rows_and_names_a_missing_column():
    validate_dataset([make_row()])
    with pytest.raises(ValueError, match="row 0 has no 'quality_questions'"):
        validate_dataset(Dataset.from_list([make_row()]).remove_columns("quality_questions"))


def test_validate_dataset_does_not_read_other_columns():
    class Columns:
        column_names = ("prompt", "semantic_questions", "quality_questions", "image")

        def select_columns(self, names):
            return [{name: make_row()[name] for name in names}]

        def __iter__(self):
            raise AssertionError("the image column would be decoded")

    validate_dataset(Columns())


def test_rows_of_a_dataset_equal_the_rows_that_went_in():
    struct = {"question": Value("string"), "tag": Value("string"), "is_valid": Value("bool")}
    features = Features(
        {"prompt": Value("string"), "semantic_questions": List(struct), "quality_questions": List(struct)}
    )
    assert from_row(Dataset.from_list([make_row()], features=features)[0]) == from_row(make_row())
