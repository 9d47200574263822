# SPDX-License-Identifier: Apache-2.0

"""
The TRL trainer of unified multimodal models.

Names are imported when they are first used, so that a command line can be parsed without importing the trainer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from alphagrpo_ext.trainer.config import AlphaGRPOConfig
    from alphagrpo_ext.trainer.trainer import AlphaGRPOTrainer


__all__ = ["AlphaGRPOConfig", "AlphaGRPOTrainer"]

_MODULES = {"AlphaGRPOConfig": "config", "AlphaGRPOTrainer": "trainer"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
