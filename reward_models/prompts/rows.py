# SPDX-License-Identifier: Apache-2.0

"""Rows of a dataset that are read one at a time, with size limits for their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Image

from reward_models.files.image_decoding import EncodedImage, ImageLimits


class PromptRows(Sequence[dict[str, Any]]):
    """
    Rows of a dataset whose images are decoded when a row is read. All images at once may not fit into memory. Images are not
    trusted, so their size is checked before they are decoded.

    Args:
        dataset (`datasets.Dataset`): A dataset with any columns. A column `image` holds images.
        limits ([`ImageLimits`], *optional*): Size limits of images.
    """

    def __init__(self, dataset: Dataset, limits: ImageLimits | None = None) -> None:
        self.limits = limits or ImageLimits()
        has_images = isinstance(dataset.features.get("image"), Image)
        self._dataset = dataset.cast_column("image", Image(decode=False)) if has_images else dataset

    @property
    def undecoded(self) -> Dataset:
        """The dataset itself, whose images are not decoded."""
        return self._dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        Raises:
            `ValueError`: If the image of the row is too large, damaged, or in a format that is not decoded.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"there is no row {index} of {len(self)}")
        row = self._dataset[index]
        if row.get("image") is None:
            return row
        try:
            return {**row, "image": encoded_image(row["image"], self.limits).decode()}
        except (OSError, ValueError) as error:
            raise ValueError(f"row {index}: {error}") from error


def encoded_image(image: Mapping[str, Any], limits: ImageLimits) -> EncodedImage:
    """
    Read and check an image as `datasets.Image(decode=False)` returns it.

    Args:
        image (`Mapping[str, Any]`): The image, with `bytes` or with the `path` of a file.
        limits ([`ImageLimits`]): Size limits.

    Raises:
        `OSError`: If the file cannot be read.
        `ValueError`: If both are missing, if the image is too large, or if its format is not decoded.
    """
    data, path = image.get("bytes"), image.get("path")
    if data is None and path is None:
        raise ValueError("the image is missing")
    return EncodedImage.from_bytes(data if data is not None else Path(path).read_bytes(), limits)
