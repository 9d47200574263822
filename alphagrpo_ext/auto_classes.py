# SPDX-License-Identifier: Apache-2.0

"""
Registration of the model families with Transformers' Auto classes, when an Auto class is first used.

A family registers its classes when its package is imported, which takes a second. So that `import alphagrpo_ext` stays
quick and Transformers need not be imported for it, `AutoConfig.from_pretrained` and `AutoProcessor.from_pretrained`
import the families in their first call. The other Auto classes go through one of these two.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import util
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


ENTRIES = {
    "transformers.models.auto.configuration_auto": "AutoConfig",
    "transformers.models.auto.processing_auto": "AutoProcessor",
}
"""Modules of Transformers, and the class in each whose first `from_pretrained` imports the families."""


class _EntryFinder(MetaPathFinder):
    """Finds the modules of [`ENTRIES`] as Python would, and prepares their classes once they are executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in ENTRIES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_prepare(module: ModuleType) -> None:
            execute(module)
            _prepare(module)

        spec.loader.exec_module = execute_and_prepare
        return spec


def register_when_imported() -> None:
    """Prepare the modules of [`ENTRIES`], those that are imported already and those that will be."""
    if not any(isinstance(finder, _EntryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _EntryFinder())
    for name in ENTRIES:
        if name in sys.modules:
            _prepare(sys.modules[name])


def _prepare(module: ModuleType) -> None:
    """Let the first `from_pretrained` of a module's Auto class import the families."""
    auto_class = getattr(module, ENTRIES[module.__name__])
    original = auto_class.__dict__["from_pretrained"]

    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        auto_class.from_pretrained = original
        # Here, because it imports Transformers.
        from alphagrpo_ext.models.contract import FAMILIES

        for name in FAMILIES.names():
            FAMILIES.get(name)
        return cls.from_pretrained(*args, **kwargs)

    auto_class.from_pretrained = classmethod(from_pretrained)
