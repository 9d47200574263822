# SPDX-License-Identifier: Apache-2.0

"""Gathers the parameters of a sharded policy once per rollout, instead of once per token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from trl.distributed import DistributedBackend
from trl.models import unwrap_model_for_generation

from alphagrpo_ext.models.contract import UnifiedModel


@dataclass(frozen=True)
class Sharding:
    """
    How the parameters of the policy are distributed over processes.

    Args:
        zero_stage (`int`): Stage of DeepSpeed's ZeRO. 0 without DeepSpeed.
        fsdp_version (`int` or `None`): 2 for FSDP2. `None` without FSDP.
    """

    zero_stage: int
    fsdp_version: int | None

    @classmethod
    def of(cls, accelerator: Accelerator) -> Sharding:
        backend = DistributedBackend(accelerator)
        return cls(zero_stage=backend.zero_stage, fsdp_version=backend.fsdp_version)

    @property
    def shards_parameters(self) -> bool:
        """Whether a process holds only a part of each parameter, so that all processes must run the same modules together."""
        return self.zero_stage == 3 or self.fsdp_version is not None

    def describe(self) -> str:
        """Name of the sharding, e.g. `"ZeRO 2"`."""
        if self.fsdp_version is not None:
            return f"FSDP {self.fsdp_version}"
        return f"ZeRO {self.zero_stage}" if self.zero_stage else "none"


def check_sharding(sharding: Sharding, gather_for_generation: bool, steps_per_forward: int | str = "auto") -> None:
    """
    Check that a rollout can end under a sharding, and that an update has the right gradient.

    Args:
        sharding ([`Sharding`]): Sharding of the policy.
        gather_for_generation (`bool`): TRL's `ds3_gather_for_generation`.
        steps_per_forward (`int` or `str`, *optional*, defaults to `"auto"`): `image_steps_per_forward`.

    Raises:
        `ValueError`: If one of them could not. The message says what to set instead.
    """
    if sharding.fsdp_version == 1:
        raise ValueError(
            "FSDP version 1 flattens parameters, which a rollout cannot gather once: set fsdp_version: 2 in the file of "
            "accelerate, as recipes/accelerate_configs/fsdp2.yaml does"
        )
    if sharding.zero_stage == 3 and not gather_for_generation:
        raise ValueError(
            "ds3_gather_for_generation=False would gather parameters once a token, and processes whose texts differ in "
            "length would wait for each other forever: leave it at True, or use recipes/accelerate_configs/zero2.yaml"
        )
    if sharding.zero_stage == 3 and isinstance(steps_per_forward, int):
        # DeepSpeed's buffers keep the last step's gradient until the first backward of the next one overwrites it, and that
        # of a part does not reach all parameters.
        raise ValueError(
            f"image_steps_per_forward={steps_per_forward} has a wrong gradient under ZeRO 3, where parameters that only a later "
            "backward of a step reaches keep the gradient of the step before: use recipes/accelerate_configs/fsdp2.yaml or "
            "zero2.yaml, or leave image_steps_per_forward at 'auto'"
        )


def prepare_sharding(
    accelerator: Accelerator, gather_for_generation: bool, steps_per_forward: int | str = "auto"
) -> Sharding:
    """
    How the policy is sharded, after [`check_sharding`] and [`use_uniform_precision`]. Called before the model is prepared.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Accelerator of the trainer.
        gather_for_generation, steps_per_forward: As in [`check_sharding`].
    """
    sharding = Sharding.of(accelerator)
    check_sharding(sharding, gather_for_generation, steps_per_forward)
    use_uniform_precision(accelerator)
    return sharding


def use_uniform_precision(accelerator: Accelerator) -> None:
    """
    Keep FSDP2 from casting the inputs of forwards, so that the packed forward sees the times that the rollout saw, which have
    two or three digits in bf16. Gradients are summed in fp32, as in DDP.

    Call it before the model is prepared. It does nothing without FSDP2.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def sum_over_processes(metrics: Mapping[str, float], accelerator: Accelerator) -> dict[str, float]:
    """Sum numbers that every process knows by the same names."""
    totals = accelerator.reduce(torch.tensor(list(metrics.values()), device=accelerator.device))
    return dict(zip(metrics, totals.tolist(), strict=True))


@contextmanager
def gathered_policy(
    model: torch.nn.Module, accelerator: Accelerator, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> Iterator[UnifiedModel]:
    """
    The policy with whole parameters, for calls that are not its forward: prefill, sampling, painting, answering.

    All processes enter and leave together. In between no process waits for another, so that each may generate as much as it
    likes. Meanwhile a process holds all parameters. What is written to them is lost.

    Args:
        model (`torch.nn.Module`): The policy, wrapped by DDP, DeepSpeed or FSDP2, or not at all.
        accelerator ([`~accelerate.Accelerator`]): Accelerator that wrapped it.
        gradient_checkpointing_kwargs (`dict`, *optional*): Arguments to switch gradient checkpointing on again, if it is on.
    """
    with (
        unwrap_model_for_generation(
            model, accelerator, gradient_checkpointing_kwargs=gradient_checkpointing_kwargs
        ) as policy,
        _unsharded(policy) if isinstance(policy, FSDPModule) else nullcontext(),
        _on_device(policy, accelerator.device),
    ):
        yield policy


@contextmanager
def _on_device(policy: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """A model that FSDP2 or DeepSpeed have yet to shard is in the memory of the host. Move it for the time of the block."""
    home = policy.device
    if home == device:
        yield
        return
    policy.to(device)
    try:
        yield
    finally:
        policy.to(home)


@contextmanager
def _unsharded(model: FSDPModule) -> Iterator[None]:
    """Gather the parameters of FSDP2 once, and keep them through any number of forwards of submodules."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    # The first module that runs becomes the root, and here that would be a submodule.
    model._get_fsdp_state()._lazy_init()
    groups = [module._get_fsdp_state()._fsdp_param_group for module in modules]
    groups = [group for group in dict.fromkeys(groups) if group is not None]
    # FSDP2 has a setter for this and no getter, and the modules differ in it.
    resharding = [group.post_forward_mesh_info for group in groups]
    model.set_reshard_after_forward(False)
    try:
        for module in modules:
            module.unshard()
        yield
    finally:
        for group, value in zip(groups, resharding, strict=True):
            group.post_forward_mesh_info = value
        for module in modules:
            module.reshard()
