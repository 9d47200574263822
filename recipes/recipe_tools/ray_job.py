# SPDX-License-Identifier: Apache-2.0

"""
What the workers of a Ray Train run are told and do: start the recipe, again from the last checkpoint after a failure.

Ray starts all workers again when one of them fails, and each chooses its checkpoint by the files in the output directory, not by
what Ray remembers. A run that a person starts again therefore continues in the same way as one that Ray restarts. For the same
reason a new run refuses an output directory with checkpoints of an earlier one: its first restart would continue from them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphagrpo_ext.trainer.resume.checkpoint_folder import (
    asks_for_last,
    asks_to_resume,
    complete_checkpoints,
    last_checkpoint,
    read_manifest,
)
from recipe_tools.recipe_arguments import argument_types, load_recipe, make_parser, with_config


ATTEMPTS_FILE = "attempts.jsonl"


@dataclass(frozen=True)
class RayJob:
    """
    What every worker is told.

    Args:
        recipe (`str`): Path of the recipe, relative to `directory` if it is inside.
        arguments (`list[str]`): The recipe's command line.
        directory (`str`): Folder in which the run was started; relative paths refer to it.
        output_dir (`str`): Absolute path of the output directory.
        run_dir (`str`): Folder of Ray's files and of `attempts.jsonl`.
        initial_checkpoint (`str`, *optional*): Checkpoint to continue from if the output directory has none.
        environment (`dict[str, str]`): Environment variables.
    """

    recipe: str
    arguments: list[str]
    directory: str
    output_dir: str
    run_dir: str
    initial_checkpoint: str | None
    environment: dict[str, str]


def choose_initial_checkpoint(output_dir: Path, resume_from: str | None) -> str | None:
    """
    Choose the checkpoint that a run begins with, or `None` for a run from the start.

    Args:
        output_dir (`Path`): Output directory of the run.
        resume_from (`str`, *optional*): `"last"` for the last complete checkpoint there, if there is one, or a path.

    Raises:
        `ValueError`: If a restart would continue from another checkpoint in the output directory.
        `DamagedCheckpointError`: If the checkpoint that is named is not complete or does not exist.
    """
    # Contents are not read here: the workers share that work.
    last = next(complete_checkpoints(output_dir), None)
    if not asks_to_resume(resume_from):
        if last is not None:
            raise ValueError(
                f"{output_dir} holds {last.name} of an earlier run: continue it with --resume_from_checkpoint last "
                "(--ckpt.load_enable), or name another --output_dir"
            )
        return None
    if asks_for_last(resume_from):
        return last and str(last)
    checkpoint = Path(resume_from).resolve()
    read_manifest(checkpoint)
    if last is not None and last.resolve() != checkpoint:
        raise ValueError(
            f"{output_dir} holds {last.name}, from which a restart would continue: name another --output_dir to continue from "
            f"{checkpoint}"
        )
    return str(checkpoint)


def train_worker(config: Mapping[str, Any]) -> None:
    """
    Train as one of the workers. Ray runs this function in each of them, and once more after a failure.

    Args:
        config (`Mapping[str, Any]`): Fields of a [`RayJob`].
    """
    import ray.train

    job = RayJob(**config)
    if not Path(job.run_dir).is_dir():
        raise FileNotFoundError(
            f"{job.run_dir} does not exist on this node: output_dir must be on storage that all nodes share"
        )
    os.environ.update(job.environment)
    # On a cluster that copies the working directory to each node, the worker is already in its copy.
    if Path(job.directory).is_dir():
        os.chdir(job.directory)
    context = ray.train.get_context()
    run_recipe(job, context.get_world_rank(), context.get_world_size())


def run_recipe(job: RayJob, rank: int, num_workers: int) -> None:
    """
    Run the recipe's `main` in this worker, from the last checkpoint in the output directory or else from the initial one. The
    first worker notes the attempt.

    Args:
        job ([`RayJob`]): The job.
        rank (`int`): Position of this worker.
        num_workers (`int`): Number of workers.

    Raises:
        `RuntimeError`: If Accelerate does not see all workers.
    """
    from transformers import TrainingArguments

    recipe = load_recipe(Path(job.recipe))
    arguments = [*with_config(recipe, job.arguments), "--output_dir", job.output_dir]
    parsed = make_parser(argument_types(recipe)).parse_args_and_config(arguments, fail_with_unknown_args=True)
    (training_args,) = [part for part in parsed if isinstance(part, TrainingArguments)]
    if training_args.world_size != num_workers:
        raise RuntimeError(
            f"accelerate sees {training_args.world_size} of {num_workers} workers, so that each would train alone: is a variable "
            "of accelerate (ACCELERATE_...) set on this node?"
        )
    # Here, where the workers are connected and share the work of reading it.
    last = last_checkpoint(job.output_dir)
    checkpoint = job.initial_checkpoint if last is None else str(last)
    if rank == 0:
        with (Path(job.run_dir) / ATTEMPTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "resumed_from": checkpoint}) + "\n")
    training_args.resume_from_checkpoint = checkpoint
    recipe.main(*parsed)


def describe_attempts(path: Path, output_dir: Path) -> str:
    """Say in one sentence how often the workers were started again, and from which checkpoints."""
    attempts = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if len(attempts) == 1:
        return f"Finished without a restart: {output_dir}"
    starts = [Path(entry["resumed_from"]).name if entry["resumed_from"] else "the start" for entry in attempts[1:]]
    return f"Finished after {len(starts)} restart{'s' * (len(starts) > 1)}, from {', '.join(starts)}: {output_dir}"
