# SPDX-License-Identifier: Apache-2.0

"""Learning rates of the two experts, as parameter groups of the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR

from alphagrpo_ext.trainer.config import AlphaGRPOConfig


def check_optimizer_is_made_here(args: AlphaGRPOConfig, optimizer: torch.optim.Optimizer | None) -> None:
    """
    Check that `generation_learning_rate` can have an effect.

    Raises:
        `ValueError`: If the optimizer is passed to the trainer or is DeepSpeed's own, which do not know the experts.
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
    Split every parameter group of a new optimizer in two, so that parameters that only the generation of images uses have their
    own learning rate.

    The other settings of a group, such as its weight decay, stay. The scheduler, which is made later, scales each group from
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
    # The trainer logs the rate of the first group, which is the understanding expert's if that is trained.
    optimizer.param_groups[:] = groups


@dataclass(frozen=True)
class GroupRate:
    """
    The initial learning rate of a parameter group, before a scheduler scales it.

    Args:
        rate (`float`): The rate.
        is_empty (`bool`): Whether the group has no parameters. DeepSpeed leaves out such groups.
    """

    rate: float
    is_empty: bool


def group_rates(optimizer: torch.optim.Optimizer) -> list[GroupRate]:
    """Initial learning rate of every parameter group of an optimizer."""
    return [GroupRate(group.get("initial_lr", group["lr"]), not group["params"]) for group in optimizer.param_groups]


def replace_group_rates(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, rates: Sequence[GroupRate]
) -> None:
    """
    Give an optimizer and a scheduler whose states were restored new initial learning rates. The scheduler stays at its step, and
    its own factor of that step applies at once.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer.
        scheduler (`torch.optim.lr_scheduler.LRScheduler`):
            Its scheduler, possibly wrapped. One that is not a `LambdaLR` is left as it is.
        rates (`Sequence[GroupRate]`): From [`group_rates`], before the states were restored.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(scheduler, LambdaLR):
        return
    groups = optimizer.param_groups
    chosen = [group.rate for group in rates if len(groups) == len(rates) or not group.is_empty]
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    for group, rate, factor in zip(groups, chosen, factors, strict=True):
        group["initial_lr"], group["lr"] = rate, rate * factor
    scheduler.base_lrs = chosen
    scheduler._last_lr = [group["lr"] for group in groups]
