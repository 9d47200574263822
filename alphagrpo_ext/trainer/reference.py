# Copyright 2026 The AlphaGRPO-Ext Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The reference model of a KL without an adapter: a frozen copy of the policy as it is before training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel
from trl.models import prepare_deepspeed, prepare_fsdp

from alphagrpo_ext.models.loading import load_model


def frozen_copy(policy: PreTrainedModel) -> PreTrainedModel:
    """
    A copy that is not trained, in the policy's type and on its device. It needs no folder to load from, unless DeepSpeed
    has already partitioned the policy's weights, which cannot be copied then.
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


def prepare_reference(reference: PreTrainedModel, accelerator: Accelerator, offload: bool) -> torch.nn.Module:
    """
    Shard or place a reference model as the launcher wants it.

    Args:
        reference (`PreTrainedModel`): A frozen model.
        accelerator (`Accelerator`): Of the trainer.
        offload (`bool`): Whether it stays in the host's memory, see [`visiting`].

    Raises:
        `ValueError`: If it is to be offloaded, but DeepSpeed or FSDP places it.
    """
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


@contextmanager
def visiting(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Have `model` on `device` for the time of the block and back where it was after it."""
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
