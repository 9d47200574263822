# Copyright 2026 The AlphaGRPO-Ext Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Runs recipes in the process of the tests, which costs no imports of its own."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from trl import TrlParser


ROOT = Path(__file__).parents[1]


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
