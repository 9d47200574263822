# SPDX-License-Identifier: Apache-2.0

"""DPG-Bench: long, detailed prompts, scored by a visual question answering model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from reward_models.benchmarks.base import (
    BENCHMARKS,
    Benchmark,
    BenchmarkPrompt,
    checked_keys,
    path_part,
    source_files,
    text_field,
)
from reward_models.files.image_files import is_whole_image, load_image, save_image
from reward_models.prompts.files import read_one_prompt
from reward_models.prompts.questions import Question
from reward_models.prompts.tables import read_texts


CSV_NAME = "dpg_bench.csv"
_BROAD_TAGS = {"entity": "Existence", "attribute": "Attribute", "relation": "Spatial", "global": "Style"}
_DETAILED_TAGS = {"count": "Count", "text": "Text", "non-spatial": "Action"}


@BENCHMARKS.register("dpg_bench")
class DPGBench(Benchmark):
    """
    DPG-Bench (https://huggingface.co/papers/2403.05135).

    Prompts are the folder `dpg_bench/prompts` of https://github.com/TencentQQGYLab/ELLA, with one text file per prompt, or the
    column `text` of the file `dpg_bench/dpg_bench.csv`. A folder that holds `dpg_bench/prompts` or `prompts` stands for that
    folder. Questions are read from the file, with the columns `item_id`, `category_broad`, `category_detailed` and
    `question_natural_language`; for a folder of prompts, the file is expected beside the folder. The benchmark scores a question
    only if the questions in its column `dependency` are answered yes. DVReward has no such dependencies, so they are ignored.

    The images of a prompt are tiles of one file `<folder>/<item_id>.png`, as `compute_dpg_bench.py` reads them: two rows of two,
    row by row. Its `--resolution` is the side of a tile, so images must be square, and its `--pic-num` is the number of images.
    """

    num_images = 4
    max_images = 4

    def prompts(self, source: str) -> list[BenchmarkPrompt]:
        path = _source_path(Path(source))
        if path.suffix.lower() == ".csv" and not path.is_dir():
            texts, questions = _read_csv(path)
            if missing := [key for key in questions if key not in texts]:
                raise ValueError(f"{path}: the column 'text' is blank in all rows of the items {missing[:20]}")
        else:
            files = source_files(str(path), "*.txt")
            texts = {file.stem: _read_text(file) for file in files}
            table = files[0].parent.parent / CSV_NAME
            questions = _read_csv(table)[1] if table.is_file() else {}
        return checked_keys(
            (
                BenchmarkPrompt(path_part(key, f"{source}: item_id"), text, "all", tuple(questions.get(key, ())))
                for key, text in texts.items()
            ),
            source,
        )

    def check_image_size(self, height: int, width: int) -> None:
        if height != width:
            raise ValueError(
                f"DPG-Bench's scorer cuts square tiles, but the images are {height} pixels high and {width} wide: give the same "
                "--height and --width"
            )

    def image_path(self, prompt: BenchmarkPrompt, sample: int) -> str:
        return f"{prompt.key}.png"

    def missing(self, folder: Path, prompt: BenchmarkPrompt, num_images: int) -> list[int]:
        # All images of a prompt are in one file.
        return [] if is_whole_image(folder / self.image_path(prompt, 0)) else list(range(num_images))

    def save(self, folder: Path, prompt: BenchmarkPrompt, images: Mapping[int, Image.Image]) -> None:
        for image in images.values():
            self.check_image_size(image.height, image.width)
        save_image(tile([images[i] for i in sorted(images)]), folder / self.image_path(prompt, 0))

    def load(self, folder: Path, prompt: BenchmarkPrompt, num_images: int) -> list[Image.Image]:
        return untile(load_image(folder / self.image_path(prompt, 0)), num_images)


def tile(images: Sequence[Image.Image]) -> Image.Image:
    """
    Put images of equal size into one image, two per row. A single image is returned unchanged.

    Raises:
        `ValueError`: If there are more than four images, which the scorer does not read, or if their sizes differ.
    """
    if len({image.size for image in images}) > 1:
        raise ValueError(f"images of one prompt must have the same size, but have {[image.size for image in images]}")
    if len(images) > 4:
        raise ValueError(f"DPG-Bench takes at most 4 images per prompt, but num_images is {len(images)}")
    width, height = images[0].size
    columns, rows = _layout(len(images))
    sheet = Image.new("RGB", (columns * width, rows * height))
    for place, image in enumerate(images):
        sheet.paste(image, (place % columns * width, place // columns * height))
    return sheet


def untile(sheet: Image.Image, num_images: int) -> list[Image.Image]:
    """Cut an image that [`tile`] made into its tiles."""
    columns, rows = _layout(num_images)
    width, height = sheet.width // columns, sheet.height // rows
    corners = [(place % columns * width, place // columns * height) for place in range(num_images)]
    return [sheet.crop((left, top, left + width, top + height)) for left, top in corners]


def _layout(num_images: int) -> tuple[int, int]:
    """Number of columns and rows."""
    return min(num_images, 2), (num_images + 1) // 2


def _source_path(path: Path) -> Path:
    """The folder of prompts, if a folder above it is given, or the file or folder itself."""
    if path.is_file() and path.suffix.lower() not in (".csv", ".txt"):
        raise ValueError(f"{path}: DPG-Bench's prompts are {CSV_NAME}, or a folder of files *.txt or one of them")
    # The repository has files *.txt, too, which are no prompts.
    folders = (path / "dpg_bench" / "prompts", path / "prompts")
    return next((folder for folder in folders if folder.is_dir()), path)


def _read_text(path: Path) -> str:
    text = read_one_prompt(path).strip()
    if not text:
        raise ValueError(f"{path} has no prompt")
    return text


def _read_csv(path: Path) -> tuple[dict[str, str], dict[str, list[Question]]]:
    """Read prompts and questions, by item."""
    texts: dict[str, str] = {}
    questions: dict[str, list[Question]] = {}
    for place, row in read_texts(path):
        where = f"{place}, item {row.get('item_id')!r}"
        key = text_field(row, "item_id", where)
        if text := row.get("text"):
            texts.setdefault(key, text)
        question = Question(text_field(row, "question_natural_language", where), _tag(row))
        questions.setdefault(key, []).append(question)
    return texts, questions


def _tag(row: Mapping[str, str | None]) -> str:
    broad, detailed = ((row.get(f"category_{name}") or "").lower() for name in ("broad", "detailed"))
    return _DETAILED_TAGS.get(detailed) or _BROAD_TAGS.get(broad, "Attribute")
