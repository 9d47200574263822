# SPDX-License-Identifier: Apache-2.0

"""Checks of a training run's arguments that need no model and no data, before the slow imports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from alphagrpo_ext.rollout.task import ANSWERING_TASK
from alphagrpo_ext.trainer.resume.checkpoint_folder import asks_for_last, asks_to_resume, complete_checkpoints
from recipe_tools.own_rewards import import_reward
from recipe_tools.run_folder import refuse_other_run, run_arguments
from reward_models.arguments import BUILT_IN_REWARDS, PromptArguments
from reward_models.prompts.files import is_dataset_name


def check_arguments(script_args: PromptArguments, training_args: TrainingArguments, model_args: Any) -> None:
    """
    Check that files of prompts are there, that reward functions can be imported and formats are known, that there are steps to
    train, and that no other run is overwritten.

    Raises:
        `FileNotFoundError`: If there is no such file of prompts.
        `ValueError`: If another check fails. The message says what to change.
    """
    for file in (script_args.train_file, script_args.eval_file):
        if file is not None:
            is_dataset_name(file)
    if training_args.max_steps == 0 or training_args.max_steps < -1:
        raise ValueError(
            f"max_steps={training_args.max_steps} trains nothing: give a number of steps, or -1 for num_train_epochs"
        )
    tasks = {*(script_args.train_tasks or [training_args.task])}
    if tasks == {ANSWERING_TASK} and not set(script_args.reward) - {"dvreward", "likelihood"}:
        raise ValueError(
            f"the task {ANSWERING_TASK} paints no image for {' and '.join(script_args.reward)} to judge: give --reward answer, or a "
            f"function of your own"
        )
    for name in script_args.reward:
        if name not in BUILT_IN_REWARDS:
            import_reward(name)
    if script_args.formats:
        # Here, so that `--help` does not import clients of language models.
        from reward_models.format import FORMATS

        for name in script_args.formats:
            FORMATS.get(name)
    output_dir, resume_from = Path(training_args.output_dir), training_args.resume_from_checkpoint
    has_last = asks_for_last(resume_from) and next(complete_checkpoints(output_dir), None) is not None
    if not (has_last or asks_to_resume(resume_from) and not asks_for_last(resume_from)):
        refuse_other_run(output_dir, run_arguments(script_args, training_args, model_args))
