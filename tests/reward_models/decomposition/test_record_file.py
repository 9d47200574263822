# SPDX-License-Identifier: Apache-2.0


import os
import subprocess
import sys
from pathlib import Path

import pytest

from alphagrpo_ext.files import FileInUseError
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
        # A record is there for other readers at once.
        assert load_records(path) == [record("a"), record("ein Käfer 🐈\u2028\nx"), record("c")]
        assert "c" in records.prompts


def test_a_last_line_torn_anywhere_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    write(path, "a", "Käfer")
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start, len(whole) - 1):
        path.write_bytes(whole[:end])
        with RecordFile(path) as records:
            assert records.prompts == {"a"}
        assert path.read_bytes() == whole[:start]
    path.write_bytes(whole[:-1])
    with RecordFile(path) as records:
        assert records.prompts == {"a", "Käfer"}
    assert path.read_bytes() == whole


def test_a_first_line_torn_leaves_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b'{"prompt": "a", "sem')
    write(path, "b")
    assert load_records(path) == [record("b")]


def test_a_broken_line_in_the_middle_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    write(path, "a")
    path.write_bytes(b"{}\n" + path.read_bytes())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="questions.jsonl, line 1 has no 'prompt'"):
        RecordFile(path).__enter__()
    assert path.read_bytes() == before
    path.write_bytes(before.removeprefix(b"{}\n"))
    write(path, "b")


def test_a_second_writer_is_refused_until_the_first_is_done_or_dead(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    code = (
        "import sys; from reward_models.decomposition.record_file import RecordFile; records = RecordFile(sys.argv[1])"
    )
    code += "; records.__enter__(); print('open', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, path],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(FileInUseError, match="another process writes to .*questions.jsonl"):
            write(path, "a")
    finally:
        process.kill()
        process.communicate()
    write(path, "a")
    assert load_records(path) == [record("a")]
