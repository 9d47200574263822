# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipe_tools.input_errors import checking_input, input_errors_in_a_line
from reward_models.dvreward import JudgeFailedError


ROOT = Path(__file__).parents[2]


def test_errors_of_input_end_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes/some_recipe.py"])
    for error in (ValueError("row 3 is bad"), FileNotFoundError("row 3 is bad"), ImportError("row 3 is bad")):
        with pytest.raises(SystemExit) as stop, input_errors_in_a_line(), checking_input():
            raise error
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"some_recipe.py: error: row 3 is bad ({type(error).__name__})\n"
    with pytest.raises(SystemExit), input_errors_in_a_line(), checking_input():
        raise ValueError("'a\x1b[2Jcat'\nis bad")
    assert capsys.readouterr().err == "some_recipe.py: error: 'a [2Jcat'\nis bad (ValueError)\n"
    # A judge may also fail later.
    with pytest.raises(SystemExit), input_errors_in_a_line():
        raise JudgeFailedError("no answer")


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ValueError, match="in a step"), input_errors_in_a_line():
        raise ValueError("in a step")
    with pytest.raises(RuntimeError, match="a bug"), input_errors_in_a_line(), checking_input():
        raise RuntimeError("a bug")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["reasoning_t2i", "self_reflection"])
def test_a_recipe_prints_one_line(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "semantic_questions": 3, "quality_questions": []}\n')
    command = [sys.executable, ROOT / "recipes" / f"{recipe}.py", "--train_file", "bad.jsonl", "--output_dir", "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    message = "bad.jsonl, line 1: semantic_questions must be a list of questions, got int"
    assert result.stderr == f"{recipe}.py: error: {message} (ValueError)\n"
    assert not (tmp_path / "out").exists()
