# SPDX-License-Identifier: Apache-2.0

"""GEdit-Bench: instructions to edit photographs, in English and Chinese."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from alphagrpo_ext.images import file_content
from reward_models.benchmarks.base import (
    BENCHMARKS,
    Benchmark,
    BenchmarkPrompt,
    check_single_image,
    path_part,
    text_field,
)
from reward_models.files.image_decoding import EncodedImage
from reward_models.files.image_files import is_whole_image, save_image


_TEXTS = ("task_type", "instruction_language", "key", "instruction")
# What the model edits, and what the scorer compares with.
_IMAGES = ("input_image_raw", "input_image")


@BENCHMARKS.register("gedit_bench")
class GEditBench(Benchmark):
    """
    GEdit-Bench (https://huggingface.co/papers/2504.17761).

    Prompts are the dataset `stepfun-ai/GEdit-Bench` or a folder with its files, with the columns `task_type`, `key`,
    `instruction`, `instruction_language`, `input_image` and `input_image_raw`. Images are written as
    `GEdit-Bench/generate_image_example.py` of https://github.com/stepfun-ai/Step1X-Edit writes them and the scorer reads them:
    `<folder>/<model_label>/fullset/<task_type>/<instruction_language>/<key>.png`, one image per prompt. As there, the model edits
    `input_image_raw`, and `input_image` is the original for the scorer, `<key>_SRCIMG.png`. If there is only one of the two
    columns, it is both. The metadata has no questions. To score the images by questions, decompose the instructions.
    """

    task = "image_editing"
    max_images = 1

    def prompts(self, source: str) -> _GEditPrompts:
        try:
            dataset = load_dataset(source, split="train")
        except Exception as error:
            raise ValueError(
                f"{source} is neither a folder nor a dataset with a split 'train' that can be loaded: {error}"
            ) from error
        return _GEditPrompts(dataset, source)

    def texts(self, source: str) -> list[str]:
        return self.prompts(source).texts()

    def image_path(self, prompt: BenchmarkPrompt, sample: int) -> str:
        check_single_image("GEdit-Bench", sample)
        return f"{self.model_label}/fullset/{prompt.key}.png"

    def missing(self, folder: Path, prompt: BenchmarkPrompt, num_images: int) -> list[int]:
        # The original is written with the image.
        has_original = is_whole_image(self._original_path(folder, prompt))
        return super().missing(folder, prompt, num_images) if has_original else list(range(num_images))

    def save(self, folder: Path, prompt: BenchmarkPrompt, images: Mapping[int, Image.Image]) -> None:
        original = prompt.original or prompt.image
        save_image(original.decode(), self._original_path(folder, prompt))
        super().save(folder, prompt, images)

    def _original_path(self, folder: Path, prompt: BenchmarkPrompt) -> Path:
        return folder / self.model_label / "fullset" / f"{prompt.key}_SRCIMG.png"


class _GEditPrompts(Sequence[BenchmarkPrompt]):
    """The prompts. The image of a prompt is read with it, because all images at once may not fit into memory."""

    def __init__(self, dataset: Dataset, source: str) -> None:
        images = [name for name in _IMAGES if name in dataset.column_names]
        missing = [name for name in _TEXTS if name not in dataset.column_names] or (() if images else _IMAGES[:1])
        if missing:
            raise ValueError(f"{source} has no column '{missing[0]}'; its columns are {dataset.column_names}")
        columns = dataset.select_columns([*_TEXTS, *images])
        self._texts = columns.select_columns(list(_TEXTS))
        for name in images:
            columns = columns.cast_column(name, ImageFeature(decode=False))
        self._dataset = columns
        self._images = images
        self._source = source
        keys: set[str] = set()
        for index, row in enumerate(self._texts):
            key = self._key(row, index)
            if key.casefold() in keys:
                raise ValueError(f"{source}: two prompts have the key {key!r}")
            keys.add(key.casefold())
        if not keys:
            raise ValueError(f"{source} has no prompts")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> BenchmarkPrompt:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no prompt {index} of {len(self)}")
        row = self._dataset[index]
        images = []
        for name in self._images:
            try:
                images.append(EncodedImage.from_bytes(file_content(row[name] or {})))
            except (OSError, ValueError) as error:
                raise ValueError(f"{self._where(index)}: {name}: {error}") from error
        category = f"{row['task_type']}/{row['instruction_language']}"
        return BenchmarkPrompt(
            self._key(row, index), row["instruction"].strip(), category, image=images[0], original=images[-1]
        )

    def texts(self) -> list[str]:
        """The instructions. No image is read."""
        return [text.strip() for text in self._texts["instruction"]]

    def _key(self, row: Mapping[str, str], index: int) -> str:
        where = self._where(index)
        text_field(row, "instruction", where)
        return "/".join(path_part(row[name], f"{where}: {name}") for name in _TEXTS[:3])

    def _where(self, index: int) -> str:
        return f"{self._source}, row {index}"
