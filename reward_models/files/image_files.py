# SPDX-License-Identifier: Apache-2.0

"""PNG files: lossless, and complete or absent."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from alphagrpo_ext.files import atomic_path


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG file atomically; see [`~alphagrpo_ext.files.atomic_path`]."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def load_image(path: str | Path) -> Image.Image:
    """Read a file that [`save_image`] wrote, and close it."""
    with Image.open(path, formats=["PNG"]) as image:
        image.load()
        return image.copy()
