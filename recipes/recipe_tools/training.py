# SPDX-License-Identifier: Apache-2.0

"""
What recipes that train have in common: prompts, model and trainer, an evaluation before and after, and the files of both.

A recipe calls these functions one after the other; what is its own (rewards, how a policy is evaluated, what is printed) stays
in its file.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers.processing_utils import ProcessorMixin
from trl import ModelConfig, get_peft_config

from alphagrpo_ext.files import atomic_path, write_text
from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.report import ReportStore, write_report
from alphagrpo_ext.rollout.generator import RolloutGenerator
from alphagrpo_ext.rollout.task import PAINTING_TASK, TASKS
from alphagrpo_ext.trainer.callbacks.console import ConsoleCallback
from alphagrpo_ext.trainer.callbacks.json_lines import JsonLinesCallback
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from alphagrpo_ext.trainer.resume.checkpoint_folder import asks_to_resume, resolve_checkpoint
from alphagrpo_ext.trainer.step import rollout_configs
from alphagrpo_ext.trainer.trainer import AlphaGRPOTrainer
from recipe_tools.contact_sheet import contact_sheet
from recipe_tools.processes import limit_threads, print_skipped
from reward_models.arguments import PromptArguments
from reward_models.dvreward import DVReward
from reward_models.evaluation.evaluate import evaluate
from reward_models.evaluation.page import make_report_comparison
from reward_models.evaluation.samples import EvaluatedSample, Evaluation
from reward_models.evaluation.settings_digest import settings_digest
from reward_models.evaluation.store import evaluate_once
from reward_models.prompts.loading import load_prompts
from reward_models.prompts.rows import PromptRows


NUM_PICTURED = 8
"""Prompts in the picture of a run, shared out to the categories."""


@dataclass
class TrainingRun:
    """
    What a run of a training recipe consists of.

    Args:
        script_args ([`~reward_models.arguments.PromptArguments`]): Prompts, judge and evaluations.
        training_args ([`AlphaGRPOConfig`]): Arguments of the trainer.
        model_args ([`~trl.ModelConfig`]): Model and adapter.
        checkpoint (`Path`, *optional*): Where training continues.
        train_dataset ([`~datasets.Dataset`]), eval_rows (`Sequence[dict[str, Any]]`): Prompts of both kinds.
        model ([`UnifiedModel`]), processor ([`~transformers.ProcessorMixin`]): The policy.
        reward ([`DVReward`]): Reward of images, in training and in evaluations.
        skipped (`list[str]`, *optional*): Rows that were left out because their image is broken, with what is broken.
    """

    script_args: PromptArguments
    training_args: AlphaGRPOConfig
    model_args: ModelConfig
    checkpoint: Path | None
    train_dataset: Dataset
    eval_rows: Sequence[dict[str, Any]]
    model: UnifiedModel
    processor: ProcessorMixin
    reward: DVReward
    skipped: list[str] | None = None

    @property
    def output_dir(self) -> Path:
        return Path(self.training_args.output_dir)


def prepare_run(script_args: PromptArguments, training_args: AlphaGRPOConfig, model_args: ModelConfig) -> TrainingRun:
    """
    Load prompts, model and reward. What the judge cannot judge, and a judge that does not answer, is reported before the model is
    loaded unless the judge needs one itself.
    """
    limit_threads()
    # First, so that a checkpoint that cannot be resumed is reported before anything is loaded.
    checkpoint = resolve_checkpoint(training_args.resume_from_checkpoint, Path(training_args.output_dir))
    skipped: list[str] | None = [] if script_args.skip_broken_rows else None
    column = script_args.prompt_column
    train_dataset = load_prompts(script_args.train_file, "train", script_args.num_train_prompts, skipped, column)
    eval_rows = PromptRows(
        load_prompts(script_args.eval_file, "evaluation", script_args.num_eval_prompts, skipped, column)
    )
    attention = model_args.attn_implementation
    load_policy = functools.cache(
        functools.partial(
            load_model,
            model_args.model_name_or_path,
            dtype=model_args.dtype,
            **({"attn_implementation": attention} if attention else {}),
        )
    )
    judged = {
        **({script_args.train_name: train_dataset} if "dvreward" in script_args.reward else {}),
        **({script_args.eval_name: eval_rows} if script_args.eval_seeds else {}),
    }
    sizes = [config.size for config in rollout_configs(training_args, [training_args.task, PAINTING_TASK]).values()]
    reward = script_args.make_checked_reward(judged, sizes, load_policy) if judged else None
    model, processor = load_policy()
    reward = reward or script_args.make_reward((model, processor))
    return TrainingRun(
        script_args, training_args, model_args, checkpoint, train_dataset, eval_rows, model, processor, reward, skipped
    )


def make_trainer(run: TrainingRun, reward_funcs: Sequence[Callable[..., Any]]) -> AlphaGRPOTrainer:
    """Make the trainer of a run, with an adapter if the arguments ask for one and with `metrics.jsonl`."""
    # PEFT's causal language models have a `generate` of their own, which this policy does not have.
    run.model_args.lora_task_type = None
    preset = run.model.family.lora_target_modules(run.training_args.lora_targets)
    run.model_args.lora_target_modules = run.model_args.lora_target_modules or preset
    holdouts = run.script_args.make_holdout_callbacks(run.script_args.aggregation, (run.model, run.processor))
    for holdout in holdouts:
        holdout.reward.validate_named({f"hold-out judge, {run.script_args.train_name}": run.train_dataset})
    trainer = AlphaGRPOTrainer(
        model=run.model,
        reward_funcs=list(reward_funcs),
        args=run.training_args,
        train_dataset=run.train_dataset,
        processing_class=run.processor,
        peft_config=get_peft_config(run.model_args),
        callbacks=[JsonLinesCallback(run.output_dir / "metrics.jsonl"), *holdouts],
    )
    trainer.card_details = {"command": shlex.join(["accelerate", "launch", *sys.argv])}
    if not run.script_args.verbose_logs:
        ConsoleCallback("Training", run_facts(run, trainer)).attach(trainer)
    return trainer


def load_rewards(run: TrainingRun) -> list[Callable[..., Any]]:
    """
    The reward functions that `--reward` names, in its order.

    Raises:
        `ValueError`: If a name is neither `"dvreward"` nor a function that can be imported.
    """
    # Modules beside the command, as for `python -m`.
    sys.path.insert(0, os.getcwd())
    try:
        return [run.reward if name == "dvreward" else _import_function(name) for name in run.script_args.reward]
    finally:
        sys.path.pop(0)


def _import_function(name: str) -> Callable[..., Any]:
    module, separator, function = name.rpartition(":") if ":" in name else name.rpartition(".")
    if not separator:
        raise ValueError(f"--reward {name}: give 'dvreward', or a function as module:function")
    try:
        value = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--reward {name}: {error}") from error
    if not callable(value):
        raise ValueError(f"--reward {name}: {function} is {type(value).__name__}, not a function")
    # A class is made without arguments, as for a reward that keeps something between its calls.
    return value() if isinstance(value, type) else value


def run_facts(run: TrainingRun, trainer: AlphaGRPOTrainer) -> dict[str, Any]:
    """What the console says of a run before it starts."""
    parameters = list(trainer.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    args = run.training_args
    samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "model": run.model_args.model_name_or_path,
        "trained": f"{trained:,} of {sum(parameter.numel() for parameter in parameters):,} parameters",
        "task": args.task,
        "rewards": f"{', '.join(trainer.reward_func_names)} (judge: {run.script_args.judge})",
        "steps": f"{args.max_steps if args.max_steps > 0 else f'{args.num_train_epochs:g} epochs'} of {samples} samples",
        "output": run.output_dir,
        **({"report": run.output_dir / "report.html"} if args.report else {}),
    }


def evaluate_policy(
    run: TrainingRun,
    policy: UnifiedModel,
    name: str,
    think: bool,
    description: str,
    initial: Evaluation | None = None,
) -> Evaluation:
    """
    Score the images that a policy paints for the evaluation prompts.

    Args:
        run ([`TrainingRun`]): Prompts, settings and reward.
        policy ([`UnifiedModel`]): The trainer's gathered policy.
        name (`str`): Name of the task, whose settings are those of evaluation.
        think (`bool`): Whether the policy writes a thought before it paints.
        description (`str`): Label of the progress bar.
        initial ([`Evaluation`], *optional*): Images that the policy refines.
    """
    args = run.training_args
    task = TASKS.get(name)(think=think, num_reflection_rounds=args.num_reflection_rounds)
    return evaluate(
        RolloutGenerator(policy, run.processor, task),
        run.eval_rows,
        args.for_task(name).eval_rollout(),
        run.reward,
        seeds=range(run.script_args.eval_seeds),
        batch_size=run.script_args.eval_batch_size,
        description=description,
        initial=initial,
    )


def train_between_evaluations(
    run: TrainingRun, trainer: AlphaGRPOTrainer, evaluations: Callable[[str], list[Evaluation]]
) -> tuple[list[Evaluation], list[Evaluation]] | None:
    """
    Evaluate, train, evaluate again, and save the model.

    Args:
        run ([`TrainingRun`]): The run. A resumed run does not repeat its first evaluation.
        trainer ([`AlphaGRPOTrainer`]): Its trainer.
        evaluations (`Callable[[str], list[Evaluation]]`): Evaluates the policy; its argument says when.

    Returns:
        `tuple`: Evaluations before and after training; `None` if there are none, and in all processes but the main one.
    """
    script_args, training_args, model_args = run.script_args, run.training_args, run.model_args
    before = after = None
    # First, so that a run that cannot go on leaves the evaluation of the one that it would resume.
    trainer.resume.check_run(run.checkpoint)
    if script_args.eval_seeds:
        settings = settings_digest(
            *(model_args.model_name_or_path, model_args.dtype, script_args, run.eval_rows),
            rollout_configs(training_args, [training_args.task, PAINTING_TASK]),
            *(training_args.task, training_args.think),
        )
        resuming = asks_to_resume(training_args.resume_from_checkpoint)
        before = evaluate_once(
            run.output_dir / "before_training", settings, resuming, lambda: evaluations("before training")
        )
    try:
        trainer.train(resume_from_checkpoint=run.checkpoint)
    except KeyboardInterrupt:
        print(f"\n{how_to_go_on(run.output_dir)}")
        # The status of a program that SIGINT ended.
        sys.exit(130)
    if script_args.eval_seeds:
        after = evaluations("after training")
    trainer.save_model(run.output_dir)
    if PartialState().is_main_process:
        print_skipped(run.skipped)
    return (before, after) if before is not None and PartialState().is_main_process else None


def save_model_card(trainer: AlphaGRPOTrainer, table: str, picture: str, compared: str | None = None) -> None:
    """
    Write the model card of a run with a table of its evaluations.

    Args:
        trainer ([`AlphaGRPOTrainer`]): The trainer of the run.
        table (`str`): Scores.
        picture (`str`): Name of a picture in the output folder.
        compared (`str`, *optional*): What the two values of an arrow in the table are.
    """
    trainer.card_details |= {"table": table, "picture": picture, **({"compared": compared} if compared else {})}
    trainer.create_model_card()


def how_to_go_on(output_dir: Path) -> str:
    """What somebody who interrupted a run can do next."""
    checkpoints = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if checkpoints:
        return (
            f"Interrupted. The last checkpoint is {checkpoints[-1]}: the same command with --resume_from_checkpoint last "
            f"continues there."
        )
    return (
        "Interrupted before the first checkpoint. With --save_strategy steps --save_steps 10 --resume_from_checkpoint last, "
        "the same command starts a run and continues it."
    )


def save_scores(run: TrainingRun, summary: dict[str, Any], before: Evaluation, after: Evaluation) -> None:
    """Write `summary.json` and, if the run has a report, the images before and after training into it."""
    write_text(run.output_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    if run.training_args.report:
        comparison = make_report_comparison(before, after, max_image_size=run.training_args.report_image_size)
        ReportStore(run.output_dir).save_comparison(comparison)
        write_report(run.output_dir)


def save_picture(
    path: Path,
    pairs: Sequence[tuple[EvaluatedSample, EvaluatedSample]],
    categories: Sequence[str],
    headers: tuple[str, str],
    caption: Callable[[EvaluatedSample, EvaluatedSample], str],
    caption_width: int = 260,
) -> None:
    """
    Draw the images of some pairs of each category side by side, with their rewards and whether they pass strictly.

    Pairs are drawn at random, always with the same seed, so that the picture shows what the table says.

    Args:
        path (`Path`): The PNG file.
        pairs (`Sequence[tuple[EvaluatedSample, EvaluatedSample]]`): What to choose from.
        categories (`Sequence[str]`): Categories in their order.
        headers (`tuple[str, str]`): What the two images of a pair are.
        caption (`Callable[[EvaluatedSample, EvaluatedSample], str]`): Makes the text beside a pair.
        caption_width (`int`, *optional*, defaults to `260`): Width of the texts, in pixels.
    """
    chosen, rng = [], random.Random(0)
    for category in categories:
        members = [pair for pair in pairs if pair[0].category == category]
        chosen += rng.sample(members, min(len(members), max(1, NUM_PICTURED // len(categories))))
    rows = [(caption(*pair), [(sample.load_image(), _picture_label(sample)) for sample in pair]) for pair in chosen]
    sheet = contact_sheet(rows, headers, caption_width=caption_width)
    with atomic_path(path) as temporary:
        sheet.save(temporary)


def _picture_label(sample: EvaluatedSample) -> str:
    return f"reward {sample.reward:.2f}, {'passes' if sample.strict_pass else 'fails'}"
