# SPDX-License-Identifier: Apache-2.0

"""Learning rates of the two experts as groups of the optimizer's parameters."""

from __future__ import annotations

import torch
from peft import PeftModel

from alphagrpo_ext.trainer.config import AlphaGRPOConfig


def check_optimizer_is_made_here(args: AlphaGRPOConfig, optimizer: torch.optim.Optimizer | None) -> None:
    """
    Check that `generation_learning_rate` can have an effect.

    Raises:
        `ValueError`: If the optimizer is another's, who knows no experts: passed to the trainer, or DeepSpeed's own.
    """
    if args.generation_learning_rate is None:
        return
    setting = f"generation_learning_rate={args.generation_learning_rate} has no effect on an optimizer that"
    if optimizer is not None:
        raise ValueError(
            f"{setting} is passed: give that one parameter groups, and leave generation_learning_rate out"
        )
    plugin = args.deepspeed_plugin
    if plugin is not None and "optimizer" in plugin.deepspeed_config:
        raise ValueError(f"{setting} DeepSpeed makes: remove 'optimizer' from its configuration")


def set_generation_learning_rate(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, policy: torch.nn.Module, learning_rate: float
) -> None:
    """
    Split every group of a fresh optimizer in two: what only the generation of images uses gets its own learning rate.

    Everything else of a group, such as its weight decay, stays. A scheduler, which is made later, scales each group from
    its own initial rate.

    Args:
        optimizer (`torch.optim.Optimizer`): Before its first step.
        model (`torch.nn.Module`): The policy, possibly wrapped; names its parameters.
        policy ([`UnifiedModel`] or [`~peft.PeftModel`]): The same, unwrapped; tells the experts apart.
        learning_rate (`float`): Learning rate of the generation expert.
    """
    policy = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    family = policy.family
    generation = {id(p) for name, p in model.named_parameters() if family.is_generation_parameter(name)}
    groups = []
    for group in optimizer.param_groups:
        own = [parameter for parameter in group["params"] if id(parameter) in generation]
        others = [parameter for parameter in group["params"] if id(parameter) not in generation]
        groups += [{**group, "params": others}] if others else []
        groups += [{**group, "params": own, "lr": learning_rate}] if own else []
    # The trainer logs the rate of the first group: the understanding expert's, if that is trained.
    optimizer.param_groups[:] = groups
