# SPDX-License-Identifier: Apache-2.0

"""
The reference policy: a frozen copy of the policy, or of its adapter, as it was before training, or a moving average of it.

A KL compares the policy with it. With `rollout_policy="reference"` it also samples the rollouts, and is then the old policy of
the ratios. DiffusionNFT's experiments sample so, with a copy that keeps the share `min(0.001 i, 0.5)` of itself at update i; the
default is the current policy (its `eta = 0`), which the paper finds quick at first and prone to collapse (section 3.3).

- The copy needs no folder to load from: TRL would load the reference from the folder that the policy came from, which need not
  exist. A policy with an adapter is its own reference, with the adapter switched off, or with a second adapter `"ref"`.
- `sync_ref_model` works with an adapter, where TRL refuses it: the second adapter follows the first one, and the final model has
  it in its folder `ref`. DeepSpeed ZeRO-3 leaves no process a whole parameter that could follow.
- Beside a reference that follows, images can be compared with the model before training, too (`image_base_beta`): a second frozen
  copy, or the policy with its adapter switched off. A checkpoint does not have it, because a resumed run begins from the same model.
- A reference that follows is kept whole in a checkpoint, be it a model or an adapter: under FSDP Transformers restores only the
  adapter that is trained, and the state of a sharded model is a share of each weight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from trl import GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import use_adapter

from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from alphagrpo_ext.trainer.distributed import gathered_policy


if TYPE_CHECKING:
    from alphagrpo_ext.trainer.scoring.scores import RolloutScores
    from alphagrpo_ext.trainer.step import RolloutStep


REFERENCE_ADAPTER = "ref"
"""TRL's name of the adapter that a policy with an adapter is compared with."""


def frozen_copy(policy: PreTrainedModel) -> PreTrainedModel:
    """
    Copy a policy with its data type and device; the copy is not trained. It is loaded from the policy's folder where DeepSpeed
    has already partitioned the weights, which cannot be copied then.
    """
    if any(hasattr(parameter, "ds_id") for parameter in policy.parameters()):
        reference, _ = load_model(
            policy.config._name_or_path,
            dtype=policy.dtype,
            attn_implementation=policy.config._attn_implementation,
        )
    else:
        reference = copy.deepcopy(policy)
        # A forward that an earlier trainer has wrapped would lead the copy back to the policy.
        vars(reference).pop("forward", None)
    return reference.requires_grad_(False).eval()


def prepare_reference(
    reference: PreTrainedModel | None, accelerator: Accelerator, offload: bool
) -> torch.nn.Module | None:
    """
    Shard or place a reference model as the launcher's configuration says.

    Args:
        reference (`PreTrainedModel`, *optional*): A frozen model. `None`, of a run that has none, is returned.
        accelerator (`Accelerator`): Accelerator of the trainer.
        offload (`bool`): Whether it stays in the host's memory; see [`visit_device`].

    Raises:
        `ValueError`: If it is to be offloaded, but DeepSpeed or FSDP places it.
    """
    if reference is None:
        return None
    kind = accelerator.distributed_type.value
    if offload:
        if kind in ("DEEPSPEED", "FSDP"):
            raise ValueError(
                f"offload_ref_model=True cannot move a reference model that {kind} places; set it to False and let "
                f"the launcher's configuration offload parameters to the CPU"
            )
        return reference.cpu()
    if kind == "DEEPSPEED":
        return prepare_deepspeed(reference, accelerator)
    if kind == "FSDP":
        return prepare_fsdp(reference, accelerator)
    return accelerator.prepare_model(reference, evaluation_mode=True)


def visit_device(model: torch.nn.Module, accelerator: Accelerator, is_offloaded: bool) -> AbstractContextManager[None]:
    """While the block runs, a model that is kept in the host's memory is on the accelerator."""
    return on_device(model, accelerator.device) if is_offloaded else nullcontext()


@contextmanager
def on_device(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


@contextmanager
def acting_reference(trainer: GRPOTrainer) -> Iterator[torch.nn.Module]:
    """
    The module that computes as the reference while the block runs: a model of its own, or the policy with the adapter `"ref"` or
    with its adapter switched off.
    """
    if trainer.ref_model is not None:
        with visit_device(trainer.ref_model, trainer.accelerator, trainer.args.offload_ref_model):
            yield trainer.ref_model
        return
    policy = trainer.accelerator.unwrap_model(trainer.model)
    with use_adapter(policy, adapter_name=REFERENCE_ADAPTER if REFERENCE_ADAPTER in policy.peft_config else None):
        yield trainer.model


@contextmanager
def acting_base(trainer: GRPOTrainer) -> Iterator[torch.nn.Module]:
    """
    The module that computes as the model before training while the block runs, beside a reference that follows: a model of its
    own, or the policy with its adapter switched off.
    """
    if trainer.base_model is not None:
        with visit_device(trainer.base_model, trainer.accelerator, trainer.args.offload_ref_model):
            yield trainer.base_model
        return
    with use_adapter(trainer.accelerator.unwrap_model(trainer.model), adapter_name=None):
        yield trainer.model


@contextmanager
def gathered_reference(trainer: GRPOTrainer) -> Iterator[UnifiedModel]:
    """The reference, unwrapped and with whole parameters, to sample rollouts with; see [`gathered_policy`]."""
    with acting_reference(trainer) as model:
        wrapped = trainer.model_wrapped if model is trainer.model else model
        with gathered_policy(wrapped, trainer.accelerator, trainer.args.gradient_checkpointing_kwargs) as policy:
            yield policy


def reference_samples(trainer: GRPOTrainer) -> bool:
    """Whether the reference samples rollouts; in evaluation the policy does."""
    return trainer.args.rollout_policy == "reference" and trainer.model.training


def sampling_policy(trainer: GRPOTrainer) -> AbstractContextManager[UnifiedModel]:
    """The model that samples the rollout, unwrapped and with whole parameters: the reference or the policy."""
    return gathered_reference(trainer) if reference_samples(trainer) else trainer.gathered_policy()


@torch.no_grad()
def score_with(
    acting: AbstractContextManager[torch.nn.Module], trainer: GRPOTrainer, step: RolloutStep, length: int
) -> RolloutScores:
    """A model's scores of a rollout, where TRL does not ask for them; `length` is that of the longest text."""
    args = trainer.args
    batch_size = args.per_device_train_batch_size if trainer.model.training else args.per_device_eval_batch_size
    with acting as model:
        return trainer.scorer.score_rollout(model, step.trajectories, batch_size, length)


def add_scores(trainer: GRPOTrainer, step: RolloutStep, output: dict[str, Any]) -> None:
    """Score a rollout with the reference where TRL does not, and hand the scores of images to the loss."""
    args, length = trainer.args, output["completion_ids"].shape[1]
    is_needed = reference_samples(trainer) or (args.image_beta and step.has_windows)
    if is_needed and "reference" not in step.scores:
        step.scores["reference"] = score_with(acting_reference(trainer), trainer, step, length)
    if reference_samples(trainer):
        step.scores["old"] = step.scores["reference"]
        output["old_per_token_logps"] = step.scores["old"].log_probs
    if "old" in step.scores and step.has_windows:
        output["old_velocities"] = step.scores["old"].velocities
    if args.image_beta and step.has_windows:
        output["ref_velocities"] = step.scores["reference"].velocities
    if args.image_base_beta and step.has_windows:
        output["base_velocities"] = score_with(acting_base(trainer), trainer, step, length).velocities


def acts_as_reference(policy: torch.nn.Module) -> bool:
    """Whether an unwrapped policy now computes as its reference: with the adapter `"ref"`, or with its adapter switched off."""
    if not isinstance(policy, PeftModel):
        return False
    return policy.active_adapter == REFERENCE_ADAPTER or not policy.get_model_status().enabled


def _adapter_pairs(policy: PeftModel) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """Pairs of a parameter of the reference adapter and its counterpart in the policy's active adapter."""
    active = f".{policy.active_adapter}."
    named = dict(policy.named_parameters())
    pairs = [
        (named[name.replace(active, f".{REFERENCE_ADAPTER}.")], parameter)
        for name, parameter in named.items()
        if active in name
    ]
    if not pairs:
        raise ValueError(f"the adapter {policy.active_adapter!r} has no parameters that a reference could follow")
    return pairs


def add_reference_adapter(policy: PeftModel, accelerator: Accelerator) -> None:
    """
    Give a policy with an adapter a second adapter with the same values, which is not trained. If TRL has made one, it stays.

    Args:
        policy ([`~peft.PeftModel`]): Not yet wrapped.
        accelerator ([`~accelerate.Accelerator`]): Accelerator of the trainer.

    Raises:
        `ValueError`: Under DeepSpeed ZeRO-3, which leaves no process a parameter that could follow another.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            "sync_ref_model=True cannot follow an adapter that DeepSpeed ZeRO-3 partitions: use "
            "recipes/accelerate_configs/zero2.yaml or fsdp2.yaml, or set sync_ref_model=False"
        )
    if REFERENCE_ADAPTER in policy.peft_config:
        return
    policy.add_adapter(REFERENCE_ADAPTER, policy.peft_config[policy.active_adapter])
    with torch.no_grad():
        for reference, parameter in _adapter_pairs(policy):
            reference.copy_(parameter)
            reference.requires_grad_(False)


def reference_state(
    reference: torch.nn.Module | None, policy: torch.nn.Module, accelerator: Accelerator
) -> dict[str, torch.Tensor]:
    """
    The weights of a reference by name, gathered from all shards. All processes call it together, and the main one gets them.

    Args:
        reference (`torch.nn.Module`, *optional*): A model of its own, as [`prepare_reference`] returns it. `None` if the
            reference is an adapter of the policy.
        policy (`torch.nn.Module`): The policy.
        accelerator ([`~accelerate.Accelerator`]): Accelerator of the trainer.
    """
    if reference is not None:
        return accelerator.get_state_dict(reference)
    named = accelerator.unwrap_model(policy).named_parameters()
    return {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in named
        if f".{REFERENCE_ADAPTER}." in name
    }


@torch.no_grad()
def load_reference_state(
    state: dict[str, torch.Tensor],
    reference: torch.nn.Module | None,
    policy: torch.nn.Module,
    accelerator: Accelerator,
) -> None:
    """
    Set the weights that [`reference_state`] returned. Every process passes the whole state.

    Raises:
        `ValueError`: If the state is not that of this reference.
    """
    model = accelerator.unwrap_model(policy if reference is None else reference)
    is_partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    expected = {name for name in model.state_dict() if reference is not None or f".{REFERENCE_ADAPTER}." in name}
    if expected != set(state):
        wrong = sorted(expected ^ set(state))
        raise ValueError(
            f"the saved reference does not fit this model: {len(wrong)} names differ, such as {wrong[0]!r}"
        )
    if not is_partitioned:
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))
        return
    import deepspeed

    for name, parameter in model.named_parameters():
        # One at a time, so that no process holds more than one whole; the first process' values are everybody's.
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if accelerator.is_main_process:
                parameter.copy_(state[name])


def mixup_alpha(args: AlphaGRPOConfig, step: int) -> float:
    """The share of the policy in the reference after a step. It falls from step to step, down to `ref_model_mixup_alpha`."""
    if args.ref_model_decay_ramp is None:
        return args.ref_model_mixup_alpha
    return max(args.ref_model_mixup_alpha, 1 - args.ref_model_decay_ramp * step)


class FollowPolicyCallback(SyncRefModelCallback):
    """TRL's callback with a mixing share that depends on the step; see [`mixup_alpha`]."""

    def on_step_end(
        self, args: AlphaGRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        step_args = copy.copy(args)
        step_args.ref_model_mixup_alpha = mixup_alpha(args, state.global_step)
        super().on_step_end(step_args, state, control, **kwargs)


def follow_policy(
    policy: torch.nn.Module, reference: torch.nn.Module | None, accelerator: Accelerator
) -> TrainerCallback:
    """The callback that moves a reference after the policy; an adapter as reference is added where there is none."""
    if reference is not None:
        return FollowPolicyCallback(ref_model=reference, accelerator=accelerator)
    add_reference_adapter(policy, accelerator)
    return SyncRefAdapterCallback(accelerator)


class SyncRefAdapterCallback(TrainerCallback):
    """
    Moves the reference adapter towards the policy's: every `ref_model_sync_steps` steps
    `ref = alpha * policy + (1 - alpha) * ref`, with the step's [`mixup_alpha`] (TR-DPO,
    https://huggingface.co/papers/2404.09656). With `ref_model_sync_steps=1` it is an exponential moving average.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Accelerator of the trainer.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    @torch.no_grad()
    def on_step_end(
        self,
        args: AlphaGRPOConfig,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        **kwargs: object,
    ) -> None:
        if state.global_step % args.ref_model_sync_steps:
            return
        alpha = mixup_alpha(args, state.global_step)
        for reference, parameter in _adapter_pairs(self.accelerator.unwrap_model(model)):
            reference.lerp_(parameter, alpha)
