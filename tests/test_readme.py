# SPDX-License-Identifier: Apache-2.0

"""What the READMEs tell a reader to run: Python blocks are executed, and commands are read by the scripts that they call."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from trl import TrlParser

from recipe_tools.recipe_arguments import find_recipe, make_parser, read_settings
from recipe_tools.recipe_arguments import load_recipe as load_training_recipe
from support.laptop_commands import NOT_RUN, known_options, reason_not_to_run, script_arguments, script_of
from support.readme_commands import PAGES, PLACEHOLDERS, ROOT, all_snippets, blocks, filled_in, inline_code
from support.recipe_modules import load_recipe


COMMANDS = list(dict.fromkeys(command for snippet in all_snippets() for command in snippet.commands))
RAY = "recipes/ray_train.py"
SERVER = ("python", "-m", "reward_models.server")
RECIPES = sorted(f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.py"))
TRAINING = ("reasoning_t2i", "self_reflection")
ACCELERATE = {"--cpu", "--machine_rank", "--main_process_ip", "--main_process_port", "--multi_gpu", "--num_machines"}
ACCELERATE |= {"--num_processes"}


class Parsed(Exception):
    """Ends a script when its arguments are read."""


def cases(commands: Iterable[tuple[str, ...]]) -> list[ParameterSet]:
    return [pytest.param(command, id=" ".join(command)[:100]) for command in commands]


def expect_parsed(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a script raise [`Parsed`] once these arguments have become its settings."""
    parse = TrlParser.parse_args_and_config

    def parse_and_stop(self: TrlParser, args: list[str] | None = None, *rest: object, **options: object) -> None:
        raise Parsed(parse(self, args, *rest, **{**options, "fail_with_unknown_args": True}))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(TrlParser, "parse_args_and_config", parse_and_stop)
    monkeypatch.setattr(sys, "argv", list(arguments))


@pytest.mark.parametrize(
    "command", cases(c for c in COMMANDS if script_of(c) in RECIPES and script_of(c) != RAY and "--help" not in c)
)
def test_recipes_know_the_arguments_of_commands(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    expect_parsed([script_of(command), *script_arguments(command)], monkeypatch)
    with pytest.raises(Parsed):
        runpy.run_path(script_of(command), run_name="__main__")


@pytest.mark.parametrize("command", cases(c for c in COMMANDS if c[:3] == SERVER))
def test_the_server_knows_the_arguments_of_commands(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    expect_parsed(command[2:], monkeypatch)
    # Another test may have imported what is now run as a script.
    monkeypatch.delitem(sys.modules, "reward_models.server.__main__", raising=False)
    with pytest.raises(Parsed):
        runpy.run_module("reward_models.server", run_name="__main__")


@pytest.mark.parametrize("command", cases(c for c in COMMANDS if script_of(c) == RAY))
def test_the_launcher_on_ray_and_its_recipe_know_the_arguments_of_commands(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    ray_train = load_recipe("ray_train")
    translated, _ = ray_train.translate_flags(script_arguments(command))
    args, rest = make_parser([ray_train.RayArguments]).parse_args_into_dataclasses(
        translated, return_remaining_strings=True, look_for_args_file=False
    )
    settings = read_settings(load_training_recipe(find_recipe(args.recipe)), rest)
    assert args.num_workers > 1 and settings.task == "reasoning_t2i"


def test_every_command_is_run_or_listed_with_a_reason() -> None:
    assert len(COMMANDS) > 50
    for command in COMMANDS:
        is_run = command[0] == "pytest" or command[:3] == SERVER
        files = [script_of(command)] if script_of(command) else command[1:2] if command[0] == "bash" else []
        # A script that needs a GPU is here, but does not run.
        is_run |= any((ROOT / file).is_file() and Path(file).name != "gpu_check.py" for file in files)
        assert is_run != (reason_not_to_run(command) is not None), command
    for start in NOT_RUN:
        assert any(f"{' '.join(command)} ".startswith(f"{start} ") for command in COMMANDS), start


def test_placeholders_occur() -> None:
    codes = [code for page in PAGES for code in inline_code(page)]
    for placeholder in PLACEHOLDERS:
        assert any(placeholder in code for code in codes), placeholder


@pytest.mark.parametrize("page", PAGES)
def test_options_in_a_text_are_known_to_a_script(page: str) -> None:
    scripts = [*RECIPES, "reward_models/server/__main__.py"]
    known = {"--config", *ACCELERATE}.union(*(known_options(script) for script in scripts))
    for code in (code for code in inline_code(page) if code.startswith("--")):
        words = [word for word in shlex.split(filled_in(code)) if word != "..."]
        # OpenRLHF's options have dots.
        names = {word for word in words if word.startswith("--") and "." not in word}
        assert names <= known, code
        trains = [name for name in TRAINING if names <= known_options(f"recipes/{name}.py")]
        if names and trains and len(words) > len(names):
            # It has values, which must be of the right type.
            read_settings(load_training_recipe(find_recipe(trains[0])), words)


def test_tests_that_are_named_exist() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    names = [code for page in PAGES for code in inline_code(page) if re.fullmatch(r"test_\w+", code)]
    assert names
    for name in names:
        assert f"def {name}(" in sources, name


@pytest.mark.parametrize(
    ("page", "block"),
    [
        pytest.param(page, block, id=f"{page}: {number}")
        for page in PAGES
        for number, block in enumerate(blocks(page, "python"))
    ],
)
def test_python_blocks_run(page: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, page, "exec"), {"__name__": "__main__"})
