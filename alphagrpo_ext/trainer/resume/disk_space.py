# SPDX-License-Identifier: Apache-2.0

"""The room that a run needs on the disk, checked before it begins."""

from __future__ import annotations

import logging

import torch
from peft import PeftModel

from alphagrpo_ext.models.saving import check_free_space
from alphagrpo_ext.trainer.config import AlphaGRPOConfig


logger = logging.getLogger(__name__)


def model_bytes(model: torch.nn.Module) -> int:
    """Size in bytes of a saved model: all weights, or those of its adapter."""
    return sum(
        _elements(parameter) * parameter.element_size()
        for parameter in model.parameters()
        if parameter.requires_grad or not isinstance(model, PeftModel)
    )


def checkpoint_bytes(model: torch.nn.Module, args: AlphaGRPOConfig) -> int:
    """Least size of a checkpoint in bytes: saved weights and, where its size is known, the optimizer's state of trained ones."""
    return model_bytes(model) + (0 if args.save_only_model else optimizer_bytes(model, args) or 0)


def optimizer_bytes(model: torch.nn.Module, args: AlphaGRPOConfig) -> int | None:
    """Least size of the optimizer's state in bytes; `None` if it is not known."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if args.deepspeed_plugin is not None:
        # Weights in fp32 and two moments of each.
        return sum(12 * _elements(parameter) for parameter in trained)
    name = str(getattr(args.optim, "value", args.optim))
    if name == "sgd":
        return 0
    if name.startswith("adamw_torch") and "bit" not in name:
        return sum(2 * _elements(parameter) * parameter.element_size() for parameter in trained)
    return None


def check_room(model: torch.nn.Module, args: AlphaGRPOConfig) -> None:
    """
    Check that the disk of `output_dir` has room for the final model and, if the run saves checkpoints, for one beside those that
    are there.

    Args:
        model (`torch.nn.Module`): The policy, not wrapped.
        args ([`AlphaGRPOConfig`]): Its configuration.

    Raises:
        `OSError`: If it has less room; the message gives both figures.
    """
    needed = model_bytes(model)
    if str(getattr(args.save_strategy, "value", args.save_strategy)) != "no":
        needed += checkpoint_bytes(model, args)
        if not args.save_only_model and optimizer_bytes(model, args) is None:
            logger.warning(
                "the size of the state of optim=%s is not known: room for the weights of a checkpoint alone was looked for",
                getattr(args.optim, "value", args.optim),
            )
    check_free_space(args.output_dir, needed)


def _elements(parameter: torch.nn.Parameter) -> int:
    # A shard of DeepSpeed has no elements of its own.
    return getattr(parameter, "ds_numel", parameter.numel())
