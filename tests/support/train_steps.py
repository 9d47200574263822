# SPDX-License-Identifier: Apache-2.0

"""Trains a few steps, alone or as one of several processes, and saves what came out."""

import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from alphagrpo_ext.models.bagel import LORA_TARGET_MODULES
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.objectives.regularizers import score_transitions
from alphagrpo_ext.rollout.tasks.self_reflection import SelfReflection
from alphagrpo_ext.shapes.prompts import build_dataset
from alphagrpo_ext.trainer import AlphaGRPOConfig, AlphaGRPOTrainer
from alphagrpo_ext.trainer.scoring.scores import PackedScores
from alphagrpo_ext.trajectory import Segment, TextSegment


GATHERS = ("c10d::_allgather_base_", "c10d::allgather_", "c10d::allgather_into_tensor_coalesced_")
SETTINGS = {
    "image_height": 24,
    "image_width": 24,
    "num_timesteps": 6,
    "timestep_shift": 1.0,
    "sde_window_size": 2,
    "sde_window_range": [0, 5],
    "max_completion_length": 10,
    "num_generations": 4,
    "max_steps": 1,
    # The step of plain gradient descent is the gradient; Adam's first one is only its sign, which turns rounding of
    # gradients near 0 into whole steps.
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
}


@dataclass
class Outcome:
    """
    What all processes of a run saw.

    Args:
        rollouts (`list`): Task, reward, start of the window and text of every sample, in order of steps and ranks.
        num_processes (`int`): Size of the run.
        distributed_type (`str`): What accelerate made of it.
        num_parameters (`list[int]`): Elements of parameters that each process holds between two steps.
        num_wrapped (`int`): Modules that gather their parameters on their own.
        gathers (`list[int]`): Collective gathers of every rollout of rank 0.
        sampled_log_probs, scored_log_probs (`list[list[float]]`):
            For every step the sum of log-probabilities of the texts of a process and the mean of those of its transitions,
            averaged over processes, as the rollout and as the packed forward of the loss saw them.
        exchanges (`list[bool]`): Whether DDP exchanged gradients in each backward of rank 0.
    """

    rollouts: list[Any] = field(default_factory=list)
    num_processes: int = 1
    distributed_type: str = ""
    num_parameters: list[int] = field(default_factory=list)
    num_wrapped: int = 0
    gathers: list[int] = field(default_factory=list)
    sampled_log_probs: list[list[float]] = field(default_factory=list)
    scored_log_probs: list[list[float]] = field(default_factory=list)
    exchanges: list[bool] = field(default_factory=list)


def held_elements(parameter: torch.Tensor) -> int:
    """Elements of a parameter in the memory of this process."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    return parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel()


class ObservedTrainer(AlphaGRPOTrainer):
    """Notes what a rollout gathers, and what the packed forward of the loss makes of its texts and images."""

    def __init__(self, outcome: Outcome, **kwargs: Any) -> None:
        self.outcome = outcome
        super().__init__(**kwargs)
        sample, score, backward = self.rollout_func, self.scorer.score, self.accelerator.backward

        def observed_score(*args: Any) -> PackedScores:
            scores = score(*args)
            if torch.is_grad_enabled():
                self.note_scores(scores)
            return scores

        self.rollout_func = lambda *args: self.note_gathers(lambda: sample(*args))

        def observed_backward(*args: Any, **kwargs: Any) -> None:
            self.outcome.exchanges.append(getattr(self.model_wrapped, "require_backward_grad_sync", False))
            backward(*args, **kwargs)

        self.scorer.score, self.accelerator.backward = observed_score, observed_backward

    def note_scores(self, scores: PackedScores) -> None:
        images, objective = scores.images, self.image_loss.objective.config
        log_probs = score_transitions(images, images.velocities, objective).log_prob.mean()
        local = [scores.log_probs.sum().item(), log_probs.item()]
        self.outcome.scored_log_probs.append(np.mean(gather_object([local]), axis=0).tolist())

    def note_gathers(self, sample: Callable[[], dict[str, list[Any]]]) -> dict[str, list[Any]]:
        parameters = list(self.model.parameters())
        self.outcome.num_parameters = [sum(held_elements(parameter) for parameter in parameters)]
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            output = sample()
        assert self.outcome.num_parameters == [sum(held_elements(parameter) for parameter in parameters)]
        self.outcome.gathers.append(sum(e.count for e in profiler.key_averages() if e.key in GATHERS))
        return output


def stops_by_chance(
    self: SelfReflection, contexts: Sequence[Sequence[Segment]], texts: Sequence[TextSegment], *models: Any
) -> list[bool]:
    """A method `which_paint`: all samples of every second request stop, and about half of the others, whatever the process."""
    return [
        sum(context[-1].token_ids) % 2 == 0 and sum(text.token_ids) % 2 == 0
        for context, text in zip(contexts, texts, strict=True)
    ]


def main(model_path: str, output_path: str, settings: dict[str, Any]) -> None:
    """
    Args:
        model_path (`str`): Checkpoint to start from.
        output_path (`str`): Folder for `model`, what was trained, and `outcome.json`.
        settings (`dict`): Of [`AlphaGRPOConfig`], beside those above; `lora` trains an adapter, `resume` names a checkpoint
            to go on from, `tasks` those that the prompts are dealt out to, in turn, and `stops` ends some reflections without
            painting.
    """
    outcome = Outcome()
    lora, resume = settings.pop("lora", False), settings.pop("resume", None)
    tasks = settings.pop("tasks", None)
    if settings.pop("stops", False):
        SelfReflection.which_paint = stops_by_chance

    def brightness(images: list, trajectory: list, task: list[str], **kwargs: Any) -> list[float]:
        rewards = [float(np.asarray(image).mean()) / 255 for image in images]
        if trajectory[0] is None:
            # An image that is to be refined: no action.
            return rewards
        starts = [t.sampled_images[0].window.start if t.sampled_images else None for t in trajectory]
        texts = [t.sampled_texts[0].token_ids for t in trajectory]
        local = list(zip(task, rewards, starts, texts, strict=True))
        outcome.rollouts.extend(gather_object(local))
        text = sum(sum(t.sampled_texts[0].log_probs) for t in trajectory)
        image = np.mean([i.window.log_probs.mean().item() for t in trajectory for i in t.sampled_images[:1]] or [0.0])
        outcome.sampled_log_probs.append(np.mean(gather_object([[text, image]]), axis=0).tolist())
        return rewards

    dataset = build_dataset("train", 8, seed=0)
    if tasks:
        dataset = dataset.add_column("task", list(itertools.islice(itertools.cycle(tasks), len(dataset))))
    args = AlphaGRPOConfig(output_dir=f"{output_path}/run", **(SETTINGS | settings))
    model, processor = load_model(model_path)
    trainer = ObservedTrainer(
        outcome,
        model=model,
        reward_funcs=brightness,
        args=args,
        train_dataset=dataset,
        processing_class=processor,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGET_MODULES) if lora else None,
    )
    if deepspeed := trainer.accelerator.state.deepspeed_plugin:
        # Parameters this small would not be given back after the first step.
        deepspeed.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    trainer.train(resume_from_checkpoint=resume)
    outcome.num_processes = trainer.accelerator.num_processes
    outcome.distributed_type = trainer.accelerator.distributed_type.value
    outcome.num_wrapped = sum(type(module).__name__.startswith("FSDP") for module in trainer.model.modules())
    outcome.num_parameters = gather_object(outcome.num_parameters)
    trainer.save_model(f"{output_path}/model")
    if trainer.accelerator.is_main_process:
        Path(output_path, "outcome.json").write_text(json.dumps(asdict(outcome)))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
    # Threads of Gloo that outlive the interpreter may abort the process, though all of its work is done.
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)
