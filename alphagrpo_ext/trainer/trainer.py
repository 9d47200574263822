# SPDX-License-Identifier: Apache-2.0

"""GRPO of a policy that writes and paints: TRL's trainer with image log-probabilities in the same backward."""

from __future__ import annotations

import asyncio
import inspect
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import trl
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.processing_utils import ProcessorMixin
from trl import GRPOTrainer

from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.models.loading import load_model, load_processor
from alphagrpo_ext.models.work import WorkCounter
from alphagrpo_ext.objectives.base import OBJECTIVES, ImageObjective, ImageScores, ObjectiveOutput
from alphagrpo_ext.rollout.generator import RolloutGenerator, sample_generator
from alphagrpo_ext.rollout.task import Task
from alphagrpo_ext.trainer.callbacks.completion_logs import completion_images, completions_callbacks
from alphagrpo_ext.trainer.callbacks.report import ReportCallback
from alphagrpo_ext.trainer.callbacks.rollout_event import RolloutEventMixin
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from alphagrpo_ext.trainer.distributed import Sharding, check_sharding, gathered_policy, use_uniform_precision
from alphagrpo_ext.trainer.initial_images import InitialImagesMixin
from alphagrpo_ext.trainer.learning_rates import check_optimizer_is_made_here, set_generation_learning_rate
from alphagrpo_ext.trainer.reference import (
    FollowPolicyCallback,
    SyncRefAdapterCallback,
    add_reference_adapter,
    frozen_copy,
    prepare_reference,
)
from alphagrpo_ext.trainer.reference_policy import ReferencePolicyMixin
from alphagrpo_ext.trainer.resume.checkpointing import ExactResumeMixin
from alphagrpo_ext.trainer.rewards import group_advantages, rectify_false_positives, weighted_sum
from alphagrpo_ext.trainer.rows import reward_row, task_name, task_names, validate_rows
from alphagrpo_ext.trainer.upstream import check_trl_version
from alphagrpo_ext.trainer.window_split import join_parts, window_parts
from alphagrpo_ext.trajectory import TextSegment, Trajectory


check_trl_version(trl.__version__)


class AlphaGRPOTrainer(ExactResumeMixin, InitialImagesMixin, ReferencePolicyMixin, RolloutEventMixin, GRPOTrainer):
    """
    Trainer of AR-diffusion unified multimodal models with GRPO, as in AlphaGRPO
    (https://huggingface.co/papers/2605.12495).

    One policy writes a thought, token by token, and paints an image, denoising step by denoising step. Both get their
    gradient from the same group-relative advantage, out of one packed forward: text by TRL's own loss, images by an
    image objective.

    The tasks are those of the configuration and of the dataset's column `task`; several may meet in one batch. A task that
    refines an image has the policy paint one first where a row has none, and rewards of images that are no better than
    that are rectified.

    Reward functions are TRL's. Beside the dataset's columns, but for `image`, they get the keyword arguments `images`,
    one PIL image a sample, `texts`, a list of what was written in each turn of a sample, and `trajectory`, one
    [`Trajectory`] a sample. One that judges text alone says so by a true
    attribute `text_only`. A reward function with a method `validate_dataset` or
    `validate_image_size` is asked to check the datasets, or the height and width of images, before training. An
    asynchronous one with a coroutine method `start(images, rows)` is given every part of a rollout (`rollout_batch_size`)
    as soon as it is painted, so that it works while the next part is generated.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A name that [`load_model`] takes, e.g. `"bagel-shapes"`, or a model that fulfils [`UnifiedModel`].
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            As in [`~trl.GRPOTrainer`].
        args ([`AlphaGRPOConfig`], *optional*):
            Configuration.
        train_dataset, eval_dataset:
            As in [`~trl.GRPOTrainer`]; a row needs a `prompt`, a string or a conversation.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            The model's processor. Loaded with the model if that is given by name.
        callbacks, optimizers, peft_config:
            As in [`~trl.GRPOTrainer`].
    """

    _tag_names = ["trl", "alphagrpo"]
    _name = "AlphaGRPO"
    _paper = {
        "title": "AlphaGRPO: Unlocking Self-Reflective Multimodal Generation in UMMs via Decompositional Verifiable "
        "Reward",
        "id": "2605.12495",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{alphagrpo2026,
                title  = {{AlphaGRPO: Unlocking Self-Reflective Multimodal Generation in UMMs via Decompositional Verifiable Reward}},
                year   = 2026,
                eprint = {arXiv:2605.12495},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Callable | list[Callable],
        args: AlphaGRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ) -> None:
        args = AlphaGRPOConfig("alphagrpo") if args is None else args
        if isinstance(model, str):
            model, loaded_processor = load_model(model, **{"dtype": "float32", **(args.model_init_kwargs or {})})
            processing_class = processing_class or loaded_processor
            args.model_init_kwargs = None
        policy = model.get_base_model() if isinstance(model, PeftModel) else model
        if processing_class is None:
            processing_class = load_processor(policy.config._name_or_path)
        args.eval_rollout().grid(policy)
        for reward_func in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
            if validate := getattr(reward_func, "validate_dataset", None):
                for dataset in (train_dataset, eval_dataset):
                    if isinstance(dataset, Dataset):
                        validate(dataset)
            if validate := getattr(reward_func, "validate_image_size", None):
                validate(args.image_height, args.image_width)
        if args.freeze_vision_tower:
            policy.family.freeze_vision_tower(policy)
        check_optimizer_is_made_here(args, optimizers[0])
        has_adapter = peft_config is not None or isinstance(model, PeftModel)
        self._work, self._counted = WorkCounter(policy.branches), [policy]
        has_reference = bool(args.beta or args.image_beta or args.rollout_policy == "reference")
        reference = frozen_copy(policy) if has_reference and not has_adapter else None
        self._objective: ImageObjective = OBJECTIVES.get(args.image_objective)(args.objective)
        self._tasks = self._validated_tasks(args, (train_dataset, eval_dataset), processing_class, policy)
        # What the packed forward answers for: set by a rollout, and for the time of one loss.
        self._trajectories: list[Trajectory] = []
        self._texts: list[list[str]] = []
        self._scored_images: list[ImageScores | None] = []
        self._rows: Sequence[dict[str, Any]] = []
        self._initial_rewards: list[float] = []
        self._judged_rewards = self._rewards = torch.empty(0)
        self._seconds = {"rollout": 0.0, "reward": 0.0}
        self._accumulated_seconds: defaultdict[str, float] = defaultdict(float)
        # TRL would load a reference model from a folder, which the policy need not have come from.
        beta, sync_ref_model = args.beta, args.sync_ref_model
        if reference is not None:
            args.beta = 0.0
        # Nor does TRL let a reference follow an adapter.
        if has_reference:
            args.sync_ref_model = False
        try:
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
                rollout_func=self._rollout,
            )
        finally:
            args.beta, args.sync_ref_model = beta, sync_ref_model
        if reference is not None:
            self.beta = beta
            self.ref_model = prepare_reference(reference, self.accelerator, args.offload_ref_model)
            self._counted.append(reference)
            if sync_ref_model:
                self.add_callback(FollowPolicyCallback(ref_model=self.ref_model, accelerator=self.accelerator))
        elif has_adapter and sync_ref_model:
            add_reference_adapter(self.model, self.accelerator)
            self.add_callback(SyncRefAdapterCallback(self.accelerator))
        if args.report:
            self.add_callback(ReportCallback())
        if args.log_completions:
            for callback in completions_callbacks(self.callback_handler.callbacks, self._logs):
                self.add_callback(callback)
        self._sharding = Sharding.of(self.accelerator)
        check_sharding(self._sharding, args.ds3_gather_for_generation)
        use_uniform_precision(self.accelerator)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.generation_learning_rate is not None:
            model = self.model if model is None else model
            policy = self.accelerator.unwrap_model(model)
            policy = policy.get_base_model() if isinstance(policy, PeftModel) else policy
            set_generation_learning_rate(optimizer, model, policy, self.args.generation_learning_rate)
        return optimizer

    @staticmethod
    def _validated_tasks(
        args: AlphaGRPOConfig, given: Sequence[Any], processor: ProcessorMixin, model: torch.nn.Module
    ) -> dict[str, Task]:
        """The tasks of all rows, by name. Rows of a stream are checked when their turn comes."""
        datasets = [d for part in given for d in (part.values() if isinstance(part, dict) else [part])]
        datasets = [d for d in datasets if isinstance(d, Dataset)]
        names = dict.fromkeys([args.task, *(name for d in datasets for name in task_names(d, args.task))])
        tasks = {name: args.make_task(name) for name in names}
        for dataset in datasets:
            validate_rows(dataset, tasks, args.task, processor, model, args.eval_rollout())
        return tasks

    @contextmanager
    def gathered_policy(self) -> Iterator[UnifiedModel]:
        """
        The policy, unwrapped and with whole parameters, to generate with, e.g. for an evaluation. All processes enter
        and leave together; see [`~alphagrpo_ext.trainer.distributed.gathered_policy`].
        """
        with gathered_policy(self.model_wrapped, self.accelerator, self.args.gradient_checkpointing_kwargs) as policy:
            yield policy

    def _rollout(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        """TRL's `rollout_func`: sample a trajectory for every row of this process."""
        start = time.perf_counter()
        if self.model.training:
            config = self.args.train_rollout(self.state.global_step)
            # Several rollouts may serve one optimizer step; each has noise of its own.
            accumulation = self.args.gradient_accumulation_steps
            seed, step = self.args.seed, self.state.global_step * accumulation + self._step % accumulation
        else:
            # The same noise at every evaluation, so that they can be compared.
            config = self.args.eval_rollout()
            seed, step = f"eval-{self.args.seed}", 0
        offset = self.accelerator.process_index * len(self._rows)
        generators = [sample_generator(seed, step, offset + i) for i in range(len(self._rows))]
        with torch.no_grad(), self._sampling_policy() as model, self.accelerator.autocast():
            generate = RolloutGenerator(model, self.processing_class, self._tasks)
            rows = self._with_initial_images(generate, config, seed, step, offset)
            self._trajectories = []
            for part in generate.parts(rows, generators, config):
                self._start_judging(part, rows[len(self._trajectories) :])
                self._trajectories += part
        self._seconds["rollout"] += time.perf_counter() - start
        return self._rollout_fields(self._trajectories)

    def _start_judging(self, part: Sequence[Trajectory], rows: Sequence[Mapping[str, Any]]) -> None:
        """Hand what is painted to reward functions that can work on it while the next part is generated."""
        images = [trajectory.final_image for trajectory in part]
        for reward_func in self.reward_funcs:
            start = getattr(reward_func, "start", None)
            if inspect.iscoroutinefunction(start):
                rows_of_part = [reward_row(row) for row in rows[: len(part)]]
                asyncio.run_coroutine_threadsafe(start(images, rows_of_part), self.async_loop)

    def _image_functions(self) -> torch.Tensor:
        """Which reward functions judge images, bool `(functions,)`."""
        text_only = [getattr(function, "text_only", False) for function in self.reward_funcs]
        return ~torch.tensor(text_only, device=self.accelerator.device)

    def _rollout_fields(self, trajectories: list[Trajectory]) -> dict[str, list[Any]]:
        """What TRL wants to know of trajectories: the ids of their texts, and fields for the reward functions."""
        eos = self._tokenizer.eos_token_id
        fields: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": []}
        for trajectory in trajectories:
            texts = trajectory.sampled_texts
            ids = [token_id for text in texts for token_id in text.token_ids]
            given = [s for s in trajectory.segments if isinstance(s, TextSegment) and not s.sampled]
            fields["prompt_ids"].append([token_id for text in given for token_id in text.token_ids] or [eos])
            # A trajectory without text still needs a token; it is masked out of the loss.
            fields["completion_ids"].append(ids or [eos])
            fields["logprobs"].append([p for text in texts for p in text.log_probs] or [0.0])
            fields["env_mask"].append([1] * len(ids) or [0])
        fields["images"] = [trajectory.final_image for trajectory in trajectories]
        fields["trajectory"] = list(trajectories)
        fields["texts"] = self._texts = [
            [self.processing_class.decode(text.content_ids) for text in trajectory.sampled_texts]
            for trajectory in trajectories
        ]
        return fields

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = [{**row, "task": task_name(row, self.args.task)} for row in inputs]
        self._scored_images = []
        output = super()._generate_and_score_completions([reward_row(row) for row in self._rows])
        output["image_advantages"] = self._image_advantages(output["advantages"])
        if self.log_completions and self.log_multimodal:
            self._logs["images"].extend(gather_object(completion_images(self._trajectories)))
        self._announce_rollout(output["image_advantages"])
        scored, self._scored_images = self._scored_images, []
        output["trajectories"] = self._trajectories
        # TRL has scored with the old policy first and with the reference last, where it needs them.
        has_windows = any(image.window is not None for t in self._trajectories for image in t.sampled_images)
        ref_log_probs, ref_scored = output.get("ref_per_token_logps"), scored[-self._num_score_chunks() :]
        if ref_log_probs is None and (self._reference_samples or (self.args.image_beta and has_windows)):
            ref_log_probs, ref_scored = self._score_reference(output["completion_ids"].shape[1])
        if self._reference_samples:
            output["old_per_token_logps"], old_scored = ref_log_probs, ref_scored
        else:
            old_scored = scored[: self._num_score_chunks()]
        if "old_per_token_logps" in output and has_windows:
            output["old_velocities"] = self._per_trajectory(old_scored)
        if self.args.image_beta and has_windows:
            output["ref_velocities"] = self._per_trajectory(ref_scored)
        self._trajectories = []
        return output

    def _num_score_chunks(self) -> int:
        """Calls of the packed forward that TRL splits a rollout into."""
        batch_size = self._scoring_chunk_size()
        return -(-len(self._trajectories) // batch_size)

    def _scoring_chunk_size(self) -> int:
        if self.model.training:
            return self.args.per_device_train_batch_size
        return self.args.per_device_eval_batch_size

    @staticmethod
    def _per_trajectory(scored: Sequence[ImageScores | None]) -> list[torch.Tensor]:
        """Guided velocities of the images of each trajectory, as a list, so that TRL's shuffle and split apply."""
        parts = []
        for scores in scored:
            _, counts = scores.trajectory.unique_consecutive(return_counts=True)
            parts += scores.velocities.split(counts.tolist())
        return parts

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        start = time.perf_counter()
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._seconds["reward"] += time.perf_counter() - start
        self._rewards = self._rectified(rewards)
        return self._rewards

    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _rectified(self, rewards: torch.Tensor) -> torch.Tensor:
        """Rewards `(samples of all processes, functions)` after false-positive rectification; logs per task."""
        mode = "train" if self.model.training else "eval"
        is_image = self._image_functions()
        weights = self.reward_weights.to(rewards.device)[is_image]
        final = self._judged_rewards = weighted_sum(rewards[:, is_image], weights)
        if len(self._tasks) > 1:
            tasks = gather_object([row["task"] for row in self._rows])
            for name in dict.fromkeys(tasks):
                of_task = final[torch.tensor([task == name for task in tasks], device=final.device)]
                self._metrics[mode][f"rewards/{name}"].append(of_task.nanmean().item())
        if not any(task.paints_initial_image for task in self._tasks.values()):
            return rewards
        initial = self.accelerator.gather(torch.tensor(self._initial_rewards, device=rewards.device))
        refined, is_false = rectify_false_positives(
            rewards[:, is_image], weights, initial, self._group_size(), self.args.rectification
        )
        compared = ~(initial.isnan() | final.isnan())
        if compared.any():
            improved, rectified = (final > initial)[compared], is_false[compared]
            if self.args.rectification == "off":
                rectified = torch.zeros_like(rectified)
            for name, value in (
                ("initial_reward", initial[compared]),
                ("final_reward", final[compared]),
                ("improved_frac", improved.float()),
                ("rectified_frac", rectified.float()),
            ):
                self._metrics[mode][f"reflection/{name}"].append(value.mean().item())
        rewards = rewards.clone()
        rewards[:, is_image] = refined
        return rewards

    def _image_advantages(self, advantages: torch.Tensor) -> torch.Tensor:
        """Advantages `(samples of this process,)` of images: TRL's, unless some rewards are about text alone."""
        is_image = self._image_functions()
        if is_image.all():
            return advantages.clone()
        local = slice(
            self.accelerator.process_index * len(advantages), (self.accelerator.process_index + 1) * len(advantages)
        )
        if self.args.separate_advantages:
            advantages = group_advantages(
                self._rewards[:, is_image],
                self.reward_weights.to(self._rewards.device)[is_image],
                self._group_size(),
                self.args.scale_rewards,
                self.args.multi_objective_aggregation,
            )[local]
        if self.args.mask_broken_format:
            broken = (self._rewards[local][:, ~is_image] < 0.5).any(dim=1)
            advantages = advantages.masked_fill(broken, 0.0)
        return advantages.clone()

    def _score(
        self, model: torch.nn.Module, trajectories: Sequence[Trajectory]
    ) -> tuple[torch.Tensor, torch.Tensor, ImageScores | None]:
        """
        One packed forward over whole trajectories, or several with `image_steps_per_forward` trained steps each.

        Returns:
            Log-probabilities and entropies `(trajectories, longest text)` of sampled tokens, 0 on padding, and the
            scores of sampled images.
        """
        parts = window_parts(trajectories, self.args.image_steps_per_forward)
        (log_probs, entropies, _), *_ = scored = [self._score_part(model, part) for part in parts]
        return log_probs, entropies, join_parts([images for _, _, images in scored])

    def _score_part(
        self, model: torch.nn.Module, trajectories: Sequence[Trajectory]
    ) -> tuple[torch.Tensor, torch.Tensor, ImageScores | None]:
        # Unwrapping asks what is installed, which takes longer than a small model's forward has time for.
        unwrapped = model if isinstance(model, UnifiedModel) else self.accelerator.unwrap_model(model)
        batch = unwrapped.pack(trajectories, self.args.objective_guidance)
        inputs = batch.inputs
        if self._sharding.shards_parameters and len(self._tasks) > 1:
            # Another process may have an image to look at where this one has none.
            inputs = unwrapped.with_all_parts(inputs)
        device = self.accelerator.device
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        with self.accelerator.autocast():
            output = model(**inputs, temperature=self.temperature, context_gradient=self.args.context_gradient)
        length = max(sum(len(text.token_ids) for text in t.sampled_texts) for t in trajectories)
        index = (batch.score_trajectory.to(device), batch.score_column.to(device))
        blank = output.log_probs.new_zeros(len(trajectories), length)
        log_probs, entropies = blank.index_put(index, output.log_probs), blank.index_put(index, output.entropies)
        images = ImageScores.from_packed(trajectories, batch, output)
        return log_probs, entropies, images

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """TRL's scoring of text, answered from the packed forward; the images it scored are kept for the objective."""
        batch_size = batch_size or len(self._trajectories)
        log_probs, entropies = [], []
        with self._at_hand(model):
            for start in range(0, len(self._trajectories), batch_size):
                parts = self._score(model, self._trajectories[start : start + batch_size])
                for target, part in ((log_probs, parts[0]), (entropies, parts[1])):
                    target.append(torch.nn.functional.pad(part, (0, logits_to_keep - part.shape[1])))
                self._scored_images.append(parts[2])
        return torch.cat(log_probs), torch.cat(entropies) if compute_entropy else None, None

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        first, *others = window_parts(inputs["trajectories"], self.args.image_steps_per_forward)
        # The last forward is that of the first part, in which TRL scores the text; the others are done with before it.
        outputs = self._backward_of_parts(model, others, inputs)
        self._trajectories, self._scored_images = first, []
        text_loss = super()._compute_loss(model, inputs)
        (scores,) = self._scored_images
        self._trajectories, self._scored_images = [], []
        loss = self.args.text_loss_weight * text_loss
        if scores is None:
            return loss
        outputs.insert(0, self._image_output(scores, inputs, 0))
        self._log_images(outputs)
        # The gradient of the other parts is there already, so only the value of their loss is added.
        image_loss = sum([output.loss.detach() for output in outputs[1:]], outputs[0].loss)
        return loss + self.args.image_loss_weight * self._per_accumulation_step(image_loss)

    def _backward_of_parts(
        self, model: torch.nn.Module, parts: Sequence[Sequence[Trajectory]], inputs: dict[str, Any]
    ) -> list[ObjectiveOutput]:
        """Forward and backward of trained steps beyond those of the first part, one part after the other."""
        outputs, start = [], self.args.image_steps_per_forward
        state, is_last = self.accelerator.gradient_state, self.accelerator.sync_gradients
        for part in parts:
            # Processes exchange gradients, and DeepSpeed takes its step, in the backward of the trainer alone.
            with self.accelerator.no_sync(model) if is_last else nullcontext():
                _, _, scores = self._score(model, part)
                output = self._image_output(scores, inputs, start)
                loss = self.args.image_loss_weight * self._per_accumulation_step(output.loss)
                options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
                state._set_sync_gradients(False)
                try:
                    with torch.autocast(self.accelerator.device.type, enabled=False):
                        self.accelerator.backward(loss, **options)
                finally:
                    state._set_sync_gradients(is_last)
            outputs.append(replace(output, loss=output.loss.detach()))
            start += scores.t.shape[1]
        return outputs

    def _per_accumulation_step(self, loss: torch.Tensor) -> torch.Tensor:
        return loss / self.current_gradient_accumulation_steps if self.model.training else loss

    def _image_output(self, scores: ImageScores, inputs: dict[str, Any], start: int) -> ObjectiveOutput:
        """
        The objective on the trained steps that `scores` has, the first of which is step `start` of the window. The loss is
        a scalar, and it and the metrics are the steps' share of an average over the window.
        """
        num_steps = scores.t.shape[1]

        def velocities(name: str) -> torch.Tensor | None:
            return torch.cat(inputs[name])[:, start : start + num_steps] if inputs.get(name) is not None else None

        output = self._objective(
            scores,
            inputs["image_advantages"][scores.trajectory],
            old_velocities=velocities("old_velocities"),
            ref_velocities=velocities("ref_velocities"),
        )
        window_size = next(
            image.window.num_steps for t in inputs["trajectories"] for image in t.sampled_images if image.window
        )
        share = num_steps / window_size
        return ObjectiveOutput(
            loss=share * output.loss.sum() / len(inputs["trajectories"]),
            metrics={name: share * value for name, value in output.metrics.items()},
        )

    def _log_images(self, outputs: Sequence[ObjectiveOutput]) -> None:
        names = ["loss", *outputs[0].metrics]
        parts = [torch.stack([output.loss.detach(), *output.metrics.values()]) for output in outputs]
        values = self.accelerator.reduce(torch.stack(parts).sum(dim=0), reduction="mean").tolist()
        mode = "train" if self.model.training else "eval"
        for name, value in zip(names, values, strict=True):
            self._metrics[mode][f"image/{name}"].append(value)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        start = time.perf_counter()
        # An evaluation since the last step also rolled out, and is not counted.
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        with self._work.of(*self._counted):
            output = super().training_step(model, inputs, num_items_in_batch)
        elapsed = time.perf_counter() - start
        spent = {**self._seconds, "update": elapsed - sum(self._seconds.values())}
        for name, seconds in spent.items():
            self._accumulated_seconds[name] += seconds
        if self.accelerator.sync_gradients:
            for name, seconds in self._accumulated_seconds.items():
                self._metrics["train"][f"timing/{name}"].append(seconds)
            self._accumulated_seconds.clear()
            self._log_work()
        return output

    def _log_work(self) -> None:
        """Work of all processes since the last optimizer step."""
        metrics = self._work.metrics()
        self._work.clear()
        totals = self.accelerator.reduce(torch.tensor(list(metrics.values()), device=self.accelerator.device))
        for name, total in zip(metrics, totals.tolist(), strict=True):
            self._metrics["train"][name].append(total)
