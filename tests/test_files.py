# SPDX-License-Identifier: Apache-2.0

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alphagrpo_ext.files import FileInUseError, JsonLinesFile, atomic_path, read_json_lines, require_extra, write_text


def append(path: Path, *rows: dict[str, Any]) -> None:
    with JsonLinesFile(path) as file:
        for row in rows:
            file.append_row(row)


def read(path: Path) -> list[Any]:
    return [row for _, row in read_json_lines(path)]


def test_text_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.txt"
    write_text(path, "first")
    write_text(path, "zweite ü")
    assert path.read_text(encoding="utf-8") == "zweite ü"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_a_block_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def write() -> None:
        with atomic_path(path) as temporary:
            assert temporary.suffix == ".png"
            temporary.write_bytes(b"half")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        write()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_missing_extra_is_named() -> None:
    require_extra("json", "anything")
    with pytest.raises(ImportError, match=r"alphagrpo-ext\[judge\]"):
        require_extra("no_such_module", "judge")


def test_a_last_line_that_is_incomplete_anywhere_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append(path, {"name": "a"}, {"name": "Käfer", "more": {"x": 1}})
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start, len(whole) - 1):
        path.write_bytes(whole[:end])
        append(path)
        assert path.read_bytes() == whole[:start]
    # Only the line break is missing.
    path.write_bytes(whole[:-1])
    append(path)
    assert path.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_named_and_the_lock_is_released(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b"\n{"c": 3}\n')
    with pytest.raises(ValueError, match="rows.jsonl, line 2: not valid JSON"):
        append(path)
    path.write_bytes(b'{"a": 1}\n')
    append(path, {"b": 2})
    assert read(path) == [{"a": 1}, {"b": 2}]


def test_a_second_writer_is_refused_until_the_first_is_done_or_dead(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    code = "import sys; from alphagrpo_ext.files import JsonLinesFile; file = JsonLinesFile(sys.argv[1])"
    code += "; file.__enter__(); print('open', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, path],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(FileInUseError, match="another process writes to .*rows.jsonl"):
            append(path, {"a": 1})
    finally:
        process.kill()
        process.communicate()
    append(path, {"a": 1})
    assert read(path) == [{"a": 1}]
