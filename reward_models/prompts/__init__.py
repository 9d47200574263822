# SPDX-License-Identifier: Apache-2.0

"""
Prompts with their questions: records, rows of a dataset, and loading from files and datasets.

Names are imported when they are first used, so that records can be read without importing `datasets`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from reward_models.prompts.loading import load_prompts, read_prompts
    from reward_models.prompts.rows import PromptRows


__all__ = ["PromptRows", "load_prompts", "read_prompts"]

_MODULES = {"PromptRows": "rows", "load_prompts": "loading", "read_prompts": "loading"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
