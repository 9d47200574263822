# SPDX-License-Identifier: Apache-2.0

"""PNG files: lossless, and complete or absent."""

from __future__ import annotations

import logging
from pathlib import Path

from PIL import Image

from alphagrpo_ext.files import atomic_path
from alphagrpo_ext.images import check_image, read_image


logger = logging.getLogger(__name__)


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG file atomically; see [`~alphagrpo_ext.files.atomic_path`]."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def is_whole_image(path: Path) -> bool:
    """Whether a file that an earlier run wrote exists and can be read. If it is damaged, a warning names it."""
    if not path.exists():
        return False
    try:
        check_image(path)
    except ValueError as error:
        logger.warning("%s. It is made again.", error)
        return False
    return True


def load_image(path: str | Path) -> Image.Image:
    """
    Read a PNG file in RGB, and close it.

    Raises:
        `ValueError`: If there is no such file, or if it is damaged. The message names the file.
    """
    return read_image(path, formats=["PNG"])
