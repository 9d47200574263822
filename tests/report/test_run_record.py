# SPDX-License-Identifier: Apache-2.0

import subprocess
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from alphagrpo_ext.report.run_record import HIDDEN, describe_run, git_revision, is_secret


SECRET = "Vr7pLk2mQx9sTz4w"


@pytest.mark.parametrize("name", ["hub_token", "--judge-api-key", "password", "API_KEY", "apikey", "wandb.secret"])
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", ["include_num_input_tokens_seen", "max_new_tokens", "monkey", "keyboard", "task"])
def test_names_of_other_settings(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--hub_token", SECRET],
        [f"--hub-token={SECRET}"],
        ["--api_keys_of", "judge", "--api_key", SECRET, SECRET],
        ["--judge", f"http://me:{SECRET}@127.0.0.1:8000/v1"],
        ["--judge", f"http://127.0.0.1:8000/v1?a=1&api_key={SECRET}&b=2"],
        ["--model_init_kwargs", f'{{"token": "{SECRET}", "revision": "main"}}'],
        ["--headers", f"Authorization: Bearer {SECRET}"],
        [f"hf_{SECRET}"],
        [f"--x=sk-{SECRET}"],
    ],
    ids=" ".join,
)
def test_no_secret_of_the_command_line(arguments: list[str]) -> None:
    command = describe_run({}, (), ["train.py", *arguments, "--seed", "3"]).command
    assert SECRET not in command and HIDDEN in command
    assert command.startswith("train.py ") and command.endswith("--seed 3")


@pytest.mark.parametrize(
    "value",
    [
        {"token": SECRET},
        {"a": [{"api_key": SECRET}]},
        f"https://me:{SECRET}@host",
        [f"hf_{SECRET}"],
        {"token": [SECRET]},
    ],
    ids=str,
)
def test_no_secret_in_a_setting(value: Any) -> None:
    settings = describe_run({"model_init_kwargs": value, "hub_token": SECRET}, ("hub_token",), ["train.py"])
    assert settings.changed == {"hub_token": HIDDEN}
    assert SECRET not in settings.unchanged["model_init_kwargs"]


def test_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_NAME", SECRET)
    assert SECRET not in repr(describe_run({"task": "x"}, (), ["train.py"]))


def test_settings_are_as_somebody_would_write_them() -> None:
    class Choice(Enum):
        NO = "no"

    values = {"save": Choice.NO, "rate": 5e-5, "window": [0, 11], "token": None, "kwargs": {"a": None}, "flag": True}
    record = describe_run(values, ("rate", "flag"), ["recipes/my run.py", "--flag"])
    assert record.changed == {"rate": "5e-05", "flag": "True"}
    assert record.unchanged == {"save": "no", "window": "[0, 11]", "token": "None", "kwargs": '{"a": null}'}
    assert record.command == "'recipes/my run.py' --flag"
    assert {"Python", "torch", "transformers", "trl", "alphagrpo-ext"} <= record.versions.keys()


def test_revision_of_a_checkout(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    assert git_revision(script) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "train.py"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    revision = git_revision(script)
    assert revision is not None and len(revision) == 12
    assert describe_run({}, (), [str(script)]).versions["git revision of train.py"] == revision
    script.write_text("changed")
    assert git_revision(script) == f"{revision}-dirty"
    other = tmp_path / "installed.py"
    other.write_text("")
    assert git_revision(other) is None
