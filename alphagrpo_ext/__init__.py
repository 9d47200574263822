# SPDX-License-Identifier: Apache-2.0

"""
GRPO for unified multimodal models, text and image actions alike, as a plug-in for TRL and OpenRLHF.

`pipeline` paints with a policy. Importing this package registers the model families with Transformers' Auto classes as
soon as those are imported, and imports nothing heavy itself.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from alphagrpo_ext import auto_classes


if TYPE_CHECKING:
    from alphagrpo_ext.rollout.pipeline import UnifiedPipeline, pipeline


try:
    __version__ = version("alphagrpo-ext")
except PackageNotFoundError:
    # A checkout that is imported without having been installed.
    __version__ = "unknown"

__all__ = ["UnifiedPipeline", "__version__", "pipeline"]

auto_classes.register_when_imported()


def __getattr__(name: str) -> Any:
    if name not in ("UnifiedPipeline", "pipeline"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("alphagrpo_ext.rollout.pipeline"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
