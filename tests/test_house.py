# SPDX-License-Identifier: Apache-2.0

"""Rules of the house: who may import whom, and how names and functions are kept readable."""

from __future__ import annotations

import ast
import functools
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
SOURCES = ("alphagrpo_ext", "reward_models", "recipes")
# Data flows down this list, and a module imports only from its own place or from above.
LAYERS = (
    ("alphagrpo_ext.file_formats", "alphagrpo_ext.printable", "alphagrpo_ext.ranges"),
    ("alphagrpo_ext.images", "alphagrpo_ext.trajectory", "alphagrpo_ext.registry", "alphagrpo_ext.files"),
    ("alphagrpo_ext.messages", "alphagrpo_ext.image_rows"),
    ("alphagrpo_ext.flow", "alphagrpo_ext.reward_client"),
    ("alphagrpo_ext.models", "alphagrpo_ext.openrlhf"),
    ("alphagrpo_ext.rollout", "alphagrpo_ext.report"),
    ("alphagrpo_ext.objectives", "alphagrpo_ext.shapes"),
    ("alphagrpo_ext.trainer",),
    ("reward_models",),
    ("recipes", "recipe_tools", "benchmark_parts", "gpu_check_parts", "table_parts"),
)
LONGEST_FUNCTION = 60


@functools.cache
def modules() -> dict[str, tuple[Path, ast.Module]]:
    """Every source module by its dotted name; what lies beside recipes is named as recipes import it."""
    found = {}
    for source in SOURCES:
        for path in sorted((ROOT / source).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[0] == "recipes" and len(parts) > 2:
                parts = parts[1:]
            name = ".".join(parts).removesuffix(".__init__")
            found[name] = (path, ast.parse(path.read_text(encoding="utf-8")))
    return found


def imported_modules(name: str, tree: ast.Module) -> Iterator[str]:
    """Modules of the project that a module imports anywhere in its code, for type checkers too."""
    known = modules()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if modules()[name][0].name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                if full in known:
                    yield full
                elif base in known:
                    yield base


def layer(name: str) -> int | None:
    """Place of a module in [`LAYERS`]; `None` for the packages' own faces."""
    for place, packages in enumerate(LAYERS):
        if any(name == package or name.startswith(f"{package}.") for package in packages):
            return place
    return None


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, (_, tree) in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}.{node.name}", node


def test_nothing_imports_what_comes_later() -> None:
    wrong = []
    for name, (_, tree) in modules().items():
        own = layer(name)
        for imported in imported_modules(name, tree):
            other = layer(imported)
            if own is not None and other is not None and other > own:
                wrong.append(f"{name} imports {imported}")
    assert not wrong


def test_no_circle() -> None:
    graph = {name: set(imported_modules(name, tree)) - {name} for name, (_, tree) in modules().items()}
    # The face of a package hands names on, and its own modules do not go through it.
    for name in graph:
        graph[name] = {other for other in graph[name] if not name.startswith(f"{other}.")}
    while graph:
        leaves = [name for name, imports in graph.items() if not imports & graph.keys()]
        if not leaves:
            pytest.fail(f"these modules import each other in a circle, or one that does: {sorted(graph)}")
        for name in leaves:
            del graph[name]


def test_functions_are_short() -> None:
    """Without its docstring, a function is at most [`LONGEST_FUNCTION`] lines long."""
    long = {}
    for name, node in functions():
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
        if lines > LONGEST_FUNCTION:
            long[name] = lines
    assert not long


def test_no_public_name_is_defined_twice() -> None:
    places = defaultdict(list)
    for module, (path, tree) in modules().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names = [node.name]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            else:
                names = []
            for name in names:
                # Names that mean the same in every file: a script's entry and default file, a logger, a type variable.
                is_local = name.startswith("_") or name in ("main", "logger", "DEFAULT_CONFIG") or len(name) == 1
                if not is_local and path.name != "__init__.py":
                    places[name].append(module)
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_no_name_begins_with_of() -> None:
    wrong = []
    for module, (_, tree) in modules().items():
        for node in ast.walk(tree):
            names = [getattr(node, field, None) for field in ("id", "arg", "attr", "name")]
            wrong += [f"{module}: {name}" for name in names if isinstance(name, str) and name.startswith("of_")]
    assert not wrong


def test_folders_are_small() -> None:
    """A folder holds at most 14 modules, and the top of `reward_models/` at most six files."""
    sizes = Counter(path.parent.relative_to(ROOT).as_posix() for path, _ in modules().values())
    assert not {folder: size for folder, size in sizes.items() if size > 14}
    top = [path.name for path in (ROOT / "reward_models").iterdir() if path.is_file()]
    assert len(top) <= 6, sorted(top)


def test_every_file_names_its_licence() -> None:
    paths = [path for path, _ in modules().values()] + sorted((ROOT / "tests").rglob("*.py"))
    first_lines = {path: path.read_text(encoding="utf-8").split("\n", 1)[0] for path in paths}
    assert {
        path.name for path, line in first_lines.items() if line != "# SPDX-License-Identifier: Apache-2.0"
    } <= set()
