# SPDX-License-Identifier: Apache-2.0

"""PNG files: lossless, and complete or absent."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from alphagrpo_ext.files import atomic_path
from alphagrpo_ext.images import read_image


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG file atomically; see [`~alphagrpo_ext.files.atomic_path`]."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def load_image(path: str | Path) -> Image.Image:
    """
    Read a PNG file in RGB, and close it.

    Raises:
        `ValueError`: If there is no such file, or if it is damaged. The message names the file.
    """
    return read_image(path, formats=["PNG"])
