# SPDX-License-Identifier: Apache-2.0

"""Checkpoints that a stopped run goes on from as if it had not been stopped."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import IterableDataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from alphagrpo_ext.models.saving import check_free_space
from alphagrpo_ext.trainer.reference import load_reference_state, reference_state
from alphagrpo_ext.trainer.resume.checkpoint_folder import (
    INCOMPLETE_NAME,
    publish,
    read_manifest,
    resolve_checkpoint,
    write_manifest,
)
from alphagrpo_ext.trainer.resume.rollout_buffer import load_rollouts, save_rollouts


TRAINER_STATE_NAME = "trainer_state.json"
REFERENCE_NAME = "reference_model.safetensors"


@dataclass(frozen=True)
class Progress:
    """
    Where a process stands, beyond what Transformers keeps.

    Args:
        micro_step (`int`): Micro-batches done: TRL's position among buffered rollouts.
        loss (`float`): Sum of losses since the last log.
        total_loss (`float`): Sum of losses until the last log.
        last_logged_step (`int`): Optimizer step of the last log.
        metrics (`dict[str, list[float]]`): Values since the last log.
        seconds (`float`): Time spent in training, without what was lost.
    """

    micro_step: int
    loss: float
    total_loss: float
    last_logged_step: int
    metrics: dict[str, list[float]]
    seconds: float


def progress_path(checkpoint: Path, process_index: int) -> Path:
    """File of a process' [`Progress`]."""
    return checkpoint / f"progress_{process_index}.json"


def rollouts_path(checkpoint: Path, process_index: int) -> Path:
    """File of a process' buffered rollouts. It is there only if some of them are still to be trained on."""
    return checkpoint / f"rollouts_{process_index}.safetensors"


class _RestoreProgress(TrainerCallback):
    """Acts after the trainer has reset its counters and before its first step."""

    def __init__(self, trainer: ExactResumeMixin) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._restore_progress()


class ExactResumeMixin:
    """
    Makes a [`~trl.GRPOTrainer`] resume exactly: the weights at the end are bit by bit those of a run that was never
    stopped (with the same number of processes, and as far as the device computes the same twice).

    Transformers restores model, optimizer, scheduler and the state of global random number generators. Beyond that a
    checkpoint holds, for every process, TRL's position among buffered rollouts, the rollouts that are still to be
    trained on, and losses and metrics since the last log; the order of prompts goes on in the epoch where it was. Noise,
    windows and sampled text depend on seed and position alone.

    A checkpoint is written in the folder `incomplete` of `output_dir` and moved to its place when all of it is there. Where
    the disk has no room for it, the run stops before it writes anything.

    Not restored: the table of `log_completions` until the next rollout, and what reward functions keep for themselves.
    """

    _is_saving = False
    _checkpoint: Path | None = None
    _train_sampler: Sampler | None = None
    _started_at = 0.0
    _seconds_before = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_RestoreProgress(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        As in [`~transformers.Trainer`].

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                `True`, `"true"` or `"last"` for the last complete checkpoint in `output_dir`, and from the beginning if
                there is none; a path for that one. See [`resolve_checkpoint`].

        Raises:
            `DamagedCheckpointError`: If the checkpoint that is named is not complete.
            `ValueError`: If it was saved by another number of processes, or without the state of training.
        """
        self._checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if self._checkpoint is not None:
            self._check_resumable(self._checkpoint)
        else:
            # An evaluation before training, which a restarted run may have kept, must not matter to it.
            set_seed(self.args.seed, device_specific=True)
        self._started_at, self._seconds_before = time.time(), 0.0
        eval_on_start = self.args.eval_on_start
        # It was made before the first step, and is in the history.
        self.args.eval_on_start = eval_on_start and self._checkpoint is None
        try:
            return super().train(self._checkpoint and str(self._checkpoint), *args, **kwargs)
        finally:
            self.args.eval_on_start = eval_on_start

    def _check_resumable(self, checkpoint: Path) -> None:
        num_processes = read_manifest(checkpoint).num_processes
        if num_processes != self.args.world_size:
            raise ValueError(
                f"the checkpoint {checkpoint} was saved by {num_processes} processes, but {self.args.world_size} are "
                f"running: launch as many to resume, or start a new run from its weights with model_name_or_path"
            )
        if not progress_path(checkpoint, self.args.process_index).is_file():
            raise ValueError(
                f"the checkpoint {checkpoint} holds a model alone, since save_only_model was set: start a new run from "
                f"its weights with model_name_or_path"
            )

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        epochs_trained, steps_trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, *args, **kwargs
        )
        if isinstance(self.train_dataset, IterableDataset) and self.state.epoch:
            # Transformers takes a stream for endless, but one that has ended began anew.
            epochs_trained = int(self.state.epoch)
            steps_in_epoch = num_update_steps_per_epoch * self.args.gradient_accumulation_steps
            steps_trained = round((self.state.epoch - epochs_trained) * steps_in_epoch)
        elif self._train_sampler is not None:
            for _ in range(epochs_trained):
                # TRL's sampler draws the order of an epoch when it is asked for the first prompt of it.
                next(iter(self._train_sampler), None)
        return epochs_trained, steps_trained

    def _restore_progress(self) -> None:
        if self._checkpoint is None:
            return
        path = progress_path(self._checkpoint, self.args.process_index)
        progress = Progress(**json.loads(path.read_text(encoding="utf-8")))
        self._step = progress.micro_step
        rollouts = rollouts_path(self._checkpoint, self.args.process_index)
        self._buffered_inputs = load_rollouts(rollouts, self.accelerator.device) if rollouts.is_file() else None
        self._tr_loss.fill_(progress.loss)
        self._total_loss_scalar = progress.total_loss
        self._globalstep_last_logged = progress.last_logged_step
        self._metrics["train"] = defaultdict(list, progress.metrics)
        self._seconds_before = progress.seconds
        # What is reported in the end is about the whole run.
        self._initial_global_step = 0
        if self.args.sync_ref_model:
            state = load_file(self._checkpoint / REFERENCE_NAME)
            load_reference_state(state, self.ref_model, self.model, self.accelerator)

    def _run_epoch(self, **kwargs: Any) -> None:
        # Transformers would train one step more than there are to do.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        return super()._finalize_training(trial, num_train_samples, start_time - self._seconds_before)

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, INCOMPLETE_NAME) if self._is_saving else run_dir

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The upload goes on in the background, so it has to read from where the checkpoint stays.
        if not self._is_saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        final = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged = run_dir / INCOMPLETE_NAME / final.name
        check_free_space(run_dir, self._checkpoint_bytes())
        if self.args.should_save:
            shutil.rmtree(staged.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving = False
        if not self.args.save_only_model:
            self._save_progress(staged)
        if self.state.best_model_checkpoint and Path(self.state.best_model_checkpoint) == staged:
            self.state.best_model_checkpoint = str(final)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            write_manifest(staged, self.state.global_step, self.args.world_size)
            publish(staged, final)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            # Only now: the new one is complete.
            rotate_checkpoints(
                str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _checkpoint_bytes(self) -> int:
        """What a checkpoint takes at least: saved weights, and two moments in fp32 of those that are trained."""
        num_bytes = 0
        for parameter in self.model.parameters():
            # A shard of DeepSpeed has no elements of its own.
            elements = getattr(parameter, "ds_numel", parameter.numel())
            is_saved = parameter.requires_grad or not isinstance(self.model, PeftModel)
            num_bytes += is_saved * elements * parameter.element_size()
            num_bytes += (parameter.requires_grad and not self.args.save_only_model) * 2 * 4 * elements
        return num_bytes

    def _save_progress(self, folder: Path) -> None:
        progress = Progress(
            micro_step=self._step,
            loss=self._tr_loss.item(),
            total_loss=self._total_loss_scalar,
            last_logged_step=self._globalstep_last_logged,
            metrics=dict(self._metrics["train"]),
            seconds=self._seconds_before + time.time() - self._started_at,
        )
        path = progress_path(folder, self.args.process_index)
        path.write_text(json.dumps(asdict(progress)) + "\n", encoding="utf-8")
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            save_rollouts(self._buffered_inputs, rollouts_path(folder, self.args.process_index))
        # A reference that follows the policy is not the one that the run began with.
        if self.args.sync_ref_model:
            state = reference_state(self.ref_model, self.model, self.accelerator)
            if self.args.should_save:
                save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / REFERENCE_NAME)
