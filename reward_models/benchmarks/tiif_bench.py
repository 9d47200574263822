# SPDX-License-Identifier: Apache-2.0

"""TIIF-Bench: prompts for many abilities, each in a short and a long wording."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alphagrpo_ext.files import read_json_lines
from reward_models.benchmarks.base import (
    BENCHMARKS,
    Benchmark,
    BenchmarkPrompt,
    check_single_image,
    checked_keys,
    path_part,
    source_files,
    text_field,
)
from reward_models.prompts.questions import Question


WORDINGS = ("short_description", "long_description")
# The first pattern that matches the name of the dimension decides: a spatial relation of actions is spatial.
_TAGS = (
    (r"negation", "Negative"),
    (r"numeracy|count", "Count"),
    (r"spatial|2d|3d", "Spatial"),
    (r"text(?!ure)", "Text"),
    (r"style", "Style"),
    (r"action", "Action"),
)


@BENCHMARKS.register("tiif_bench")
class TIIFBench(Benchmark):
    """
    TIIF-Bench (https://huggingface.co/papers/2506.02161).

    Prompts are a folder of https://github.com/A113N-W3I/TIIF-Bench such as `data/testmini_prompts`, or one of its files: JSON
    lines with `type`, `short_description` and `long_description`. Images are written, as in its README and its
    `eval/inference_t2i_models.py`, to `<folder>/<type>/<model_label>/<wording>/<line>.png`, one image per wording. Lines are
    counted from 0 in each file.

    Questions are read from the folder of the same name with `_eval_prompts` (`data/testmini_eval_prompts`) beside it, if it
    exists: the line with the same `type`, in any case, and number, with `yn_question_list` and `yn_answer_list`. Questions whose
    right answer is no are not scored, because in DVReward the right answer is yes.
    """

    max_images = 1

    def prompts(self, source: str) -> list[BenchmarkPrompt]:
        files = source_files(source, "*.jsonl")
        questions = _read_questions(_questions_folder(files[0].parent))
        prompts = []
        for path in files:
            for number, (where, row) in enumerate(read_json_lines(path)):
                dimension = path_part(text_field(row, "type", where), f"{where}: type")
                for wording in WORDINGS:
                    prompts.append(
                        BenchmarkPrompt(
                            key=f"{dimension}/{wording}/{number}",
                            prompt=text_field(row, wording, where),
                            category=f"{dimension}/{wording.removesuffix('_description')}",
                            questions=questions.get((dimension.casefold(), number), ()),
                        )
                    )
        return checked_keys(prompts, source)

    def image_path(self, prompt: BenchmarkPrompt, sample: int) -> str:
        check_single_image("TIIF-Bench", sample)
        dimension, wording, number = prompt.key.split("/")
        return f"{dimension}/{self.model_label}/{wording}/{number}.png"


def _questions_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name.removesuffix('_prompts')}_eval_prompts")


def _read_questions(folder: Path) -> dict[tuple[str, int], tuple[Question, ...]]:
    """Read the questions, by dimension and line."""
    questions = {}
    for path in sorted(folder.glob("*.jsonl")):
        for number, (where, row) in enumerate(read_json_lines(path)):
            dimension = text_field(row, "type", where)
            if "yn_question_list" not in row:
                # Text in images is scored by reading it, without questions.
                continue
            asked, answers = (_texts(row, f"yn_{name}_list", where) for name in ("question", "answer"))
            if len(asked) != len(answers):
                raise ValueError(f"{where}: {len(asked)} questions but {len(answers)} answers")
            questions[dimension.casefold(), number] = tuple(
                Question(question, _tag(dimension), is_valid=_is_yes(answer, where))
                for question, answer in zip(asked, answers, strict=True)
            )
    return questions


def _texts(row: dict[str, Any], name: str, where: str) -> Sequence[str]:
    values = row.get(name)
    if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(f"{where}: '{name}' must be a list of texts, got {str(values)[:100]}")
    return [value.strip() for value in values]


def _is_yes(answer: str, where: str) -> bool:
    word = answer.strip(" .!").casefold()
    if word not in ("yes", "true", "no", "false"):
        raise ValueError(f"{where}: an answer of 'yn_answer_list' must be yes or no, got {answer[:100]!r}")
    return word in ("yes", "true")


def _tag(dimension: str) -> str:
    for pattern, tag in _TAGS:
        if re.search(pattern, dimension.lower()):
            return tag
    return "Attribute"
