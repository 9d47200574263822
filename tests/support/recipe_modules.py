# SPDX-License-Identifier: Apache-2.0

"""Runs recipes in the process of the tests, which costs no imports of its own."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from trl import TrlParser


ROOT = Path(__file__).parents[2]


def load_recipe(name: str) -> ModuleType:
    """`recipes/<name>.py` as a module."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look up their annotations.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_recipe(recipe: ModuleType, arguments: type, *options: str | Path) -> None:
    """Parse options as its command line does, and run it."""
    (parsed,) = TrlParser((arguments,)).parse_args_and_config([str(option) for option in options])
    recipe.main(parsed)
