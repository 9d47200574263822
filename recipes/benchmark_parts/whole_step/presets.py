# SPDX-License-Identifier: Apache-2.0

"""Whole training steps under the presets of sampling."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import PrinterCallback

from alphagrpo_ext.rollout.presets import PRESETS
from alphagrpo_ext.shapes.prompts import build_dataset
from alphagrpo_ext.trainer import AlphaGRPOConfig, AlphaGRPOTrainer
from benchmark_parts.sizes import Size
from benchmark_parts.text_overhead import StepTimes
from benchmark_parts.workload import GUIDANCE, build_image_processor, build_model


MIN_GROUP_SIZE = 4
"""Fewest samples of a group in which `fast` shares thoughts."""


def reflection_trainers(
    size: Size, reward: Callable[..., list[float]], output_dir: str, bf16: bool
) -> dict[str, AlphaGRPOTrainer]:
    """
    Trainers of self-reflection by preset, for one step on one group each: 40 points of which 5 steps are trained, and one initial
    image for every two samples, as in the paper.

    Args:
        size ([`Size`]): Model, lengths of texts, and number of samples.
        reward (`Callable`): Reward function.
        output_dir (`str`): Output directory of the trainers, in which they write nothing.
        bf16 (`bool`): Whether to train under autocast.
    """
    group_size = max(size.num_trajectories, MIN_GROUP_SIZE)
    settings: dict[str, Any] = {
        **{"output_dir": output_dir, "task": "self_reflection", "bf16": bf16, "use_cpu": True},
        **{"image_height": size.image_size, "image_width": size.image_size},
        **{"max_completion_length": size.thought_tokens, "top_p": 1.0},
        **{"num_timesteps": 40, "sde_window_size": 5, "sde_window_range": [0, 15]},
        **{"cfg_text_scale": GUIDANCE.text_scale, "cfg_img_scale": GUIDANCE.image_scale},
        **{"per_device_train_batch_size": group_size, "num_generations": group_size},
        **{"num_initial_images": group_size // 2, "max_steps": 1, "gradient_checkpointing": False},
        **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True},
    }
    trainers = {
        preset: AlphaGRPOTrainer(
            model=build_model(size),
            processing_class=build_image_processor(size),
            reward_funcs=reward,
            args=AlphaGRPOConfig(**settings, preset=preset),
            train_dataset=build_dataset("train", 8, seed=0),
        )
        for preset in PRESETS
    }
    for trainer in trainers.values():
        # It prints every log where there is no progress bar.
        trainer.remove_callback(PrinterCallback)
    return trainers


def interleaved_step_seconds(trainers: dict[str, AlphaGRPOTrainer], repetitions: int) -> dict[str, list[float]]:
    """
    CPU seconds of one step of each trainer, in turn, after a step that does not count.

    Args:
        trainers (`dict[str, AlphaGRPOTrainer]`): Trainers of one step, by name.
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


def evaluations_per_image(trainer: AlphaGRPOTrainer) -> int:
    """Evaluations of the network that a training rollout takes for an image, which branches share in part."""
    return len(trainer.args.train_rollout(0).denoising.path().timesteps) - 1
