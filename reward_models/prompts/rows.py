# SPDX-License-Identifier: Apache-2.0

"""Rows of a dataset that are read one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from alphagrpo_ext.image_rows import undecoded_images
from alphagrpo_ext.images import read_image


class PromptRows(Sequence[dict[str, Any]]):
    """
    Rows of a dataset whose images are decoded when a row is read. All images at once may not fit into memory.

    Args:
        dataset (`datasets.Dataset`): A dataset with any columns. A column `image` holds images or paths of images.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = undecoded_images(dataset)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        Raises:
            `ValueError`: If the image of the row cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"there is no row {index} of {len(self)}")
        row = self._dataset[index]
        if row.get("image") is None:
            return row
        try:
            return {**row, "image": read_image(row["image"])}
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error
