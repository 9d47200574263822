# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest

from alphagrpo_ext.files import atomic_path, require_extra, write_text


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
