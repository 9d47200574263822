# SPDX-License-Identifier: Apache-2.0

"""
Recipes as modules: finding and importing one by name or path, reading its command line before anything is started, and its
`--help`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import inspect
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, get_args, get_type_hints

import yaml
from trl import TrlParser


RECIPES = Path(__file__).parents[1]
SECTIONS = {
    "PromptArguments.train_file": "Prompts",
    "PromptArguments.reward": "Reward",
    "RewardArguments.judge_max_failed_frac": "Reward",
    "JudgeArguments.judge": "Judge",
    "LikelihoodArguments.likelihood_scorer": "Likelihood reward",
    "HoldoutArguments.holdout_judge": "Hold-out judge",
    "_HoldoutJudgeArguments.holdout_judge_model": "Hold-out judge",
    "AlphaGRPOConfig.task": "Task and what is trained",
    "AlphaGRPOConfig.max_completion_length": "Rollout",
    "AlphaGRPOConfig.image_height": "Rollout",
    "AlphaGRPOConfig.num_reflection_rounds": "Self-reflection",
    "AlphaGRPOConfig.scale_rewards": "Objective",
    "AlphaGRPOConfig.epsilon_high": "Objective",
    "AlphaGRPOConfig.image_objective": "Objective",
    "AlphaGRPOConfig.per_device_train_batch_size": "Training",
    "AlphaGRPOConfig.disable_dropout": "Training",
    "AlphaGRPOConfig.generation_learning_rate": "Training",
    "PromptArguments.eval_seeds": "Evaluation",
    "AlphaGRPOConfig.eval_num_timesteps": "Evaluation",
    "PromptArguments.verbose_logs": "Report and console",
    "AlphaGRPOConfig.report": "Report and console",
}
"""
Fields at which a section of `--help` begins, with its title, in the order of sections. It reaches to the next of these fields in
the same class. Other classes have a section of their own.
"""
MOST_CHOICES = 6
"""Number of choices up to which `--help` names them beside the argument."""
UPSTREAM = ("trl", "transformers")
"""Packages whose own arguments `--help` leaves to `--help_all`."""


UPSTREAM_RECORDS = {
    # Written when Accelerate imports it on a machine without a GPU, whether it is used or not.
    "DeepSpeed": "Setting accelerator to CPU",
}
"""Messages of other libraries' loggers, by the names of the loggers, that nobody who runs a recipe can do anything about."""


class UnknownArgumentError(ValueError):
    """A command line or configuration names an argument that the recipe does not have."""


def silence_upstream() -> None:
    """Silence [`UPSTREAM_RECORDS`], and nothing else."""
    for name, text in UPSTREAM_RECORDS.items():
        logging.getLogger(name).addFilter(lambda record, text=text: text not in record.getMessage())


def find_recipe(name: str) -> Path:
    """
    Find the file of a recipe.

    Args:
        name (`str`): Name of a recipe in this repository, or a path that ends with `.py`.

    Raises:
        `ValueError`: If there is none; the message lists the recipes that train.
    """
    path = Path(name) if name.endswith(".py") else RECIPES / f"{name}.py"
    if not path.is_file():
        names = sorted(p.stem for p in RECIPES.glob("*.py") if "training_args: " in p.read_text(encoding="utf-8"))
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"there is no recipe {name!r}: {hint}There are {', '.join(names)}, and the path of any file")
    return path


def load_recipe(path: Path) -> ModuleType:
    """
    Import a recipe by its path.

    Raises:
        `ValueError`: If its `main` does not take a `TrainingArguments`, which means that it does not train.
    """
    from transformers import TrainingArguments

    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    # Annotations of its dataclasses are looked up by the name of their module.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not any(isinstance(kind, type) and issubclass(kind, TrainingArguments) for kind in argument_types(module)):
        raise ValueError(f"{path} does not train: its main must take an AlphaGRPOConfig or another TrainingArguments")
    return module


def argument_types(recipe: ModuleType) -> list[type]:
    """Dataclasses that a recipe's `main` takes, in their order."""
    hints = get_type_hints(recipe.main)
    hints.pop("return", None)
    return list(hints.values())


def make_parser(types: Sequence[type]) -> TrlParser:
    """Make a parser without abbreviations, which could be mistaken for other arguments."""
    return TrlParser(types, allow_abbrev=False)


def with_config(recipe: ModuleType, arguments: Sequence[str]) -> list[str]:
    """Add the recipe's default configuration to its command line if no configuration is named."""
    return _with_config(getattr(recipe, "DEFAULT_CONFIG", None), arguments)


def _with_config(default: Path | None, arguments: Iterable[str]) -> list[str]:
    """Write `--config=FILE` as two arguments, and begin with a default if no configuration is named."""
    parts = [a.split("=", 1) if a.startswith("--config=") else [a] for a in arguments]
    result = [argument for part in parts for argument in part]
    return result if "--config" in result or default is None else ["--config", str(default), *result]


def read_settings(recipe: ModuleType, arguments: Sequence[str], other_names: Iterable[str] = ()) -> argparse.Namespace:
    """
    Check names and types of a recipe's arguments. Whether the values fit together depends on the number of processes, so only
    the workers check that.

    Args:
        recipe (`ModuleType`): The recipe.
        arguments (`Sequence[str]`): Its command line.
        other_names (`Iterable[str]`): Names, without dashes, that "did you mean" may suggest beside the recipe's own.

    Raises:
        [`UnknownArgumentError`]: If an argument is unknown.
    """
    parser = make_parser(argument_types(recipe))
    rest = with_config(recipe, arguments)
    unknown = []
    if "--config" in rest:
        index = rest.index("--config")
        if index + 1 == len(rest):
            raise ValueError("--config takes the path of a YAML file")
        config = yaml.safe_load(Path(rest[index + 1]).read_text(encoding="utf-8"))
        config.pop("env", None)
        unknown = [part for part in parser.set_defaults_with_config(**config) if part.startswith("--")]
        del rest[index : index + 2]
    settings, others = parser.parse_known_args(rest)
    unknown += others
    if unknown:
        raise UnknownArgumentError(_describe_unknown(unknown[0], parser, other_names))
    return settings


def _describe_unknown(argument: str, parser: argparse.ArgumentParser, other_names: Iterable[str] = ()) -> str:
    known = [option for action in parser._actions for option in action.option_strings]
    known += ["--config", *(f"--{name}" for name in other_names)]
    close = difflib.get_close_matches(argument.partition("=")[0], known, n=1)
    hint = f"did you mean {close[0]}?" if close else "--help lists the arguments"
    return f"unknown argument {argument}: {hint}"


class RecipeParser(TrlParser):
    """
    Parser of a recipe's command line. Its `--help` shows what the recipe is for, example commands, and the recipe's own arguments
    by section. Arguments that TRL defines are shown by `--help_all`, and by `--help` if the configuration sets them.

    Args:
        types (`Sequence[type]`): Dataclasses to parse.
        doc (`str`, *optional*): Docstring of the recipe.
        default_config (`Path`, *optional*): Configuration of a command line that names none.
    """

    def __init__(self, types: Sequence[type], doc: str | None, default_config: Path | None = None) -> None:
        self.doc = inspect.cleandoc(doc or "")
        purpose = self.doc.partition("\n\n")[0]
        # An abbreviation could be mistaken for another argument, and the usage would be a page of names.
        usage = "%(prog)s [--config FILE] [--NAME VALUE ...]"
        super().__init__(types, allow_abbrev=False, usage=usage, description=purpose)
        self.default_config = default_config
        self.config: str | None = None
        self.config_values: dict[str, Any] = {}
        self.upstream = list(dict.fromkeys(kind.__name__ for t in types if (kind := _upstream_class(t))))
        if self.upstream:
            self.add_argument("--help_all", "--help-all", action=_ShowAll, help="Show all arguments and exit.")

    def parse_args_and_config(self, args: Iterable[str] | None = None, **options: Any) -> tuple[Any, ...]:
        """Parse as [`~trl.TrlParser`] does. An unknown argument ends the program with a suggestion."""
        silence_upstream()
        arguments = _with_config(self.default_config, sys.argv[1:] if args is None else args)
        if "--config" in arguments:
            self.config = next(iter(arguments[arguments.index("--config") + 1 :]), None)
            if self.config is None or not os.path.isfile(self.config):
                self.error(f"--config takes the path of a YAML file, and got {self.config or 'nothing'}")
        return super().parse_args_and_config(arguments, **options)

    def show_config(self, path: str) -> None:
        """Show the values of a configuration as defaults."""
        self.config = path
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        values.pop("env", None)
        self.set_defaults_with_config(**values)

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """Set defaults as [`~trl.TrlParser`] does. A name that is no argument ends the program with a suggestion."""
        unknown = super().set_defaults_with_config(**values)
        if unknown:
            self.error(f"{self.config}: {_describe_unknown(unknown[0], self)}")
        self.config_values = values
        return []

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as `argparse` does. An unknown argument ends the program, before any value is looked at."""
        settings, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(_describe_unknown(unknown[0], self))
        return settings, []

    def format_help(self) -> str:
        """Format what `--help` shows."""
        types = {f.name: f.type for kind in self.dataclass_types for f in fields(kind)}
        formatter = _SectionFormatter(self.prog, types, self.config_values)
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(_plain(self.doc))
        if self.config is not None:
            formatter.add_text(f"Values after 'here' are those of the configuration {os.path.relpath(self.config)}.")
        for title, actions in self._sections():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        if self.upstream:
            formatter.add_text(f"All options of {' and '.join(self.upstream)}: --help_all")
        return formatter.format_help()

    def format_all(self) -> str:
        """Format what `--help_all` shows: every argument."""
        return super().format_help()

    def _sections(self) -> list[tuple[str, list[argparse.Action]]]:
        """Titles and arguments of the sections of `--help`."""
        # The first one of a name; the other switches a flag off.
        actions = {action.dest: action for action in reversed(self._actions)}
        sections: dict[str, list[argparse.Action]] = {}
        own_titles = []
        for entry in (entry for kind in self.dataclass_types for entry in _declared(kind)):
            if entry.name in actions:
                sections.setdefault(entry.title, []).append(actions.pop(entry.name))
                own_titles += [entry.title] if entry.is_own else []
        # Those that no class of this project declares.
        rest = [action for name, action in actions.items() if name in self.config_values]
        titles = dict.fromkeys([*own_titles, *SECTIONS.values()])
        found = [(title, sections[title]) for title in titles if title in sections]
        configured = f"Of {' and '.join(self.upstream)}, what the configuration sets"
        return [*found, *([(configured, rest[::-1])] if rest else [])]


class _ShowAll(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: RecipeParser, *_: Any) -> None:
        print(parser.format_all(), end="")
        parser.exit()


class _SectionFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows an argument in one spelling, and where its default comes from."""

    def __init__(self, prog: str, types: dict[str, Any], config_values: dict[str, Any]) -> None:
        width = min(shutil.get_terminal_size().columns, 110) - 2
        super().__init__(prog, max_help_position=8, width=width)
        self.types = types
        self.config_values = config_values

    def _format_action_invocation(self, action: argparse.Action) -> str:
        hint = self.types[action.dest]
        members = get_args(hint) or (hint,)
        names = {float: "FLOAT", bool: "BOOL", int: "INT", str: "TEXT"}
        kind = next((name for member, name in names.items() if member in members), "TEXT")
        if action.choices and len(action.choices) <= MOST_CHOICES:
            kind = "{" + ",".join(map(str, action.choices)) + "}"
        suffix = {"+": f"{kind} ...", "*": f"[{kind} ...]", "?": f"[{kind}]"}.get(action.nargs, kind)
        return f"{action.option_strings[0]} {suffix}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.dest in self.config_values:
            return f"{text} (here: %(default)s)".strip()
        # A text says what an argument is that is not given, if that depends on others.
        return text if action.default in (None, []) else f"{text} (default: %(default)s)".strip()


def _plain(doc: str) -> str:
    """A docstring for a terminal: commands are indented instead of fenced."""
    lines, in_code = [], False
    for line in doc.splitlines():
        if line.startswith("```"):
            in_code = not in_code
        else:
            lines.append(f"    {line}" if in_code and line else line)
    return "\n".join(lines)


class _Declared(NamedTuple):
    title: str
    name: str
    is_own: bool


def _declared(kind: type) -> Iterable[_Declared]:
    """Sections and names of the arguments that this project's classes declare, those of a class before its bases'."""
    for owner in kind.__mro__:
        if owner.__module__.partition(".")[0] not in UPSTREAM and hasattr(owner, "__dataclass_fields__"):
            words = re.sub(r"(Arguments|Config)$", "", owner.__name__.lstrip("_"))
            own_title = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words).capitalize()
            section = None
            for name in inspect.get_annotations(owner):
                section = SECTIONS.get(f"{owner.__name__}.{name}", section)
                yield _Declared(section or own_title, name, is_own=section is None)


def _upstream_class(kind: type) -> type | None:
    return next((owner for owner in kind.__mro__ if owner.__module__.partition(".")[0] in UPSTREAM), None)
