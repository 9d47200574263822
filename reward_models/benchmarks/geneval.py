# SPDX-License-Identifier: Apache-2.0

"""GenEval: objects, counts, colors and positions, scored by an object detector."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from alphagrpo_ext.files import read_json_lines, write_text
from reward_models.benchmarks.base import (
    BENCHMARKS,
    Benchmark,
    BenchmarkPrompt,
    checked_keys,
    source_files,
    text_field,
)
from reward_models.prompts.questions import Question


NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
POSITIONS = ("left of", "right of", "above", "below")


@BENCHMARKS.register("geneval")
class GenEval(Benchmark):
    """
    GenEval (https://huggingface.co/papers/2310.11513).

    Prompts are `prompts/evaluation_metadata.jsonl` of https://github.com/djghosh13/geneval; `prompts/create_prompts.py` defines
    its fields. Images are written as `generation/diffusers_generate.py` writes them and `evaluation/evaluate_images.py` reads
    them: `<folder>/00000/metadata.jsonl`, `<folder>/00000/samples/00000.png` and so on, four images per prompt. Questions are
    derived from `include` and `exclude`; see [`geneval_questions`].
    """

    num_images = 4

    def prompts(self, source: str) -> list[BenchmarkPrompt]:
        (path,) = source_files(source, "evaluation_metadata.jsonl")
        prompts = []
        for index, (where, row) in enumerate(read_json_lines(path)):
            prompt, tag = text_field(row, "prompt", where), text_field(row, "tag", where)
            questions = geneval_questions(row, where)
            prompts.append(BenchmarkPrompt(f"{index:05d}", prompt, tag, questions, metadata=row))
        return checked_keys(prompts, source)

    def image_path(self, prompt: BenchmarkPrompt, sample: int) -> str:
        return f"{prompt.key}/samples/{sample:05d}.png"

    def save(self, folder: Path, prompt: BenchmarkPrompt, images: Mapping[int, Image.Image]) -> None:
        write_text(folder / prompt.key / "metadata.jsonl", json.dumps(prompt.metadata) + "\n")
        super().save(folder, prompt, images)


def geneval_questions(row: Mapping[str, Any], where: str) -> tuple[Question, ...]:
    """
    Derive questions that ask what GenEval's detector checks: everything in `include` is there, and nothing in `exclude` is.

    A count is asked as "exactly two" only if `exclude` rules out three; otherwise as "at least two".

    Args:
        row (`Mapping[str, Any]`):
            Row with `include` and `exclude`, lists of `{"class": str, "count": int, "color": str?, "position": [str, int]?}`.
            A position is relative to the entry of `include` with that index.
        where (`str`): Name of the row for error messages.

    Raises:
        `ValueError`: If an entry is malformed. The message names the entry.
    """
    includes, excludes = (_entries(row, field, where) for field in ("include", "exclude"))
    limits = {(entry["class"], entry["count"]) for entry in excludes}
    exact = {(entry["class"], entry["count"] + 1) for entry in includes} & limits
    questions = []
    for entry in includes:
        name, count = entry["class"], entry["count"]
        if (name, count + 1) in exact:
            verb, counted = ("Is", name) if count == 1 else ("Are", _plural(name))
            questions.append(Question(f"{verb} there exactly {_number(count)} {counted}?", "Count"))
        elif count == 1:
            questions.append(Question(f"Is there {_with_article(name)}?", "Existence"))
        else:
            questions.append(Question(f"Are there at least {_number(count)} {_plural(name)}?", "Count"))
        subject = f"Is the {name}" if count == 1 else f"Are the {_plural(name)}"
        if "color" in entry:
            questions.append(Question(f"{subject} {entry['color']}?", "Attribute"))
        if "position" in entry:
            position, target = entry["position"]
            questions.append(Question(f"{subject} {position} the {includes[target]['class']}?", "Spatial"))
    for entry in excludes:
        name, count = entry["class"], entry["count"]
        if (name, count) in exact:
            continue
        if count == 1:
            questions.append(Question(f"Is the image free of {_plural(name)}?", "Negative"))
        else:
            questions.append(Question(f"Are there fewer than {_number(count)} {_plural(name)}?", "Count"))
    return tuple(questions)


def _entries(row: Mapping[str, Any], field: str, where: str) -> list[dict[str, Any]]:
    entries = row.get(field, [])
    if not isinstance(entries, list):
        raise ValueError(f"{where}: '{field}' must be a list, got {entries!r}")
    for index, entry in enumerate(entries):
        name = f"{where}: {field}[{index}]"
        text_field(entry, "class", name)
        if not isinstance(entry.get("count"), int) or entry["count"] < 1:
            raise ValueError(f"{name}: 'count' must be a positive integer, got {entry.get('count')!r}")
        if "color" in entry:
            text_field(entry, "color", name)
        if "position" in entry:
            _check_position(entry["position"], len(row.get("include", [])), name)
    return entries


def _check_position(position: Any, num_includes: int, where: str) -> None:
    if (
        not isinstance(position, list)
        or len(position) != 2
        or position[0] not in POSITIONS
        or position[1] not in range(num_includes)
    ):
        raise ValueError(f"{where}: 'position' must be one of {POSITIONS} and an index of 'include', got {position!r}")


def _number(count: int) -> str:
    return NUMBER_WORDS[count] if count < len(NUMBER_WORDS) else str(count)


def _with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _plural(name: str) -> str:
    # GenEval's own prompts use these plurals, except for "bench" and "toothbrush", whose English plural is used here.
    return f"{name}es" if name.endswith(("s", "ch", "sh", "x")) else f"{name}s"
