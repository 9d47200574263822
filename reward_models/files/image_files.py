# SPDX-License-Identifier: Apache-2.0

"""Pictures to PNG files and back: whole or not at all, and with nothing lost."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image


def save_image(image: Image.Image, path: Path) -> None:
    """
    Write a PNG file. It appears when it is complete.

    Args:
        image (`PIL.Image.Image`): The image.
        path (`Path`): The file. Its folder is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    image.save(temporary, format="PNG")
    os.replace(temporary, path)


def load_image(path: str | Path) -> Image.Image:
    """An image that [`save_image`] wrote, with its file closed."""
    with Image.open(path, formats=["PNG"]) as image:
        image.load()
        return image.copy()
