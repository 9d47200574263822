# SPDX-License-Identifier: Apache-2.0

"""Which task the training prompts have, and questions of the shapes world in their place."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from datasets import Dataset, Features, Image, Value

from alphagrpo_ext.rollout.task import ANSWERING_TASK
from alphagrpo_ext.shapes.answering import question_rows


def shapes_questions(split: str, num_questions: int) -> Dataset:
    """Questions about scenes of the shapes world; `split` is `"train"` or `"evaluation"`."""
    # The questions belong to the task and not to a run, so they do not depend on the run's seed.
    return Dataset.from_list(question_rows(split, num_questions, seed=0))


def assign_tasks(dataset: Dataset, tasks: Sequence[str], is_shapes: bool) -> Dataset:
    """
    Add the column `task`, in which the tasks follow each other in turn.

    Args:
        dataset (`datasets.Dataset`): Training prompts.
        tasks (`Sequence[str]`): Names of tasks.
        is_shapes (`bool`):
            Whether the prompts are of the shapes world. Questions about its scenes then take the place of prompts that are assigned to
            [`ANSWERING_TASK`].

    Raises:
        `ValueError`: If the dataset has the column, or if there are no questions for [`ANSWERING_TASK`].
    """
    if "task" in dataset.column_names:
        raise ValueError("train_tasks assigns tasks to prompts, but those of train_file have a column 'task' already")
    names = list(itertools.islice(itertools.cycle(tasks), len(dataset)))
    if ANSWERING_TASK not in names:
        return dataset.add_column("task", names)
    if not is_shapes:
        raise ValueError(
            f"train_tasks cannot make questions about images of the prompts of train_file: give the file rows with the task "
            f"'{ANSWERING_TASK}' in a column 'task'"
        )
    questions = iter(question_rows("train", names.count(ANSWERING_TASK), seed=0))
    rows = [
        next(questions) if name == ANSWERING_TASK else {**row, "task": name}
        for row, name in zip(dataset, names, strict=True)
    ]
    features = Features({**dataset.features, "task": Value("string"), "image": Image(), "solution": Value("string")})
    return Dataset.from_list([{name: row.get(name) for name in features} for row in rows], features=features)
