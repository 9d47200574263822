# SPDX-License-Identifier: Apache-2.0

"""Recipes as modules: finding and importing one by name or path, and checking its command line before anything is started."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import yaml
from trl import TrlParser


RECIPES = Path(__file__).parents[1]


class UnknownArgumentError(ValueError):
    """A command line or configuration names an argument that the recipe does not have."""


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
    default = getattr(recipe, "DEFAULT_CONFIG", None)
    return list(arguments) if "--config" in arguments or default is None else ["--config", str(default), *arguments]


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
        known = [option for action in parser._actions for option in action.option_strings]
        known += [f"--{name}" for name in other_names]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        hint = f"did you mean {close[0]}?" if close else "--help lists all arguments"
        raise UnknownArgumentError(f"unknown argument {unknown[0]}: {hint}")
    return settings
