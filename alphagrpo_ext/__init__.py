# SPDX-License-Identifier: Apache-2.0

"""GRPO for unified multimodal models, text and image actions alike, as a plug-in for TRL and OpenRLHF."""

from importlib.metadata import PackageNotFoundError, version


try:
    __version__ = version("alphagrpo-ext")
except PackageNotFoundError:
    # A checkout that is imported without having been installed.
    __version__ = "unknown"
