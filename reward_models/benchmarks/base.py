# SPDX-License-Identifier: Apache-2.0

"""The contract of benchmarks whose own scorers are run on a folder of images, and the registry that names them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from alphagrpo_ext.registry import Registry
from reward_models.files.image_decoding import EncodedImage
from reward_models.files.image_files import load_image, save_image
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
    One request of a benchmark.

    Args:
        key (`str`):
            What tells it from the others: the place of its images in the benchmark's folder, `/` between its parts.
        prompt (`str`):
            The request, or for editing the instruction.
        category (`str`):
            Category in the benchmark's own terms.
        questions (`tuple[Question, ...]`, *optional*, defaults to `()`):
            Yes/no questions of the benchmark's own metadata.
        image ([`EncodedImage`], *optional*):
            What is to be edited.
        metadata (`Mapping[str, Any]`, *optional*):
            The benchmark's own record, for a scorer that reads it beside the images.
    """

    key: str
    prompt: str
    category: str
    questions: tuple[Question, ...] = ()
    image: EncodedImage | None = None
    metadata: Mapping[str, Any] | None = None

    def record(self, questions: Mapping[str, PromptRecord]) -> PromptRecord | None:
        """
        The questions about its images.

        Args:
            questions (`Mapping[str, PromptRecord]`): Records by prompt, which go before the benchmark's own questions.

        Returns:
            `PromptRecord`: `None` if there is no question that counts.
        """
        record = questions.get(self.prompt) or PromptRecord(self.prompt, self.questions, ())
        return record if record.valid_semantic_questions or record.valid_quality_questions else None


class Benchmark(ABC):
    """
    Reads a benchmark's prompts and writes images where its scorer looks for them. Register one with
    `@BENCHMARKS.register("name")`.

    The default writes one file an image, at [`~Benchmark.image_path`].

    Args:
        model_label (`str`): How the scorer is to call the model; the name of a folder.

    Raises:
        `ValueError`: If the label is no name of a folder.
    """

    task: str = "reasoning_t2i"
    """Name in `TASKS` of what the policy is asked to do."""
    num_images: int = 1
    """Images of a prompt that the benchmark's own protocol asks for."""

    def __init__(self, model_label: str) -> None:
        self.model_label = path_part(model_label, "model_label")

    @abstractmethod
    def prompts(self, source: str) -> Sequence[BenchmarkPrompt]:
        """
        Read the benchmark's prompts.

        Args:
            source (`str`): The file, folder or dataset in which the benchmark publishes them.

        Raises:
            `FileNotFoundError`: If there is nothing.
            `ValueError`: If a prompt is malformed or a key occurs twice. The message names the file and the line or field.
        """

    @abstractmethod
    def image_path(self, prompt: BenchmarkPrompt, sample: int) -> str:
        """
        Path of an image, seen from the benchmark's folder.

        Args:
            prompt ([`BenchmarkPrompt`]): The prompt.
            sample (`int`): Which of its images.
        """

    def missing(self, folder: Path, prompt: BenchmarkPrompt, num_images: int) -> list[int]:
        """
        Which images of a prompt are still to be painted.

        Args:
            folder (`Path`): The benchmark's folder.
            prompt ([`BenchmarkPrompt`]): The prompt.
            num_images (`int`): Images that it is to have.
        """
        return [i for i in range(num_images) if not (folder / self.image_path(prompt, i)).exists()]

    def save(self, folder: Path, prompt: BenchmarkPrompt, images: Mapping[int, Image.Image]) -> None:
        """
        Write images of a prompt, and what the scorer wants beside them.

        Args:
            folder (`Path`): The benchmark's folder.
            prompt ([`BenchmarkPrompt`]): The prompt.
            images (`Mapping[int, PIL.Image.Image]`): Those that were missing, by their number.
        """
        for sample, image in images.items():
            save_image(image, folder / self.image_path(prompt, sample))

    def load(self, folder: Path, prompt: BenchmarkPrompt, num_images: int) -> list[Image.Image]:
        """The images of a prompt, as they were painted."""
        return [load_image(folder / self.image_path(prompt, i)) for i in range(num_images)]


def path_part(value: Any, where: str) -> str:
    """
    A name that may become a file's or a folder's. It comes with a downloaded benchmark, and must not lead out of the folder.

    Args:
        value (`Any`): A string or an integer.
        where (`str`): How an error message calls it.

    Raises:
        `ValueError`: If it is neither, empty, or has what separates or hides folders.
    """
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(f"{where} must be a string or an integer, got {value!r}")
    name = str(value)
    if not name.strip() or name.startswith(".") or any(c in "/\\:\0" or not c.isprintable() for c in name):
        raise ValueError(f"{where} must be a name for a file, got {name!r}")
    return name


def text_field(row: Any, name: str, where: str) -> str:
    """
    A text of a benchmark's record, without surrounding blanks.

    Raises:
        `ValueError`: If it is missing, blank or no string; the message names it.
    """
    value = row.get(name) if isinstance(row, Mapping) else None
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: '{name}' must be a text, got {str(value)[:100]!r}")
    return value.strip()


def read_json_array(path: Path) -> Iterator[tuple[str, Any]]:
    """
    Read the entries of a JSON array.

    Yields:
        `tuple[str, Any]`: How an error message calls the entry, and its value.

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
    A file, or the files of a folder that fit a pattern, in alphabetical order.

    Raises:
        `FileNotFoundError`: If there is none.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    files = sorted(file for file in path.glob(pattern) if file.is_file())
    if not files:
        raise FileNotFoundError(f"there is no file {source}, nor a folder of that name with files {pattern}")
    return files


def checked_keys(prompts: Iterable[BenchmarkPrompt], source: str) -> list[BenchmarkPrompt]:
    """
    The prompts, if there are any and no two would write to the same file.

    Raises:
        `ValueError`: If there is none, or a key occurs twice.
    """
    found: dict[str, BenchmarkPrompt] = {}
    for prompt in prompts:
        # As a file system that ignores case would see it.
        if found.setdefault(prompt.key.casefold(), prompt) is not prompt:
            raise ValueError(f"{source}: two prompts have the key {prompt.key!r}")
    if not found:
        raise ValueError(f"{source} has no prompts")
    return list(found.values())
