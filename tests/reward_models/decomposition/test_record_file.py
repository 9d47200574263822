# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest

from reward_models.decomposition.record_file import RecordFile
from reward_models.prompts.questions import PromptRecord, Question, load_records


def record(prompt: str) -> PromptRecord:
    return PromptRecord(prompt, (Question("Is there a cat?", "Existence"), Question("Is it?", "Style", False)), ())


def write(path: Path, *prompts: str) -> None:
    with RecordFile(path) as records:
        for prompt in prompts:
            records.append(record(prompt))


def test_records_are_appended_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "questions.jsonl"
    write(path, "a", "ein Käfer 🐈\u2028\nx")
    with RecordFile(path) as records:
        assert records.prompts == {"a", "ein Käfer 🐈\u2028\nx"}
        records.append(record("c"))
        # Other readers see a record at once.
        assert load_records(path) == [record("a"), record("ein Käfer 🐈\u2028\nx"), record("c")]
        assert "c" in records.prompts


def test_an_incomplete_last_record_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b'{"prompt": "a", "sem')
    write(path, "b")
    assert load_records(path) == [record("b")]


def test_a_malformed_record_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    write(path, "a")
    path.write_bytes(b"{}\n" + path.read_bytes())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="questions.jsonl, line 1 has no 'prompt'"):
        RecordFile(path).__enter__()
    assert path.read_bytes() == before
    path.write_bytes(before.removeprefix(b"{}\n"))
    write(path, "b")


def test_records_are_put_into_the_order_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    write(path, "c", "older", "ein Käfer 🐈\u2028\nx", "b", "oldest")
    RecordFile(path).sort(["b", "ein Käfer 🐈\u2028\nx", "not there", "c"])
    expected = ["older", "oldest", "b", "ein Käfer 🐈\u2028\nx", "c"]
    assert load_records(path) == [record(prompt) for prompt in expected]
    before = path.stat().st_ino
    RecordFile(path).sort(["b", "ein Käfer 🐈\u2028\nx", "c"])
    assert path.stat().st_ino == before
    write(path, "d")
    assert [entry.prompt for entry in load_records(path)] == [*expected, "d"]


def test_records_of_another_origin_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    with RecordFile(path) as records:
        # Nothing is in the file yet.
        records.claim({"decomposer": "shapes"})
        records.claim({"decomposer": "openai", "model": None})
        records.claim({"decomposer": "openai", "model": "a"})
        records.append(record("a"))
        records.claim({"decomposer": "openai", "model": None})
    with RecordFile(path) as records:
        records.claim({"decomposer": "openai", "model": "a"})
        with pytest.raises(ValueError, match="questions.jsonl holds .* with model 'a', and this run has 'b'"):
            records.claim({"decomposer": "openai", "model": "b"})
        with pytest.raises(ValueError, match="with decomposer 'openai', and this run has 'shapes'"):
            records.claim({"decomposer": "shapes"})


def test_records_without_an_origin_are_anybodys(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    write(path, "a")
    with RecordFile(path) as records:
        records.claim({"decomposer": "shapes"})
        records.append(record("b"))
    assert [file.name for file in tmp_path.glob("*.json")] == []
