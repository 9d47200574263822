# SPDX-License-Identifier: Apache-2.0

"""Rollouts with and without an adapter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.adapters import freeze_parts
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator, generator
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.rollout.generator import sample_generator
from benchmark_parts.sizes import Size
from benchmark_parts.workload import build_image_processor, build_model


WITHOUT_ADAPTER = "without an adapter"
NUM_POINTS = 16


def build_sampled_policy(size: Size, weights: torch.dtype, lora_rank: int = 0) -> torch.nn.Module:
    """The model of a size as it is trained: all of it, or a new adapter in fp32 on both experts."""
    model = build_model(size)
    for name, parameter in model.named_parameters():
        if not model.family.keeps_fp32(name):
            parameter.data = parameter.data.to(weights)
    if not lora_rank:
        return model
    targets = model.family.lora_target_modules("both")
    policy = get_peft_model(model, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=targets))
    freeze_parts(policy)
    return policy


def make_rollout(size: Size, autocast: bool) -> Callable[[torch.nn.Module], None]:
    """
    Make a function that rolls a policy out for one prompt, with a thought and text guidance in all steps.

    Args:
        size ([`Size`]): Lengths, and the number of samples.
        autocast (`bool`): Whether to sample under autocast to bf16.
    """
    processor, task = build_image_processor(size), TASKS.get("reasoning_t2i")(think=True)
    guidance = GuidanceConfig(text_scale=4.0, interval=(0.0, 1.0))
    denoising = DenoisingConfig(NUM_POINTS, guidance=guidance, window_start=0, window_size=size.num_steps)
    config = RolloutConfig(size.image_size, size.image_size, max_new_tokens=size.thought_tokens, denoising=denoising)
    rows = [{"prompt": "a red circle"}] * size.num_trajectories

    def rollout(policy: torch.nn.Module) -> None:
        generators = [sample_generator(0, 0, index) for index in range(size.num_trajectories)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            RolloutGenerator(policy, processor, task)(rows, generators, config)

    return rollout


def rollout_calls(size: Size, weights: torch.dtype, autocast: bool) -> dict[str, Callable[[], object]]:
    """
    Rollouts of one prompt: without an adapter, with one as PEFT computes it, and with one as rollouts compute it.

    Args:
        size ([`Size`]): The model, and the number of samples.
        weights (`torch.dtype`): Type of the model's weights.
        autocast (`bool`): Whether to sample under autocast to bf16.
    """
    plain, adapted = build_sampled_policy(size, weights), build_sampled_policy(size, weights, lora_rank=32)
    rollout = make_rollout(size, autocast)

    def as_peft_computes_it() -> None:
        with patch.object(generator, "merged_adapters", lambda model: nullcontext()):
            rollout(adapted)

    return {
        WITHOUT_ADAPTER: lambda: rollout(plain),
        "adapter, as PEFT computes it": as_peft_computes_it,
        "adapter": lambda: rollout(adapted),
    }
