# SPDX-License-Identifier: Apache-2.0

"""Tags of one's own: taken and logged as they are, if they can be names of metrics; misspellings are warned of."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reward_models import DVReward
from reward_models.arguments import PromptArguments
from reward_models.judges import Judge
from reward_models.prompts import tags
from reward_models.prompts.loading import load_prompts
from reward_models.prompts.questions import from_row, load_records, validate_dataset
from reward_models.prompts.tags import MAX_OWN_TAGS, MAX_TAG_LENGTH, QUALITY_TAGS, SEMANTIC_TAGS


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests may have been warned of the same tags."""
    monkeypatch.setattr(tags, "_warned", set())


class AnyJudge(Judge):
    """Takes every question."""

    async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
        return [1.0] * len(questions)


def make_row(*names: str, side: str = "semantic", **changes: Any) -> dict[str, Any]:
    asked = [{"question": f"is it so, {index} ?", "tag": name} for index, name in enumerate(names)]
    row = {"prompt": "a red circle", "semantic_questions": [], "quality_questions": []}
    return row | {f"{side}_questions": asked} | changes


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path) -> list[dict[str, Any]]:
    return list(load_prompts(str(path), "train", 1))


@pytest.mark.parametrize("tag", ["Brand", "brand colour", "Größe", "色", "size/large", "x" * MAX_TAG_LENGTH])
def test_a_tag_of_ones_own_stays_as_it_is(tmp_path: Path, tag: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write_rows(tmp_path / "rows.jsonl", make_row(f" {tag} "))
    (row,) = load(path)
    assert [question["tag"] for question in row["semantic_questions"]] == [tag]
    assert load_records(path) == [from_row(row)]
    assert not caplog.records


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("", "'tag' is blank"),
        (" \n", "'tag' is blank"),
        ("x" * (MAX_TAG_LENGTH + 1), "'tag' has 41 characters, more than 40: 'xxxx"),
        ("two\nlines", r"'tag' holds a character that is not printed: 'two\\nlines'"),
        ("tab\there", "'tag' holds a character that is not printed"),
        ("bell\a", "'tag' holds a character that is not printed"),
        ("turned\u202e", "'tag' holds a character that is not printed"),
        ("line\u2028end", "'tag' holds a character that is not printed"),
        ("half\ud800", r"'tag' holds a character that is not printed: 'half\\ud800'"),
    ],
)
@pytest.mark.parametrize(("side", "known"), [("semantic", "Style, Env"), ("quality", "Geometry, Ana")])
def test_what_cannot_be_the_name_of_a_metric_is_refused(
    tmp_path: Path, tag: str, message: str, side: str, known: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", make_row("Brand", side=side), make_row("Brand", tag, side=side))
    where = rf"rows.jsonl, line 2: {side}_questions\[1\]: "
    with pytest.raises(ValueError, match=f"{where}{message}.*such as {known}"):
        load(path)


@given(st.text(max_size=MAX_TAG_LENGTH).filter(lambda text: text.strip().isprintable() and text.strip()))
def test_every_printed_text_is_a_tag(tag: str) -> None:
    (question,) = from_row(make_row(tag)).semantic_questions
    assert question.tag.casefold() == tag.strip().casefold()
    assert question.tag in SEMANTIC_TAGS or question.tag == tag.strip()


@pytest.mark.parametrize(
    ("side", "tag", "hint"),
    [
        ("semantic", "Counting", "'Counting' in semantic_questions is not a known tag.*Did you mean Count[?]"),
        ("semantic", "Tetx", "Did you mean Text[?]"),
        (
            "quality",
            "count",
            "'count' in quality_questions is a known tag of semantic_questions.*Did you mean semantic",
        ),
    ],
)
def test_what_looks_like_a_known_tag_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, side: str, tag: str, hint: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", make_row("Brand", side=side), *[make_row(tag, side=side)] * 3)
    rows = load(path)
    assert rows[1][f"{side}_questions"][0]["tag"] == tag
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage().startswith(f"{path}, line 2: ")
    assert re.search(hint, record.getMessage())
    # The other checks of a run say nothing new.
    DVReward(AnyJudge()).validate_dataset(rows)
    validate_dataset(rows)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("side", "tag", "meant"),
    [("semantic", "Existense", "Existence"), ("semantic", "spatail", "Spatial"), ("quality", "Anatmy", "Anatomy")],
)
def test_a_misspelling_is_refused(tmp_path: Path, side: str, tag: str, meant: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", make_row("Brand", side=side), make_row(tag, side=side))
    with pytest.raises(ValueError, match=f"line 2.*unknown tag '{tag}'. Did you mean {meant}[?]"):
        load(path)


def test_known_tags_and_others_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    own = ("Brand", "Relation", "Material", "Logo", "Weather", "Colour", "Position", "Size")
    validate_dataset([make_row(*SEMANTIC_TAGS, *own), make_row(*QUALITY_TAGS, *own, side="quality")])
    assert not caplog.records


def test_a_dataset_names_the_row_of_a_misspelled_tag(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    validate_dataset([make_row("Count"), make_row("Coutn", prompt="two cats")])
    assert caplog.records[0].getMessage().startswith("prompt 'two cats': 'Coutn' in semantic_questions")
    Dataset.from_list([make_row("Count"), make_row("Stlye")]).to_parquet(tmp_path / "rows.parquet")
    load(tmp_path / "rows.parquet")
    assert caplog.records[1].getMessage().startswith(f"dataset {tmp_path / 'rows.parquet'}, row 1: 'Stlye'")
    write_rows(tmp_path / "rows.jsonl", make_row("Count"), make_row("Actoin"))
    load_records(tmp_path / "rows.jsonl")
    assert caplog.records[2].getMessage().startswith(f"{tmp_path / 'rows.jsonl'}, line 2: 'Actoin'")


def test_one_process_of_several_warns(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for rank, tag in enumerate(("Stlye", "Actoin")):
        monkeypatch.setenv("RANK", str(rank))
        validate_dataset([make_row(tag)])
    assert [record.args[1].split()[0] for record in caplog.records] == ["'Stlye'"]


def test_a_column_of_free_text_is_refused(tmp_path: Path) -> None:
    own = [f"topic {index}" for index in range(MAX_OWN_TAGS + 1)]
    message = f"the tag 'topic {MAX_OWN_TAGS}' in semantic_questions is one more than the {MAX_OWN_TAGS} different"
    rows = [make_row(*own[:30], "Count"), make_row(*own[:MAX_OWN_TAGS]), make_row("Style", own[-1])]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for read, where in (
        (lambda: load(path), "rows.jsonl, line 3"),
        (lambda: load_records(path), "rows.jsonl, line 3"),
        (lambda: load(tmp_path / "rows.parquet"), "rows.parquet, row 2"),
        (lambda: validate_dataset(rows), r"row 2 \('a red circle'\)"),
    ):
        with pytest.raises(ValueError, match=f"{where}: {message}"):
            read()
    # Questions that are not asked do not count.
    unasked = [{"question": "is it so ?", "tag": tag, "is_valid": False} for tag in own]
    validate_dataset([make_row("Count", quality_questions=unasked)])

    # What a stream hands over row by row counts as well, and a dataset that was refused does not.
    reward = DVReward(AnyJudge())
    with pytest.raises(ValueError, match=message):
        reward.validate_dataset(rows)
    reward.validate_dataset([make_row("Brand")])
    for tag in own[: MAX_OWN_TAGS - 1]:
        reward.validate_dataset([make_row(tag, "Brand")])
    with pytest.raises(ValueError, match=r"row 0 \('a red circle'\): the tag 'last' in quality_questions is one more"):
        reward.validate_dataset([make_row("last", side="quality")])


def test_help_and_readme_list_the_known_tags() -> None:
    readme = " ".join((Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8").split())
    known = f"semantic questions: {', '.join(SEMANTIC_TAGS)}; of quality questions: {', '.join(QUALITY_TAGS)}"
    (train_file,) = (item for item in fields(PromptArguments) if item.name == "train_file")
    assert known in readme
    assert known in train_file.metadata["help"]
