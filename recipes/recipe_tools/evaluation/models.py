# SPDX-License-Identifier: Apache-2.0

"""
Evaluation of a model in several stages, each of which is kept in a folder.

A stage is kept by all that its scores depend on (weights, prompts, sampling, judge, and the stages before it), so an evaluation with
a further model or round does not repeat the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.models.fingerprint import checkpoint_fingerprint, model_label
from alphagrpo_ext.rollout.generator import RolloutGenerator
from alphagrpo_ext.rollout.readable_prompts import check_prompt_room
from alphagrpo_ext.rollout.task import PAINTING_TASK, REFLECTION_TASK, TASKS
from alphagrpo_ext.shapes.editing import editing_rows
from recipe_tools.evaluation.arguments import EvaluationArguments
from recipe_tools.evaluation.calibration import calibrate, save_threshold
from recipe_tools.evaluation.stages import EDITING, EvaluationStage
from recipe_tools.input_errors import checking_input
from recipe_tools.processes import load_policy
from reward_models.evaluation.evaluate import evaluate, share_of_work
from reward_models.evaluation.samples import Evaluation
from reward_models.evaluation.scores import NamedEvaluation
from reward_models.evaluation.settings_digest import settings_digest
from reward_models.evaluation.store import EvaluationStore
from reward_models.evaluation.text_tables import refinement_table
from reward_models.prompts.loading import load_prompts, painted_prompts
from reward_models.prompts.rows import PromptRows


def load_rows(
    task: str, eval_file: str | None, num_prompts: int, skipped: list[str] | None = None
) -> Sequence[dict[str, Any]]:
    """
    Load the rows to evaluate on. `skipped` is as in [`load_prompts`].

    Raises:
        `ValueError`: If the task edits images and there are none.
    """
    if eval_file is None and task == EDITING:
        return editing_rows(num_prompts, seed=0)
    dataset = painted_prompts(load_prompts(eval_file, "evaluation", num_prompts, skipped), f"eval_file {eval_file}")
    if task == EDITING:
        if "image" not in dataset.column_names:
            raise ValueError(f"{eval_file} has no images, which task '{EDITING}' needs: give rows an 'image'")
    elif "image" in dataset.column_names:
        dataset = dataset.remove_columns("image")
    return PromptRows(dataset)


def evaluate_model(
    name: str,
    stages: Sequence[EvaluationStage],
    rows: Sequence[dict[str, Any]],
    rows_digest: str,
    args: EvaluationArguments,
) -> list[NamedEvaluation]:
    """
    Evaluate a model in all stages. It is loaded only if an image is left to paint.

    Args:
        name (`str`): The model: a name, a folder, or an id on the Hub.
        stages (`Sequence[EvaluationStage]`): The stages, each after the one whose images it refines.
        rows (`Sequence[dict[str, Any]]`): Prompts with questions.
        rows_digest (`str`): Digest of the rows.
        args ([`EvaluationArguments`]): How to sample and score, and the output folder.
    """
    policy = functools.cache(functools.partial(load_policy, name, args.dtype))
    configs = {stage.task: args.rollout(args.image_size, args.image_size, stage.task) for stage in stages}
    sizes = [config.size for config in configs.values()]
    undecoded = rows.undecoded if isinstance(rows, PromptRows) else rows
    named_rows = {f"eval_file {args.eval_file}": undecoded}
    checked_reward = functools.cache(checking_input()(lambda: args.make_checked_reward(named_rows, sizes, policy)))
    threshold = calibrated_threshold(name, policy, args) if args.calibrate_stop else args.stop_threshold
    settings = [
        *(checkpoint_fingerprint(name), args.dtype, rows_digest, args.answer_settings()),
        *(args.eval_seeds, args.batch_size),
    ]
    seeds = range(args.eval_seeds)
    evaluations: dict[str, Evaluation] = {}
    for stage in stages:
        folder = Path(args.output_dir) / "images" / model_label(name) / stage.mode.replace(" ", "_")
        sampling = [configs[earlier.task] for earlier in stage.lineage]
        # Whether images may be kept says nothing about first ones, and a threshold that a model has is in its fingerprint.
        stops = [args.allow_stop, threshold] if args.allow_stop and stage.source else []
        with EvaluationStore(folder, settings_digest(settings, stage.lineage, sampling, *stops)) as store:
            evaluation = store.evaluation(share_of_work(len(rows), seeds), len(stage.lineage) - 1)
            if evaluation is None:
                # Before the model is loaded.
                reward = checked_reward()
                model, processor = policy()
                own = args.threshold_of(model) if threshold is None else threshold
                stopping = {"allow_stop": args.allow_stop, "stop_threshold": own}
                task = TASKS.get(stage.task)(think=stage.think, **stopping)
                with checking_input():
                    named = ((f"row {i}", row) for i, row in enumerate(undecoded))
                    check_prompt_room(named, task, processor, model, configs[stage.task])
                evaluation = evaluate(
                    RolloutGenerator(model, processor, task),
                    rows,
                    configs[stage.task],
                    reward,
                    seeds,
                    args.batch_size,
                    description=f"{name}, {stage.mode}",
                    initial=evaluations[stage.source.mode] if stage.source else None,
                    store=store,
                )
        evaluations[stage.mode] = evaluation
    return [
        NamedEvaluation(
            name,
            stage.mode,
            evaluations[stage.mode],
            evaluations[stage.lineage[0].mode] if stage.source else None,
        )
        for stage in stages
    ]


def calibrated_threshold(
    name: str, policy: Callable[[], tuple[UnifiedModel, UnifiedProcessor]], args: EvaluationArguments
) -> float:
    """
    Calibrate the threshold of a model on training prompts, print what it does to them, and keep it in a folder that holds the
    whole model.
    """
    with checking_input():
        rows = list(load_prompts(args.calibration_file, "train", args.calibrate_stop))
    tasks = (PAINTING_TASK, REFLECTION_TASK)
    configs = {task: args.rollout(args.image_size, args.image_size, task) for task in tasks}
    sizes = [config.size for config in configs.values()]
    reward = checking_input()(args.make_checked_reward)(
        {f"calibration_file {args.calibration_file}": rows}, sizes, policy
    )
    model, processor = policy()
    result = calibrate(model, processor, rows, configs, reward, range(args.eval_seeds), args.batch_size)
    state = PartialState()
    if state.is_main_process:
        print(f"{name}: {result}")
        if (Path(name) / "config.json").is_file():
            save_threshold(Path(name), model, result.threshold)
    state.wait_for_everyone()
    return result.threshold


def print_rounds(results: Sequence[NamedEvaluation]) -> None:
    """Print, for each model, how its refined images differ from its first ones."""
    for name in dict.fromkeys(entry.model for entry in results):
        rounds = {
            entry.mode: (entry.initial, entry.evaluation) for entry in results if entry.model == name and entry.initial
        }
        if rounds:
            print(f"\n{name}, from its first image\n{refinement_table(rounds)}")
