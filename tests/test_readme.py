# SPDX-License-Identifier: Apache-2.0

"""What the READMEs tell a reader to run: Python blocks are executed, and commands are read by the scripts that they call."""

import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from trl import TrlParser


ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "alphagrpo_ext/README.md",
        "alphagrpo_ext/models/README.md",
        "alphagrpo_ext/trainer/README.md",
        "reward_models/README.md",
        "recipes/README.md",
    )
]
# Placeholders for something that the reader has, with what stands for it in a test.
STANDINGS = {
    "--prompts FILE": "--prompts prompts.txt",
    "--config ...": "--config recipes/configs/reasoning_t2i_bagel.yaml",
    "--models ...": "--models bagel-shapes",
    "$seed": "0",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Commands in blocks and in inline code that call a script of this repository, with its arguments."""
    text = page.read_text(encoding="utf-8")
    code = [block.replace("\\\n", " ") for block in blocks(page, "bash")]
    code += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    found = []
    for line in (line for part in code for line in part.split("\n")):
        for command in re.split(r"&&|;| & ?$", line.split("   #")[0]):
            # A name alone, without a program before it, is a mention. The launcher on Ray passes arguments on to other recipes.
            is_command = re.search(r"(python|accelerate launch).* (recipes/\w+\.py|-m reward_models\.server)", command)
            if is_command and not re.search(r"NAME|ray_train|--help", command):
                for placeholder, value in STANDINGS.items():
                    command = command.replace(placeholder, value)
                found.append(command.removesuffix(" ...").strip().removeprefix("do ").strip())
    return found


CASES = [
    pytest.param(command, id=f"{page.relative_to(ROOT)}: {command[:60]}")
    for page in PAGES
    for command in commands(page)
]


class Parsed(Exception):
    """Ends a script when its arguments are read."""


@pytest.mark.parametrize("command", CASES)
def test_commands_have_arguments_that_their_scripts_know(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    is_server = "reward_models.server" in words
    place = (
        words.index("reward_models.server") if is_server else next(i for i, w in enumerate(words) if w.endswith(".py"))
    )
    parse = TrlParser.parse_args_and_config

    def parse_and_stop(self: TrlParser, args: list[str] | None = None, *rest, **options):
        raise Parsed(parse(self, args, *rest, **{**options, "fail_with_unknown_args": True}))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(TrlParser, "parse_args_and_config", parse_and_stop)
    monkeypatch.setattr(sys, "argv", words[place:])
    with pytest.raises(Parsed), contextlib.redirect_stderr(io.StringIO()):
        if is_server:
            # Another test may have imported what is now run as a script.
            monkeypatch.delitem(sys.modules, "reward_models.server.__main__", raising=False)
            runpy.run_module("reward_models.server", run_name="__main__")
        else:
            runpy.run_path(words[place], run_name="__main__")


def test_there_are_commands_to_check() -> None:
    assert len(CASES) > 15


@pytest.mark.parametrize(
    ("page", "block"),
    [
        pytest.param(page, block, id=f"{page.relative_to(ROOT)}: {number}")
        for page in PAGES
        for number, block in enumerate(blocks(page, "python"))
    ],
)
def test_python_blocks_run(page: Path, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(page), "exec"), {"__name__": "__main__"})
