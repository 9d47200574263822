# SPDX-License-Identifier: Apache-2.0

"""
What recipes that train have in common: prompts, model and trainer, an evaluation before and after, and the files of both.

A recipe calls these functions one after the other; what is its own (rewards, how a policy is evaluated, what is printed) stays
in its file.
"""

from __future__ import annotations

import functools
import json
import random
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers.processing_utils import ProcessorMixin
from trl import ModelConfig, get_peft_config

from alphagrpo_ext.files import atomic_path, write_text
from alphagrpo_ext.models.attention.choice import AttentionChoice, choose_attention
from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.report import ReportStore, write_report
from alphagrpo_ext.rollout.generator import RolloutGenerator
from alphagrpo_ext.rollout.readable_prompts import unknown_words, unknown_words_warning
from alphagrpo_ext.rollout.task import ANSWERING_TASK, PAINTING_TASK, TASKS
from alphagrpo_ext.trainer.callbacks.console import ConsoleCallback, LastLogCallback, banner
from alphagrpo_ext.trainer.callbacks.json_lines import JsonLinesCallback
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from alphagrpo_ext.trainer.reference import frozen_copy
from alphagrpo_ext.trainer.resume.checkpoint_folder import asks_to_resume, resolve_checkpoint
from alphagrpo_ext.trainer.scoring.steps_per_forward import computes_in_fp32
from alphagrpo_ext.trainer.step import rollout_configs
from alphagrpo_ext.trainer.trainer import AlphaGRPOTrainer
from recipe_tools.answering.guard import BEFORE_NAME, AnswerChange, answers_once, answers_right
from recipe_tools.answering.rows import assign_tasks, shapes_questions
from recipe_tools.contact_sheet import contact_sheet
from recipe_tools.input_errors import checking_input
from recipe_tools.own_rewards import evaluation_rewards, import_reward, rewards_table, set_evaluation
from recipe_tools.processes import limit_threads, print_skipped
from recipe_tools.run_folder import how_to_go_on, run_arguments, write_arguments
from reward_models.answering.exact import ExactAnswer
from reward_models.arguments import PromptArguments
from reward_models.dvreward import DVReward, JudgeFailedError
from reward_models.evaluation.evaluate import evaluate
from reward_models.evaluation.page import make_report_comparison
from reward_models.evaluation.samples import EvaluatedSample, Evaluation
from reward_models.evaluation.scores import first_failed_question
from reward_models.evaluation.settings_digest import settings_digest
from reward_models.evaluation.store import evaluate_once
from reward_models.format import FORMATS
from reward_models.likelihood.reward import LikelihoodReward
from reward_models.prompts.loading import has_questions, load_prompts, load_unjudged_prompts, painted_prompts
from reward_models.prompts.questions import from_row
from reward_models.prompts.rows import PromptRows


SUMMARY_NAME = "summary.json"
"""File of the scores before and after training."""
NUM_NAMED_WORDS = 12
"""Words that a model does not know and that are named."""
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
        arguments (`dict[str, Any]`): All of these as they were given; see [`run_arguments`].
        checkpoint (`Path`, *optional*): Where training continues.
        train_dataset ([`~datasets.Dataset`]): Training prompts.
        eval_rows ([`PromptRows`], *optional*): Evaluation prompts with questions.
        eval_dataset ([`~datasets.Dataset`], *optional*): Evaluation prompts without questions, for reward functions of the user.
        model ([`UnifiedModel`]), processor ([`~transformers.ProcessorMixin`]): The policy.
        reward ([`DVReward`], *optional*): Reward of images whose prompts have questions, in training and in evaluations.
        skipped (`list[str]`, *optional*): Rows that were left out because their image is broken, with what is broken.
        answers ([`AnswerChange`], *optional*): The guard of understanding, once the run is trained.
    """

    script_args: PromptArguments
    training_args: AlphaGRPOConfig
    model_args: ModelConfig
    arguments: dict[str, Any]
    checkpoint: Path | None
    train_dataset: Dataset
    eval_rows: PromptRows | None
    eval_dataset: Dataset | None
    model: UnifiedModel
    processor: ProcessorMixin
    reward: DVReward | None
    skipped: list[str] | None = None
    answers: AnswerChange | None = None

    @property
    def output_dir(self) -> Path:
        return Path(self.training_args.output_dir)


def prepare_run(script_args: PromptArguments, training_args: AlphaGRPOConfig, model_args: ModelConfig) -> TrainingRun:
    """
    Load prompts, model and reward. What the judge cannot judge, and a judge that does not answer, is reported before the model is
    loaded unless the judge needs one itself. No judge is asked where there are no questions for it.
    """
    limit_threads()
    # First, so that a checkpoint that cannot be resumed is reported before anything is loaded.
    checkpoint = resolve_checkpoint(training_args.resume_from_checkpoint, Path(training_args.output_dir))
    arguments = run_arguments(script_args, training_args, model_args)
    skipped: list[str] | None = [] if script_args.skip_broken_rows else None
    train_dataset = _load_train_prompts(script_args, training_args.task, skipped)
    eval_rows, eval_dataset = _load_eval_prompts(script_args, training_args.task, skipped)
    given = {"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}

    @functools.cache
    def load_policy() -> tuple[UnifiedModel, ProcessorMixin]:
        model, processor = load_model(model_args.model_name_or_path, dtype=model_args.dtype, **given)
        if not given:
            model.set_attn_implementation(_choose_attention(model, training_args, model_args).name)
        return model, processor

    judged = {
        **({script_args.train_name: train_dataset} if script_args.trains_on_dvreward else {}),
        **({script_args.eval_name: eval_rows} if eval_rows is not None else {}),
    }
    sizes = [config.size for config in rollout_configs(training_args, [training_args.task, PAINTING_TASK]).values()]
    reward = script_args.make_checked_reward(judged, sizes, load_policy) if judged else None
    model, processor = load_policy()
    processor = processor.with_thought_context(training_args.thought_context)
    return TrainingRun(
        *(script_args, training_args, model_args, arguments, checkpoint),
        *(train_dataset, eval_rows, eval_dataset, model, processor, reward, skipped),
    )


def _choose_attention(model: UnifiedModel, training_args: AlphaGRPOConfig, model_args: ModelConfig) -> AttentionChoice:
    """The attention of a run, by the largest image that one of its tasks paints."""
    configs = rollout_configs(training_args, [training_args.task, PAINTING_TASK])
    num_pixels = max(config.size[0] * config.size[1] for config in configs.values())
    return choose_attention(
        model.family,
        training_args.device.type,
        model_args.attn_implementation or None,
        is_fp32=computes_in_fp32(model, training_args),
        trained_image_tokens=num_pixels // model.latent_downsample**2,
    )


def _load_train_prompts(args: PromptArguments, task: str, skipped: list[str] | None) -> Dataset:
    is_shapes = args.train_file is None
    if is_shapes and {*(args.train_tasks or [task])} == {ANSWERING_TASK}:
        return shapes_questions("train", args.num_train_prompts)
    if is_shapes or args.trains_on_dvreward:
        dataset = load_prompts(args.train_file, "train", args.num_train_prompts, skipped, args.prompt_column)
    else:
        dataset = load_unjudged_prompts(args.train_file, skipped, args.prompt_column)
    return assign_tasks(dataset, args.train_tasks, is_shapes) if args.train_tasks else dataset


def _load_eval_prompts(
    args: PromptArguments, task: str, skipped: list[str] | None
) -> tuple[PromptRows | None, Dataset | None]:
    """Evaluation prompts with questions, or those without; none of both if there is no evaluation."""
    if not args.evaluates:
        return None, None
    if args.eval_file is None and task == ANSWERING_TASK:
        return None, shapes_questions("evaluation", args.num_eval_prompts)
    if args.eval_file is not None and not args.trains_on_dvreward:
        found: list[str] | None = None if skipped is None else []
        dataset = load_unjudged_prompts(args.eval_file, found, args.prompt_column)
        if not has_questions(dataset):
            if skipped is not None:
                skipped += found
            return None, dataset
    rows = load_prompts(args.eval_file, "evaluation", args.num_eval_prompts, skipped, args.prompt_column)
    return PromptRows(painted_prompts(rows, args.eval_name)), None


def make_trainer(run: TrainingRun, reward_funcs: Sequence[Callable[..., Any]]) -> AlphaGRPOTrainer:
    """Make the trainer of a run, with an adapter if the arguments ask for one and with `metrics.jsonl`."""
    # PEFT's causal language models have a `generate` of their own, which this policy does not have.
    run.model_args.lora_task_type = None
    preset = run.model.family.lora_target_modules(run.training_args.lora_targets)
    run.model_args.lora_target_modules = run.model_args.lora_target_modules or preset
    holdouts = run.script_args.make_holdout_callbacks(run.script_args.aggregation, (run.model, run.processor))
    for holdout in holdouts:
        holdout.reward.validate_named({f"hold-out judge, {run.script_args.train_name}": run.train_dataset})
    if run.eval_dataset is not None:
        set_evaluation(run.training_args, run.script_args.eval_seeds, run.script_args.eval_batch_size)
    trainer = AlphaGRPOTrainer(
        model=run.model,
        reward_funcs=list(reward_funcs),
        args=run.training_args,
        train_dataset=run.train_dataset,
        eval_dataset=run.eval_dataset,
        processing_class=run.processor,
        peft_config=get_peft_config(run.model_args),
        callbacks=[JsonLinesCallback(run.output_dir / "metrics.jsonl"), LastLogCallback(), *holdouts],
    )
    trainer.card_details = {"command": shlex.join(["accelerate", "launch", *sys.argv])}
    if not run.script_args.verbose_logs:
        ConsoleCallback().attach(trainer)
    return trainer


def load_rewards(run: TrainingRun) -> list[Callable[..., Any]]:
    """
    The reward functions that `--reward` names, in its order, and then those of `--formats`.

    Raises:
        `ValueError`: If a name is neither that of a built-in reward nor a function that can be imported, if there is no such
            format, or if an argument of a reward is wrong.
    """
    built_in = {
        "dvreward": lambda: run.reward,
        "likelihood": lambda: _make_likelihood(run),
        "answer": ExactAnswer,
    }
    found = [built_in[name]() if name in built_in else import_reward(name) for name in run.script_args.reward]
    # A class is made without arguments, as for a reward that keeps something between its calls.
    rewards = [value() if isinstance(value, type) else value for value in found]
    return [*rewards, *(FORMATS.get(name)() for name in run.script_args.formats)]


def _make_likelihood(run: TrainingRun) -> LikelihoodReward:
    args = run.script_args

    def frozen_policy() -> tuple[UnifiedModel, ProcessorMixin]:
        # A policy with an adapter is frozen with the adapter switched off, unless its own judge may use it at the same time.
        has_adapter = run.model_args.use_peft or isinstance(run.model, PeftModel)
        if has_adapter and args.judge != "policy":
            return run.model, run.processor
        return frozen_copy(run.model).to(PartialState().device), run.processor

    return LikelihoodReward.from_arguments(args, frozen_policy, args.judge_max_failed_frac)


def run_facts(run: TrainingRun, trainer: AlphaGRPOTrainer) -> dict[str, Any]:
    """What the console says of a run before it starts."""
    parameters = list(trainer.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    args = run.training_args
    samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    details = {"dvreward": f" (judge: {run.script_args.judge})", "likelihood": " (compare it within groups only)"}
    rewards = [f"{name}{details.get(name, '')}" for name in trainer.reward_func_names]
    length = _count(args.max_steps, "step") if args.max_steps > 0 else _count(args.num_train_epochs, "epoch")
    return {
        "model": run.model_args.model_name_or_path,
        "trained": f"{trained:,} of {sum(parameter.numel() for parameter in parameters):,} parameters",
        "attention": _choose_attention(run.model, args, run.model_args),
        "task": args.task,
        "preset": _describe_preset(args),
        "rewards": ", ".join(rewards),
        "length": f"{length} of {samples} samples each"
        if args.max_steps > 0
        else f"{length}, {samples} samples per step",
        "evaluation": describe_evaluation(run),
        "output": run.output_dir,
        **({"report": run.output_dir / "report.html"} if args.report else {}),
    }


def _describe_preset(args: AlphaGRPOConfig) -> str:
    """The preset of sampling, and the settings that it made."""
    values = [f"{name} {'of the schedule' if v is None else v}" for name, v in args.preset_values.items()]
    return f"{args.preset} ({', '.join(values) or 'all that it sets was given'})"


def warn_of_unknown_words(run: TrainingRun) -> None:
    """Say which words of the prompts the model cannot read."""
    prompts = list(run.train_dataset["prompt"])
    prompts += [] if run.eval_rows is None else run.eval_rows.undecoded["prompt"]
    prompts += [] if run.eval_dataset is None else run.eval_dataset["prompt"]
    words = unknown_words(prompts, run.processor)
    if words:
        more = f" And {len(words) - NUM_NAMED_WORDS} more." if len(words) > NUM_NAMED_WORDS else ""
        print(f"{unknown_words_warning(words[:NUM_NAMED_WORDS], run.processor)}{more}", flush=True)


def describe_evaluation(run: TrainingRun) -> str:
    """What is evaluated before and after training, and by what; or why nothing is."""
    args = run.script_args
    if not args.evaluates:
        return "none (give --eval_file)" if args.eval_seeds else "none (--eval_seeds 0)"
    rows = run.eval_dataset if run.eval_rows is None else run.eval_rows
    source = args.eval_file or "the shapes world"
    scorer = "the rewards above" if run.eval_rows is None else f"DVReward (judge: {args.judge})"
    num_seeds = args.eval_seeds if run.eval_rows is not None else run.training_args.num_generations_eval
    return f"{_count(len(rows), 'prompt')} of {source} x {_count(num_seeds, 'seed')}, by {scorer}"


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


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
    task = TASKS.get(name)(think, args.num_reflection_rounds, args.allow_stop)
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
    run: TrainingRun,
    trainer: AlphaGRPOTrainer,
    evaluations: Callable[[str], list[Evaluation]],
    save: Callable[[list[Evaluation], list[Evaluation]], tuple[str, str]],
) -> None:
    """
    Evaluate, train, save the model, evaluate again, and write what there is to say about the run.

    Args:
        run ([`TrainingRun`]): The run. A resumed run does not repeat its first evaluation.
        trainer ([`AlphaGRPOTrainer`]): Its trainer.
        evaluations (`Callable[[str], list[Evaluation]]`): Evaluates the policy; its argument says when.
        save (`Callable[[list[Evaluation], list[Evaluation]], tuple[str, str]]`):
            Writes the files of the evaluations before and after training in the main process. It returns a table as text, and the
            name of a picture.
    """
    with checking_input():
        # First, so that a run that cannot go on leaves the evaluation of the one that it would resume.
        trainer.resume.check_run(run.checkpoint)
    is_main = PartialState().is_main_process
    if is_main:
        print(banner("Training", run_facts(run, trainer)), flush=True)
        warn_of_unknown_words(run)
    before = None if run.eval_rows is None else _evaluate_before(run, evaluations)
    answers_before = _answer_before(run, trainer) if run.script_args.guards_understanding else None
    if is_main:
        write_arguments(run.output_dir, run.arguments)
    _train(run, trainer)
    trainer.save_model(run.output_dir)
    after = None if before is None else evaluations("after training")
    if run.eval_dataset is not None:
        trainer.evaluate()
    if answers_before is not None:
        run.answers = AnswerChange(answers_before, _answer(run, trainer))
    if not is_main:
        return
    print_skipped(run.skipped)
    table = picture = None
    if before is not None:
        table, picture = save(before, after)
    elif run.eval_dataset is not None:
        rewards = evaluation_rewards(trainer.state.log_history)
        _save_summary(run, rewards)
        table = rewards_table(rewards)
    elif run.answers is not None:
        _save_summary(run, {})
    table = "\n\n".join(str(part) for part in (table, run.answers) if part) or None
    _finish(run, trainer, table, picture)


def _answer(run: TrainingRun, trainer: AlphaGRPOTrainer) -> list[bool]:
    with trainer.gathered_policy() as policy:
        return answers_right(policy, run.processor, run.script_args.eval_questions)


def _answer_before(run: TrainingRun, trainer: AlphaGRPOTrainer) -> list[bool]:
    settings = settings_digest(run.model_args.model_name_or_path, run.model_args.dtype, run.script_args.eval_questions)
    resuming = asks_to_resume(run.training_args.resume_from_checkpoint)
    path = run.output_dir / "before_training" / BEFORE_NAME
    return answers_once(path, settings, resuming, lambda: _answer(run, trainer))


def _save_summary(run: TrainingRun, summary: Mapping[str, Any]) -> None:
    answers = {} if run.answers is None else {"understanding": run.answers.summary()}
    write_text(run.output_dir / SUMMARY_NAME, json.dumps({**summary, **answers}, indent=2) + "\n")


def _evaluate_before(run: TrainingRun, evaluations: Callable[[str], list[Evaluation]]) -> list[Evaluation]:
    training_args, model_args = run.training_args, run.model_args
    settings = settings_digest(
        *(model_args.model_name_or_path, model_args.dtype, run.script_args, run.eval_rows),
        rollout_configs(training_args, [training_args.task, PAINTING_TASK]),
        *(training_args.task, training_args.think, training_args.stage1_think, training_args.allow_stop),
    )

    def announce_and_evaluate() -> list[Evaluation]:
        if PartialState().is_main_process:
            print(f"Before training: {describe_evaluation(run)}. --eval_seeds 0 skips evaluations.", flush=True)
        return evaluations("before training")

    resuming = asks_to_resume(training_args.resume_from_checkpoint)
    return evaluate_once(run.output_dir / "before_training", settings, resuming, announce_and_evaluate)


def _train(run: TrainingRun, trainer: AlphaGRPOTrainer) -> None:
    try:
        trainer.train(resume_from_checkpoint=run.checkpoint)
    except KeyboardInterrupt:
        print(f"\nInterrupted. {how_to_go_on(run.output_dir)}")
        # The status of a program that SIGINT ended.
        sys.exit(130)
    except JudgeFailedError as error:
        raise JudgeFailedError(f"{error}. {how_to_go_on(run.output_dir)}") from error


def _finish(run: TrainingRun, trainer: AlphaGRPOTrainer, table: str | None, picture: str | None) -> None:
    """Write the model card of a run, and print the table of its evaluations and its files."""
    trainer.card_details |= {"table": table, "picture": picture}
    trainer.create_model_card()
    names = ["README.md", *(["report.html"] if run.training_args.report else [])]
    names += [*([SUMMARY_NAME] if table else []), *([picture] if picture else [])]
    if table:
        print(f"\n{table}")
    print(f"\nModel, {', '.join(names)} and metrics.jsonl: {run.output_dir}", flush=True)


def save_scores(run: TrainingRun, summary: dict[str, Any], before: Evaluation, after: Evaluation) -> None:
    """Write `summary.json` and, if the run has a report, the images before and after training into it."""
    _save_summary(run, summary)
    if run.training_args.report:
        comparison = make_report_comparison(before, after, max_image_size=run.training_args.report_image_size)
        if run.answers is not None:
            table = comparison.table
            comparison = replace(comparison, table=replace(table, note=f"{table.note} Guard: {run.answers}."))
        ReportStore(run.output_dir).save_comparison(comparison)
        write_report(run.output_dir)


def save_picture(
    path: Path,
    pairs: Sequence[tuple[EvaluatedSample, EvaluatedSample]],
    categories: Sequence[str],
    headers: tuple[str, str],
    caption: Callable[[EvaluatedSample, EvaluatedSample], str],
    prompt_rows: Sequence[Mapping[str, Any]],
    caption_width: int = 260,
) -> None:
    """
    Draw the images of some pairs of each category side by side, with their rewards, whether they pass strictly, and the first
    question that a failed image was answered no to.

    Pairs are drawn at random, always with the same seed, so that the picture shows what the table says.

    Args:
        path (`Path`): The PNG file.
        pairs (`Sequence[tuple[EvaluatedSample, EvaluatedSample]]`): What to choose from.
        categories (`Sequence[str]`): Categories in their order.
        headers (`tuple[str, str]`): What the two images of a pair are.
        caption (`Callable[[EvaluatedSample, EvaluatedSample], str]`): Makes the text beside a pair.
        prompt_rows (`Sequence[Mapping[str, Any]]`): The rows of the evaluation, with their questions.
        caption_width (`int`, *optional*, defaults to `260`): Width of the texts, in pixels.
    """

    def text(pair: tuple[EvaluatedSample, EvaluatedSample]) -> str:
        record = from_row(prompt_rows[pair[0].index], where=f"row {pair[0].index}")
        questions = [(header, first_failed_question(s, record)) for header, s in zip(headers, pair, strict=True)]
        return "\n".join(
            [caption(*pair), *(f"{header} fails: {question}" for header, question in questions if question)]
        )

    chosen, rng = [], random.Random(0)
    for category in categories:
        members = [pair for pair in pairs if pair[0].category == category]
        chosen += rng.sample(members, min(len(members), max(1, NUM_PICTURED // len(categories))))
    rows = [(text(pair), [(sample.load_image(), _picture_label(sample)) for sample in pair]) for pair in chosen]
    sheet = contact_sheet(rows, headers, caption_width=caption_width)
    with atomic_path(path) as temporary:
        sheet.save(temporary)


def _picture_label(sample: EvaluatedSample) -> str:
    return f"reward {sample.reward:.2f}, {'passes' if sample.strict_pass else 'fails'}"
