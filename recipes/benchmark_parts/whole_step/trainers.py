# SPDX-License-Identifier: Apache-2.0

"""Trainers of whole steps: first images, rollout, reward and update."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from transformers import PrinterCallback

from alphagrpo_ext.shapes.prompts import build_dataset
from alphagrpo_ext.trainer import AlphaGRPOConfig, AlphaGRPOTrainer
from benchmark_parts.sizes import Size
from benchmark_parts.text_overhead import StepTimes
from benchmark_parts.workload import GUIDANCE, build_image_processor, build_model


STEP_SETTINGS: dict[str, dict[str, Any]] = {
    "reasoning_t2i": {
        **{"num_timesteps": 16, "sde_window_size": 10, "sde_window_range": [0, 11]},
        **{"cfg_text_scale": 4.0, "cfg_interval": [0.4, 1.0]},
    },
    "self_reflection": {
        **{"num_timesteps": 40, "sde_window_size": 5, "sde_window_range": [0, 15]},
        **{"cfg_text_scale": GUIDANCE.text_scale, "cfg_img_scale": GUIDANCE.image_scale},
    },
}
"""The paper's sampling by task. Self-reflection has its interval of guidance, all steps, from the task."""


@dataclass(frozen=True)
class WholeStep:
    """
    What one optimizer step trains on, and which weights. Self-reflection paints an initial image for every two samples, as the
    paper does.

    Args:
        task (`str`): One of [`STEP_SETTINGS`].
        num_samples (`int`): Trajectories per step.
        group_size (`int`): Trajectories per prompt, an even number that divides them.
        lora_rank (`int`, *optional*, defaults to `0`): Rank of an adapter on both experts; 0 trains all weights.
    """

    task: str
    num_samples: int
    group_size: int
    lora_rank: int = 0


def make_step_trainer(
    step: WholeStep,
    size: Size,
    reward: Callable[..., list[float]],
    output_dir: str,
    bf16: bool,
    arguments: Mapping[str, Any],
) -> AlphaGRPOTrainer:
    """
    Make a trainer of a model of a size. It has all samples in one micro-batch, and trains for one optimizer step.

    Args:
        step ([`WholeStep`]): What a step trains on.
        size ([`Size`]): Model and lengths of texts.
        reward (`Callable`): Reward function.
        output_dir (`str`): Output directory of the trainer, in which it writes nothing.
        bf16 (`bool`): Whether to train under autocast.
        arguments (`Mapping[str, Any]`): Further arguments of the trainer, which win.
    """
    model = build_model(size)
    settings: dict[str, Any] = {
        **{"output_dir": output_dir, "task": step.task, "bf16": bf16, "use_cpu": True},
        **{"image_height": size.image_size, "image_width": size.image_size},
        **{"max_completion_length": size.thought_tokens, "top_p": 1.0},
        **{"per_device_train_batch_size": step.num_samples, "num_generations": step.group_size},
        **{"num_initial_images": step.group_size // 2, "max_steps": 1, "gradient_checkpointing": False},
        **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True},
        **STEP_SETTINGS[step.task],
    }
    targets, rank = model.family.lora_target_modules("both"), step.lora_rank
    trainer = AlphaGRPOTrainer(
        model=model,
        processing_class=build_image_processor(size),
        reward_funcs=reward,
        args=AlphaGRPOConfig(**settings | dict(arguments)),
        train_dataset=build_dataset("train", max(8, step.num_samples), seed=0),
        peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets) if rank else None,
    )
    # It prints every log where there is no progress bar.
    trainer.remove_callback(PrinterCallback)
    return trainer


def interleaved_step_seconds(trainers: Mapping[str, AlphaGRPOTrainer], repetitions: int) -> dict[str, list[float]]:
    """
    CPU seconds of one step of each trainer, in turn, after a step that does not count.

    Args:
        trainers (`Mapping[str, AlphaGRPOTrainer]`): Trainers of one step, by name.
        repetitions (`int`): Number of steps of each that count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for repetition in range(-1, repetitions):
        for name, trainer in trainers.items():
            times = StepTimes(time.process_time)
            trainer.add_callback(times)
            trainer.train()
            trainer.remove_callback(times)
            if repetition >= 0:
                seconds[name] += times.seconds
    return seconds
