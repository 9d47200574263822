# SPDX-License-Identifier: Apache-2.0

"""Judges answer yes/no questions about images: the contract, and one file per judge."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from reward_models.judges.base import JUDGES, Judge


if TYPE_CHECKING:
    from reward_models.judges.openai import OpenAIJudge
    from reward_models.judges.policy import PolicyJudge
    from reward_models.judges.server import ServerJudge
    from reward_models.judges.shapes import ShapesJudge
    from reward_models.judges.transformers import TransformersJudge


__all__ = ["JUDGES", "Judge", "OpenAIJudge", "PolicyJudge", "ServerJudge", "ShapesJudge", "TransformersJudge"]

# Imported when they are used, because each needs packages that the others do not.
_MODULES = {
    "OpenAIJudge": "openai",
    "PolicyJudge": "policy",
    "ServerJudge": "server",
    "ShapesJudge": "shapes",
    "TransformersJudge": "transformers",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
