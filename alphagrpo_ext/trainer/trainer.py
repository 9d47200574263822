# SPDX-License-Identifier: Apache-2.0

"""
GRPO of a policy that writes and paints: TRL's trainer with image log-probabilities in the same backward.

The methods below are overrides of TRL's and Transformers' trainers, in the order in which training calls them. Each hands a
[`RolloutStep`] or a micro-batch to functions in the other files of this folder; `README.md` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.processing_utils import ProcessorMixin
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer

from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.models.loading import load_model, load_processor
from alphagrpo_ext.models.model_card import PAPER
from alphagrpo_ext.models.work import WorkCounter
from alphagrpo_ext.objectives.base import OBJECTIVES
from alphagrpo_ext.rollout.generator import RolloutGenerator
from alphagrpo_ext.trainer import reference as references
from alphagrpo_ext.trainer import run_card, upstream
from alphagrpo_ext.trainer.callbacks.completion_logs import completion_images, printable_completions
from alphagrpo_ext.trainer.callbacks.own_callbacks import own_callbacks
from alphagrpo_ext.trainer.callbacks.rollout_event import announce_rollout
from alphagrpo_ext.trainer.checks.finite_steps import FiniteSteps, check_trained_weights
from alphagrpo_ext.trainer.checks.validation import (
    check_evaluation_groups,
    check_scores_found,
    check_steps_done,
    check_trains,
    checked_datasets,
    freeze_for_training,
)
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from alphagrpo_ext.trainer.distributed import gathered_policy, prepare_sharding, sum_over_processes
from alphagrpo_ext.trainer.initial_images import ImageRewards, paint_initial_images
from alphagrpo_ext.trainer.learning_rates import check_optimizer_is_made_here, set_generation_learning_rate
from alphagrpo_ext.trainer.resume.exact_resume import ExactResume
from alphagrpo_ext.trainer.reward_functions import trl_reward_functions
from alphagrpo_ext.trainer.rewards import joint_advantages, judge_step, strict_pass_metrics
from alphagrpo_ext.trainer.scoring.image_loss import ImageLoss
from alphagrpo_ext.trainer.scoring.packed_scorer import make_packed_scorer
from alphagrpo_ext.trainer.scoring.scores import PackedScores, pad_columns
from alphagrpo_ext.trainer.step import RolloutStep, Stopwatch, new_step, reward_row, rollout_fields, start_judging


upstream.check_installed()


class AlphaGRPOTrainer(GRPOTrainer):
    """
    Trainer of AR-diffusion unified multimodal models with GRPO, as in AlphaGRPO (https://huggingface.co/papers/2605.12495).

    One policy writes a thought, token by token, and paints an image, denoising step by denoising step. Both get their
    gradient from the same group-relative advantage, out of one packed forward: text by TRL's own loss, images by an
    image objective. The tasks are those of the configuration and of the dataset's column `task`. Where a task refines an image
    and a row has none, the policy paints one first.

    Reward functions are TRL's. Besides the dataset's columns except `image`, they get the keyword arguments `images`, one PIL
    image per sample, `texts`, the list of texts that the policy wrote for a sample, and `trajectory`, one [`Trajectory`] per
    sample. A function with a true attribute `text_only` judges text alone. The methods `validate_dataset`, `validate_image_size`
    and `preflight` are called before training; see [`validate_rewards`] and [`preflight_rewards`]. A coroutine method
    `start(images, rows)` of an asynchronous function gets every part of a rollout (`rollout_batch_size`) as soon as it is
    painted. All of these are also found behind `functools.partial`, `functools.wraps` and bound methods.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A name that [`load_model`] takes, e.g. `"bagel-shapes"`, or a model that fulfils [`UnifiedModel`].
        args ([`AlphaGRPOConfig`], *optional*): Configuration. The trainer works on a copy of its own.
        train_dataset, eval_dataset: As in [`~trl.GRPOTrainer`]; a row needs a `prompt`, a string or a conversation.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            The model's processor. Loaded with the model if that is given by name.
        reward_funcs, reward_processing_classes, callbacks, optimizers, peft_config:
            As in [`~trl.GRPOTrainer`]. Its other arguments are refused.
    """

    _tag_names = ["trl", "alphagrpo"]
    _name = "AlphaGRPO"
    _paper = PAPER

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Callable | list[Callable],
        args: AlphaGRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Any = None,
    ) -> None:
        upstream.check_argument_types(args, processing_class)
        upstream.refuse_arguments(quantization_config, tools, rollout_func, environment_factory)
        given_args = AlphaGRPOConfig("alphagrpo") if args is None else args
        args = given_args.copy()
        if isinstance(model, str):
            model, loaded_processor = load_model(model, **{"dtype": "float32", **(args.model_init_kwargs or {})})
            processing_class = processing_class or loaded_processor
            args.model_init_kwargs = None
        policy = model.get_base_model() if isinstance(model, PeftModel) else model
        processing_class = processing_class or load_processor(policy.config._name_or_path)
        processing_class = processing_class.with_thought_context(args.thought_context)
        rows = checked_datasets(args, reward_funcs, train_dataset, eval_dataset, processing_class, policy)
        self.rows, self.tasks = rows, rows.tasks
        upstream.align_tokens(policy, processing_class)
        policy.config.sampling = {"task": args.task, **args.eval_rollout().to_settings()}
        check_optimizer_is_made_here(args, optimizers[0])
        peft_config = freeze_for_training(policy, peft_config, args)
        has_adapter = peft_config is not None or isinstance(model, PeftModel)
        reference = references.frozen_copy(policy) if args.has_reference and not has_adapter else None
        base = references.frozen_copy(policy) if args.image_base_beta and not has_adapter else None
        # The rollout that TRL is generating, scoring and rewarding, and the scores that its loss is being computed from.
        self._rollout_step: RolloutStep | None = None
        self._loss_scores: PackedScores | None = None
        self.stopwatch = Stopwatch()
        self.card_details: dict[str, Any] = {}
        self._work = WorkCounter(policy.branches)
        self._counted_models = [counted for counted in (policy, reference, base) if counted is not None]
        # TRL would load a reference from the folder of the policy, and refuses one that follows an adapter: both are made here.
        args.sync_ref_model = args.sync_ref_model and not args.has_reference
        args.beta = 0.0 if reference is not None else args.beta
        with upstream.expected_warnings():
            super().__init__(
                model=model,
                reward_funcs=trl_reward_functions(reward_funcs),
                args=args,
                train_dataset=rows.train,
                eval_dataset=rows.eval,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
                rollout_func=self._sample_rollout,
            )
        for name in ("beta", "sync_ref_model", "model_init_kwargs"):
            setattr(args, name, getattr(given_args, name))
        self.beta = args.beta
        self.ref_model = references.prepare_reference(reference, self.accelerator, args.offload_ref_model)
        self.base_model = references.prepare_reference(base, self.accelerator, args.offload_ref_model)
        if args.sync_ref_model and args.has_reference:
            self.add_callback(references.follow_policy(self.model, self.ref_model, self.accelerator))
        self.resume = ExactResume(self)
        for callback in (self.resume, *own_callbacks(args, self.callback_handler.callbacks, self._logs)):
            self.add_callback(callback)
        check_trains(self.model, args, self.reward_funcs, self.reward_weights)
        sharding = prepare_sharding(self.accelerator, args.ds3_gather_for_generation, args.image_steps_per_forward)
        self.scorer = make_packed_scorer(args, self.accelerator, sharding, policy, self.tasks)
        objective = OBJECTIVES.get(args.image_objective)(args.objective)
        self.image_loss = ImageLoss(objective, args.image_loss_weight, self.accelerator)
        self._finite_steps = FiniteSteps(self.accelerator, processing_class)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        is_new, model = self.optimizer is None, self.model if model is None else model
        optimizer = super().create_optimizer(model)
        if is_new and (learning_rate := self.args.generation_learning_rate) is not None:
            set_generation_learning_rate(optimizer, model, self.accelerator.unwrap_model(model), learning_rate)
        self.resume.remember_rates(optimizer)
        return optimizer

    @contextmanager
    def gathered_policy(self) -> Iterator[UnifiedModel]:
        """The policy, unwrapped and with whole parameters, e.g. for an evaluation. All processes enter and leave together."""
        with gathered_policy(self.model_wrapped, self.accelerator, self.args.gradient_checkpointing_kwargs) as policy:
            yield policy

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        with self.stopwatch.micro_batch(), self._work.of(*self._counted_models):
            output = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            work = sum_over_processes(self._work.take(), self.accelerator) if self.args.log_work else {}
            self._append_metrics(self.stopwatch.take() | work)
        return output

    def _append_metrics(self, metrics: Mapping[str, float]) -> None:
        """Add values to the next log of training or of evaluation, which averages them."""
        for name, value in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        with printable_completions():
            super().log(logs, start_time)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        is_training = self.model.training
        position = (self.state.global_step, self._step) if is_training else None
        group_size = self.num_generations if is_training else self.num_generations_eval
        step = new_step(inputs, self.args, self.accelerator.process_index, group_size, position)
        self._rollout_step = step
        if is_training:
            # TRL keeps a column that was logged for an earlier rollout until it is logged again.
            self._logs["extra"].clear()
        try:
            output = super()._generate_and_score_completions([reward_row(row) for row in step.rows])
            output |= joint_advantages(step, output, self.reward_funcs, self.reward_weights, self.args)
            self._append_metrics(strict_pass_metrics(step, self._logs["extra"], self.tasks, self.accelerator))
            if self.log_completions and self.log_multimodal:
                self._logs["images"].extend(gather_object(completion_images(step.trajectories)))
            if is_training:
                announce_rollout(self, step, self.stopwatch)
            references.add_scores(self, step, output)
        finally:
            self._rollout_step = None
        return {**output, "trajectories": step.trajectories}

    def _sample_rollout(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        """TRL's `rollout_func`: sample a trajectory for every row of this process."""
        step, loop = self._rollout_step, getattr(self, "async_loop", None)
        with (
            self.stopwatch.measure("rollout"),
            torch.no_grad(),
            references.sampling_policy(self) as policy,
            self.accelerator.autocast(),
        ):
            generate = RolloutGenerator(policy, self.processing_class, self.tasks)
            if any(task.paints_initial_image for task in self.tasks.values()):
                paint_initial_images(step, generate, self.tasks, ImageRewards.from_trainer(self), self.args)
            for part in generate.parts(step.rows, step.generators(), step.configs):
                start = len(step.trajectories)
                start_judging(self.reward_funcs, part, step.rows[start : start + len(part)], loop)
                step.trajectories += part
        decode = self.processing_class.decode_sampled
        step.texts = [[decode([text]) for text in t.sampled_texts] for t in step.trajectories]
        return rollout_fields(step.trajectories, step.texts, self._tokenizer.eos_token_id)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        with self.stopwatch.measure("reward"):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        step, functions, weights = self._rollout_step, self.reward_funcs, self.reward_weights
        metrics = judge_step(step, rewards, functions, weights, self.tasks, self.args, self.accelerator)
        self._append_metrics(metrics)
        return step.rewards

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """TRL's scoring of text for the loss and, in a rollout, for the old policy and the reference."""
        if self._rollout_step is None:
            scores = self._loss_scores
        else:
            step, is_copy = self._rollout_step, model is self.ref_model
            # A reference without a model of its own is the policy, and known by the adapter that is active.
            is_reference = is_copy or references.acts_as_reference(self.accelerator.unwrap_model(model))
            with references.visit_device(model, self.accelerator, is_copy and self.args.offload_ref_model):
                scores = self.scorer.score_rollout(model, step.trajectories, batch_size, logits_to_keep)
            step.scores["reference" if is_reference else "old"] = scores
        log_probs, entropies = (pad_columns(x, logits_to_keep) for x in (scores.log_probs, scores.entropies))
        return log_probs, entropies if compute_entropy else None, None

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        accumulation_steps = self.current_gradient_accumulation_steps if self.model.training else 1
        # The trainer's own backward is that of the first part, which has the texts; the others are done with before it.
        scores, outputs = self.image_loss.backward_parts(model, inputs, self.scorer, accumulation_steps)
        self._loss_scores = scores
        try:
            text_loss = super()._compute_loss(model, inputs)
        finally:
            self._loss_scores = None
        losses = {"texts": self.args.text_loss_weight * text_loss}
        if scores.images is not None:
            outputs.insert(0, self.image_loss(scores.images, inputs))
            self._append_metrics(self.image_loss.metrics(outputs, inputs["trajectories"]))
            # The gradient of the other parts is there already, so only the value of their loss is added.
            image_loss = sum([output.loss.detach() for output in outputs[1:]], outputs[0].loss)
            losses["images"] = self.args.image_loss_weight * (image_loss / accumulation_steps)
        step = self.state.global_step if self.model.training else None
        return self._finite_steps.total(losses, scores, inputs, step)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor | float:
        return self._finite_steps.checked_norm(super()._get_grad_norm(model, grad_norm), self.state.global_step)

    # Checkpoints and resume; see `resume/exact_resume.py`.

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in [`~transformers.Trainer`]; see [`ExactResume.run`] for what can be resumed from, and for errors."""
        with self.resume.run(resume_from_checkpoint) as checkpoint:
            return super().train(checkpoint and str(checkpoint), *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        check_evaluation_groups(self.args)
        if eval_dataset is None and self.eval_dataset is not self.rows.eval:
            eval_dataset = self.eval_dataset  # Replaced since it was checked.
        metrics = super().evaluate(self.rows.checked(eval_dataset), *args, **kwargs)
        check_scores_found(metrics)
        return metrics

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False) -> dict[str, float]:
        if skip_scheduler and self.resume.checkpoint is not None:
            return {}  # The evaluation of `eval_on_start`, which a resumed run has in its history.
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        self.resume.sampler = super()._get_train_sampler(*args, **kwargs)
        return self.resume.sampler

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, *args, **kwargs) -> tuple[int, int]:
        done = super()._init_training_state(max_steps, num_update_steps_per_epoch, *args, **kwargs)
        return self.resume.position(*done, num_update_steps_per_epoch * self.args.gradient_accumulation_steps)

    def _run_epoch(self, **kwargs: Any) -> None:
        # Transformers would train one step more than there are to do.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        check_steps_done(self.state)
        check_trained_weights(self.model)
        return super()._finalize_training(trial, num_train_samples, start_time - self.resume.seconds_before)

    def _get_output_dir(self, trial: Any) -> str:
        return self.resume.output_dir(super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The upload goes on in the background, so it has to read from where the checkpoint stays.
        if not self.resume.is_saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        check_trained_weights(self.model, state_dict)
        super()._save(output_dir, state_dict)
        run_card.complete_folder(self, output_dir)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        """Write the model card of the output folder; see [`~alphagrpo_ext.trainer.run_card.save_card`]."""
        run_card.save_card(self, self.args.output_dir, dataset_name, tags)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        with self.resume.saved_checkpoint(Path(self._get_output_dir(trial))):
            super()._save_checkpoint(model, trial)
