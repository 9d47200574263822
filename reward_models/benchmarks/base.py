# SPDX-License-Identifier: Apache-2.0

"""
The base class of public benchmarks, and their registry.

A benchmark reads its own prompts and writes images where its own scorer looks for them. Three rules hold for all of them:

- The folder of images holds nothing except the files that the scorer expects, because DPG-Bench's scorer reads every file as an
  image. Other files are beside the folder.
- A name from a downloaded benchmark becomes the name of a file only if it cannot lead out of the folder; see [`path_part`].
- Questions that are derived by rules ask what the benchmark checks, and nothing else.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from PIL import Image

from alphagrpo_ext.registry import Registry
from reward_models.files.image_decoding import EncodedImage
from reward_models.files.image_files import is_whole_image, load_image, save_image
from reward_models.prompts.questions import PromptRecord, Question


BENCHMARKS = Registry(
    "benchmark",
    "alphagrpo_ext.benchmarks",
    {
        "dpg_bench": "reward_models.benchmarks.dpg_bench:DPGBench",
        "gedit_bench": "reward_models.benchmarks.gedit_bench:GEditBench",
        "geneval": "reward_models.benchmarks.geneval:GenEval",
        "tiif_bench": "reward_models.benchmarks.tiif_bench:TIIFBench",
        "wise": "reward_models.benchmarks.wise:WISE",
    },
)


@dataclass(frozen=True)
class BenchmarkPrompt:
    """
    One prompt of a benchmark.

    Args:
        key (`str`):
            Unique key: the path of its images in the folder of the benchmark, with `/` between its parts.
        prompt (`str`):
            The prompt, or the instruction for editing.
        category (`str`):
            Category, as the benchmark names it.
        questions (`tuple[Question, ...]`, *optional*, defaults to `()`):
            Yes/no questions from the benchmark's own metadata.
        image ([`EncodedImage`], *optional*):
            The image to edit.
        original ([`EncodedImage`], *optional*):
            The image that the scorer compares an edited image with, if the benchmark has another one for it than `image`.
        metadata (`Mapping[str, Any]`, *optional*):
            The benchmark's own record, for a scorer that reads it.
    """

    key: str
    prompt: str
    category: str
    questions: tuple[Question, ...] = ()
    image: EncodedImage | None = None
    original: EncodedImage | None = None
    metadata: Mapping[str, Any] | None = None

    def record(self, questions: Mapping[str, PromptRecord]) -> PromptRecord | None:
        """
        Find the questions about the images of this prompt.

        Args:
            questions (`Mapping[str, PromptRecord]`): Records by prompt. They replace the benchmark's own questions.

        Returns:
            `PromptRecord`: `None` if there is no valid question.
        """
        record = questions.get(self.prompt) or PromptRecord(self.prompt, self.questions, ())
        return record if record.valid_semantic_questions or record.valid_quality_questions else None


class Benchmark(ABC):
    """
    Reads the prompts of a benchmark and writes images where its scorer looks for them. Register a subclass with
    `@BENCHMARKS.register("name")`.

    The default writes one file per image, at [`~Benchmark.image_path`].

    Args:
        model_label (`str`): Name of the model for the scorer, which is also the name of a folder.

    Raises:
        `ValueError`: If the label cannot be the name of a folder.
    """

    task: str = "reasoning_t2i"
    """Name of the policy's task in `TASKS`."""
    num_images: int = 1
    """Number of images per prompt in the benchmark's own protocol."""
    max_images: int | None = None
    """Most images per prompt that the scorer reads; `None` for any number."""

    def __init__(self, model_label: str) -> None:
        self.model_label = path_part(model_label, "model_label")

    @abstractmethod
    def prompts(self, source: str) -> Sequence[BenchmarkPrompt]:
        """
        Read the benchmark's prompts.

        Args:
            source (`str`): The file, folder or dataset of the prompts, as the benchmark publishes them.

        Raises:
            `FileNotFoundError`: If the source does not exist.
            `ValueError`: If a prompt is malformed or a key occurs twice. The message names the file and the line or field.
        """

    def texts(self, source: str) -> list[str]:
        """
        Read the texts of the benchmark's prompts without their images.

        Args:
            source (`str`): As in [`~Benchmark.prompts`].
        """
        return [prompt.prompt for prompt in self.prompts(source)]

    def check_image_size(self, height: int, width: int) -> None:  # noqa: B027
        """
        Check the size of the images before any of them is painted.

        Args:
            height, width (`int`): Size of an image, in pixels.

        Raises:
            `ValueError`: If the scorer cannot read images of this size. The default accepts every size.
        """

    def check_num_images(self, num_images: int) -> None:
        """
        Check the number of images per prompt before any of them is painted.

        Args:
            num_images (`int`): Number of images per prompt.

        Raises:
            `ValueError`: If the scorer does not read as many.
        """
        if self.max_images is not None and num_images > self.max_images:
            raise ValueError(
                f"the scorer of {type(self).__name__} reads at most {self.max_images} images per prompt, but --num_images is "
                f"{num_images}: give at most {self.max_images}"
            )

    @abstractmethod
    def image_path(self, prompt: BenchmarkPrompt, sample: int) -> str:
        """
        The path of an image, relative to the folder of the benchmark.

        Args:
            prompt ([`BenchmarkPrompt`]): The prompt.
            sample (`int`): Index of the image among the images of the prompt.

        Raises:
            `ValueError`: If the scorer does not read an image with this index.
        """

    def missing(self, folder: Path, prompt: BenchmarkPrompt, num_images: int) -> list[int]:
        """
        The indices of the images of a prompt that do not exist yet, or are damaged.

        Args:
            folder (`Path`): The folder of the benchmark.
            prompt ([`BenchmarkPrompt`]): The prompt.
            num_images (`int`): Number of images of the prompt.
        """
        return [i for i in range(num_images) if not is_whole_image(folder / self.image_path(prompt, i))]

    def save(self, folder: Path, prompt: BenchmarkPrompt, images: Mapping[int, Image.Image]) -> None:
        """
        Write images of a prompt, and other files that the scorer expects.

        Args:
            folder (`Path`): The folder of the benchmark.
            prompt ([`BenchmarkPrompt`]): The prompt.
            images (`Mapping[int, PIL.Image.Image]`): The images that were missing, by index.
        """
        for sample, image in images.items():
            save_image(image, folder / self.image_path(prompt, sample))

    def load(self, folder: Path, prompt: BenchmarkPrompt, num_images: int) -> list[Image.Image]:
        """Read the images of a prompt."""
        return [load_image(folder / self.image_path(prompt, i)) for i in range(num_images)]


def check_single_image(benchmark: str, sample: int) -> None:
    """
    Check the index of an image for a scorer that reads one image per prompt.

    Raises:
        `ValueError`: If it is not 0.
    """
    if sample:
        raise ValueError(f"{benchmark} takes one image per prompt, but image {sample + 1} was asked for")


def path_part(value: Any, where: str) -> str:
    """
    Check a name from a downloaded benchmark that is to be the name of a file or folder.

    Args:
        value (`Any`): A string or an integer.
        where (`str`): Name of the value for error messages.

    Raises:
        `ValueError`: If it is neither, if it is empty, or if it could lead out of the folder or hide the file.
    """
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(f"{where} must be a string or an integer, got {value!r}")
    name = str(value)
    if not name.strip() or name.startswith(".") or any(c in "/\\:\0" or not c.isprintable() for c in name):
        raise ValueError(f"{where} must be a name for a file, got {name!r}")
    return name


def text_field(row: Any, name: str, where: str) -> str:
    """
    Read a text from a benchmark's record, without surrounding blanks.

    Raises:
        `ValueError`: If it is missing, blank or not a string. The message names the field.
    """
    value = row.get(name) if isinstance(row, Mapping) else None
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: '{name}' must be a text, got {str(value)[:100]!r}")
    return value.strip()


def read_json_array(path: Path) -> Iterator[tuple[str, Any]]:
    """
    Read the entries of a JSON array.

    Yields:
        `tuple[str, Any]`: The name of the entry for error messages, and its value.

    Raises:
        `ValueError`: If the file is not a JSON array in UTF-8.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a JSON array, but holds {type(entries).__name__}")
    for index, entry in enumerate(entries):
        yield f"{path}, entry {index}", entry


def source_files(source: str, pattern: str) -> list[Path]:
    """
    List a file, or the files of a folder that match a pattern in any case, in alphabetical order.

    Raises:
        `FileNotFoundError`: If there are no files.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    found = path.iterdir() if path.is_dir() else ()
    files = sorted(file for file in found if fnmatchcase(file.name.lower(), pattern) and file.is_file())
    if not files:
        raise FileNotFoundError(f"there is no file {source}, nor a folder of that name with files {pattern}")
    return files


def checked_keys(prompts: Iterable[BenchmarkPrompt], source: str) -> list[BenchmarkPrompt]:
    """
    Check that there are prompts, and that no two of them have images in the same file.

    Raises:
        `ValueError`: If there are no prompts, or if a key occurs twice.
    """
    found: dict[str, BenchmarkPrompt] = {}
    for prompt in prompts:
        # Some file systems ignore case.
        if found.setdefault(prompt.key.casefold(), prompt) is not prompt:
            raise ValueError(f"{source}: two prompts have the key {prompt.key!r}")
    if not found:
        raise ValueError(f"{source} has no prompts")
    return list(found.values())
