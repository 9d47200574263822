# SPDX-License-Identifier: Apache-2.0

"""
Checkpoints from which a stopped run goes on as if it had not been stopped.

The weights at the end are bit by bit those of a run that was never stopped, with the same number of processes and as far as
the device computes the same twice. Transformers restores model, optimizer, scheduler and the state of global random number
generators. Beyond that a checkpoint holds, for every process, TRL's position among buffered rollouts, the rollouts that are
still to be trained on, and losses and metrics since the last log. So a checkpoint can be saved at any step, not only at the end
of a generation. The order of prompts goes on in the epoch where it was. Noise, windows and sampled text depend on seed and
position alone.

A checkpoint is written in the folder `incomplete` of `output_dir` and moved to its place when it is complete. It holds a checksum
of every file, and a run resumes only from files that are as they were written. If the disk has no room for a checkpoint and the
final model, the run does not begin; if it has no room for a later checkpoint, it stops before it writes that.

A checkpoint holds the settings of its run. A run that resumes with others is refused if they cannot change, and says which it
applies if they can; `setting_kinds.py` lists both. While it trains, a run holds the lock of its `output_dir`.

Not restored: the table of `log_completions` until the next rollout, and what reward functions keep for themselves.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import IterableDataset
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import GRPOTrainer

from alphagrpo_ext.models.saving import check_free_space
from alphagrpo_ext.trainer.distributed import Sharding
from alphagrpo_ext.trainer.learning_rates import GroupRate, group_rates, replace_group_rates
from alphagrpo_ext.trainer.reference import load_reference_state, reference_state
from alphagrpo_ext.trainer.resume import processes
from alphagrpo_ext.trainer.resume.checkpoint_folder import (
    INCOMPLETE_NAME,
    publish,
    read_manifest,
    record_files,
    resolve_checkpoint,
    write_manifest,
)
from alphagrpo_ext.trainer.resume.disk_space import check_room, checkpoint_bytes
from alphagrpo_ext.trainer.resume.rollout_buffer import load_rollouts, save_rollouts
from alphagrpo_ext.trainer.resume.setting_kinds import SettingKind
from alphagrpo_ext.trainer.resume.settings import (
    Change,
    changes,
    check_changes,
    config_settings,
    given_settings,
    read_settings_file,
    write_settings,
)
from alphagrpo_ext.trainer.resume.sole_writer import sole_writer


logger = logging.getLogger(__name__)

TRAINER_STATE_NAME = "trainer_state.json"
REFERENCE_NAME = "reference_model.safetensors"


@dataclass(frozen=True)
class Progress:
    """
    The position of a process in training, beyond what Transformers saves.

    Args:
        micro_step (`int`): Micro-batches done: TRL's position among buffered rollouts.
        loss (`float`): Sum of losses since the last log.
        total_loss (`float`): Sum of losses until the last log.
        last_logged_step (`int`): Optimizer step of the last log.
        metrics (`dict[str, list[float]]`): Values since the last log.
        seconds (`float`): Time spent in training, without the time that was lost.
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
    """File of a process' buffered rollouts. It exists only if some of them are still to be trained on."""
    return checkpoint / f"rollouts_{process_index}.pt"


class ExactResume(TrainerCallback):
    """
    Saves the checkpoints of a trainer and restores one. The trainer's overrides call its methods; as a callback it acts after
    the trainer has reset its counters and before its first step.

    Args:
        trainer ([`~trl.GRPOTrainer`]): Whose state is saved and restored.
    """

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.trainer = trainer
        self.checkpoint: Path | None = None
        self.changes: list[Change] = []
        self.sampler: Sampler | None = None
        self.is_saving = False
        self.started_at = 0.0
        self.seconds_before = 0.0
        self._rates: list[GroupRate] | None = None
        self._settings: dict[str, Any] | None = None

    @contextmanager
    def run(self, resume_from_checkpoint: str | bool | None) -> Iterator[Path | None]:
        """
        Hold the lock of the output folder during the block, in which the trainer trains, and yield the checkpoint that it goes on
        from.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): See [`resolve_checkpoint`].

        Raises:
            `FolderInUseError`: If another run writes to the folder.
            `DamagedCheckpointError`: If the checkpoint that is named is not complete, or damaged.
            [`ChangedSettingsError`]: If a setting differs that cannot change.
            `ValueError`: If the checkpoint was saved by another number of processes, or without the state of training.
            `OSError`: If the disk has no room for a checkpoint and the final model.
        """
        args = self.trainer.args
        with sole_writer(args.output_dir):
            self.checkpoint = resolve_checkpoint(resume_from_checkpoint, args.output_dir)
            self.started_at, self.seconds_before = time.time(), 0.0
            if self.trainer.optimizer is not None:
                self.remember_rates(self.trainer.optimizer)
            self._current_settings()
            self.changes = [] if self.checkpoint is None else self.check(self.checkpoint)
            check_room(self.trainer.model, args)
            if self.checkpoint is None:
                # The order of prompts must not depend on an evaluation before training, which a restarted run may have kept.
                set_seed(args.seed, device_specific=True)
            elif said := [str(change) for change in self.changes if change.kind is SettingKind.FREE]:
                if processes.is_main():
                    logger.warning("the run goes on with other settings than it had: %s", "; ".join(said))
            yield self.checkpoint

    def check_run(self, checkpoint: Path | None) -> None:
        """
        Check what `train` checks, before anything else is done: that there is room on the disk, and that the trainer can go on
        from a checkpoint; see [`check_room`] and [`ExactResume.check`].

        Args:
            checkpoint (`Path`, *optional*): From [`resolve_checkpoint`].
        """
        check_room(self.trainer.model, self.trainer.args)
        if checkpoint is not None:
            self.check(checkpoint)

    def check(self, checkpoint: Path) -> list[Change]:
        """
        Check that the trainer can go on from a checkpoint, and return the settings that differ. All processes call it together.

        Args:
            checkpoint (`Path`): A checkpoint that is complete.

        Raises:
            [`ChangedSettingsError`]: If a setting differs that cannot change.
            `ValueError`: If it was saved by another number of processes, or without the state of training.
        """
        args = self.trainer.args
        num_processes = read_manifest(checkpoint).num_processes
        if num_processes != args.world_size:
            raise ValueError(
                f"the checkpoint {checkpoint} was saved with num_processes={num_processes}, but num_processes is "
                f"{args.world_size} now: launch as many to resume, or start a new run from its weights with "
                f"model_name_or_path"
            )
        if not progress_path(checkpoint, args.process_index).is_file():
            raise ValueError(
                f"the checkpoint {checkpoint} holds a model alone, since save_only_model was set: start a new run from "
                f"its weights with model_name_or_path"
            )
        found = changes(read_settings_file(checkpoint) or {}, self._current_settings())
        check_changes(checkpoint, found)
        return found

    def _current_settings(self) -> dict[str, Any]:
        """The settings of the run, as its main process has them before it first trains. All processes ask for them together."""
        if self._settings is None:
            trainer = self.trainer
            given = given_settings(
                model=trainer.accelerator.unwrap_model(trainer.model),
                reference=trainer.ref_model,
                processor=trainer.processing_class,
                train_dataset=trainer.train_dataset,
                reward_funcs=trainer.reward_funcs,
                reward_names=trainer.reward_func_names,
                sharding=Sharding.of(trainer.accelerator).describe(),
            )
            self._settings = processes.gathered({**config_settings(trainer.args), **given})[0]
        return self._settings

    def remember_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the initial learning rates of an optimizer when it is first seen, before a checkpoint replaces them."""
        if self._rates is None:
            self._rates = group_rates(optimizer)

    def _apply_changes(self, state: TrainerState) -> None:
        """Let new settings replace what Transformers restores from a checkpoint."""
        trainer = self.trainer
        state.compute_steps(trainer.args, state.max_steps)
        if any(change.name in ("metric_for_best_model", "greater_is_better") for change in self.changes):
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        if self._rates is not None:
            # The same numbers as restored, unless a setting of the learning rate or of the length is new.
            replace_group_rates(trainer.optimizer, trainer.lr_scheduler, self._rates)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.checkpoint is None:
            return
        self._apply_changes(state)
        trainer = self.trainer
        path = progress_path(self.checkpoint, args.process_index)
        progress = Progress(**json.loads(path.read_text(encoding="utf-8")))
        rollouts = rollouts_path(self.checkpoint, args.process_index)
        device = trainer.accelerator.device
        trainer._buffered_inputs = load_rollouts(rollouts, device) if rollouts.is_file() else None
        trainer._step = progress.micro_step
        trainer._tr_loss.fill_(progress.loss)
        trainer._total_loss_scalar = progress.total_loss
        trainer._globalstep_last_logged = progress.last_logged_step
        trainer._metrics["train"] = defaultdict(list, progress.metrics)
        self.seconds_before = progress.seconds
        # What is reported at the end is about the whole run.
        trainer._initial_global_step = 0
        if trainer.args.sync_ref_model:
            reference = load_file(self.checkpoint / REFERENCE_NAME)
            load_reference_state(reference, trainer.ref_model, trainer.model, trainer.accelerator)

    def position(self, epochs_trained: int, steps_trained: int, steps_per_epoch: int) -> tuple[int, int]:
        """
        Epochs done, and micro-batches done in the epoch that is resumed, whose order of prompts the sampler then draws next.

        Args:
            epochs_trained, steps_trained (`int`): As Transformers counts them.
            steps_per_epoch (`int`): Micro-batches per epoch.
        """
        epoch = self.trainer.state.epoch
        if isinstance(self.trainer.train_dataset, IterableDataset) and epoch:
            # Transformers assumes that a stream never ends, but one that has ended began again.
            return int(epoch), round((epoch - int(epoch)) * steps_per_epoch)
        if self.sampler is not None:
            for _ in range(epochs_trained):
                # TRL's sampler draws the order of an epoch when it is asked for the first prompt of it.
                next(iter(self.sampler), None)
        return epochs_trained, steps_trained

    def output_dir(self, run_dir: str) -> str:
        """Folder in which Transformers puts checkpoints: while one is saved, the folder of incomplete ones."""
        return os.path.join(run_dir, INCOMPLETE_NAME) if self.is_saving else run_dir

    @contextmanager
    def saved_checkpoint(self, run_dir: Path) -> Iterator[None]:
        """
        While the block runs, Transformers saves a checkpoint. After it the checkpoint is completed and moved to its place.

        Args:
            run_dir (`Path`): Folder of the run.
        """
        trainer, args = self.trainer, self.trainer.args
        final = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        staged = run_dir / INCOMPLETE_NAME / final.name
        check_free_space(run_dir, checkpoint_bytes(trainer.model, args))
        if args.should_save:
            shutil.rmtree(staged.parent, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        self.is_saving = True
        try:
            yield
        finally:
            self.is_saving = False
        if not args.save_only_model:
            self._save_progress(staged)
        if trainer.state.best_model_checkpoint and Path(trainer.state.best_model_checkpoint) == staged:
            trainer.state.best_model_checkpoint = str(final)
        if args.should_save:
            trainer.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            write_settings(staged, self._settings)
        trainer.accelerator.wait_for_everyone()
        files = record_files(staged, args.save_on_each_node)
        if args.should_save:
            write_manifest(staged, trainer.state.global_step, args.world_size, files)
            publish(staged, final)
        trainer.accelerator.wait_for_everyone()
        if args.push_to_hub:
            trainer._push_from_checkpoint(str(final))
        if args.should_save:
            # Old checkpoints go only when the new one is complete.
            rotate_checkpoints(
                str(run_dir),
                save_total_limit=args.save_total_limit,
                best_model_checkpoint=trainer.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _save_progress(self, folder: Path) -> None:
        trainer, args = self.trainer, self.trainer.args
        progress = Progress(
            micro_step=trainer._step,
            loss=trainer._tr_loss.item(),
            total_loss=trainer._total_loss_scalar,
            last_logged_step=trainer._globalstep_last_logged,
            metrics=dict(trainer._metrics["train"]),
            seconds=self.seconds_before + time.time() - self.started_at,
        )
        path = progress_path(folder, args.process_index)
        path.write_text(json.dumps(asdict(progress)) + "\n", encoding="utf-8")
        if trainer._step % (args.steps_per_generation * trainer.num_iterations):
            save_rollouts(trainer._buffered_inputs, rollouts_path(folder, args.process_index))
        # A reference that follows the policy is no longer the one that the run began with.
        if args.sync_ref_model:
            state = reference_state(trainer.ref_model, trainer.model, trainer.accelerator)
            if args.should_save:
                save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / REFERENCE_NAME)
