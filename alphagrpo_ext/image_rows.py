# SPDX-License-Identifier: Apache-2.0

"""Images in the rows of datasets: a column that is decoded by the project's reader, and a first pass that finds broken ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, IterableDataset
from PIL import Image as PILImage
from tqdm import tqdm

from alphagrpo_ext.images import check_image, read_image


_NUM_NAMED = 10
# The files of a chunk may be in memory at once.
_CHUNK_SIZE = 32
# Files that were checked before in this process, by path, size and time of change.
_checked_files: set[tuple[str, int, int]] = set()


@dataclass
class RowImage(Image):
    """A column of images that [`read_image`] decodes: upright, opaque and in RGB. It is saved as `datasets.Image`."""

    def decode_example(self, value: Any, token_per_repo_id: dict[str, str | bool | None] | None = None) -> Any:
        return read_image(value)


def undecoded_images(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The dataset with a column `image`, if it is one of images, as `{"bytes", "path"}`, which [`read_image`] takes."""
    if isinstance((dataset.features or {}).get("image"), Image):
        return dataset.cast_column("image", Image(decode=False))
    return dataset


def refuse_images_column(columns: Any, where: str) -> None:
    """
    Refuse the column `images` of TRL's datasets for vision-language models.

    Args:
        columns (`Iterable[str]`, *optional*): Names of the columns, if they are known.
        where (`str`): Name of the dataset for the message.

    Raises:
        `ValueError`: If the column is there.
    """
    if "images" in (columns or ()):
        raise ValueError(
            f"{where} has a column 'images', which would be ignored: a row has one image, in the column 'image'. Rename the "
            f"column and give one image instead of a list, or remove it"
        )


def broken_images(dataset: Dataset) -> dict[int, str]:
    """
    Check the image of every row of a dataset; see [`check_image`]. A file is checked once per process.

    The images are checked by several threads, and a pass of more than a few seconds shows its progress. 1,000 JPEG
    photographs of 12 megapixels take two to four minutes of one core, as PNG half a minute.

    Args:
        dataset (`datasets.Dataset`): Rows with a column `image`; without it nothing is broken.

    Returns:
        `dict[int, str]`: What is broken, by row.
    """
    if "image" not in dataset.column_names:
        return {}
    rows = undecoded_images(dataset.select_columns("image"))
    # Processes on one machine share its cores.
    num_threads = max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    broken: dict[int, str] = {}
    with (
        ThreadPoolExecutor(num_threads) as pool,
        tqdm(total=len(rows), desc="checking images", unit="image", delay=3, leave=False) as progress,
    ):
        for start in range(0, len(rows), _CHUNK_SIZE):
            images = rows[start : start + _CHUNK_SIZE]["image"]
            for index, fault in enumerate(pool.map(_fault, images), start):
                if fault is not None:
                    broken[index] = fault
            progress.update(len(images))
    return broken


def refuse_broken_images(faults: Sequence[str], advice: str) -> None:
    """
    Raise an error that names the first rows with a broken image.

    Args:
        faults (`Sequence[str]`): What is broken, each with the name of its row.
        advice (`str`): What to do.

    Raises:
        `ValueError`: If there are any.
    """
    if len(faults) == 1:
        raise ValueError(f"{faults[0]}. {advice}")
    if faults:
        more = f"; and {len(faults) - _NUM_NAMED} more" if len(faults) > _NUM_NAMED else ""
        raise ValueError(
            f"the images of {len(faults)} rows cannot be read: {'; '.join(faults[:_NUM_NAMED])}{more}. {advice}"
        )


def _fault(image: Any) -> str | None:
    """What is broken about an image; `None` for a good one and for none."""
    if image is None:
        return None
    key = _file_key(image)
    if key in _checked_files:
        return None
    try:
        check_image(image)
    except ValueError as error:
        return str(error)
    if key is not None:
        _checked_files.add(key)
    return None


def _file_key(image: Any) -> tuple[str, int, int] | None:
    path = image.get("path") if isinstance(image, Mapping) and image.get("bytes") is None else image
    if isinstance(path, PILImage.Image) or not isinstance(path, str | Path):
        return None
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return str(path), stat.st_size, stat.st_mtime_ns
