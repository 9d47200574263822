# SPDX-License-Identifier: Apache-2.0

"""
Adapters while a policy samples: added to its weights once, where what was sampled is still on-policy for the packed forward of training.

PEFT computes an adapted layer as three matrix multiplications, with conversions between them. A rollout evaluates the network hundreds
of times with the same weights, so what depends on the weights alone is computed once.

- **Weights in fp32.** The layer computes with the sum of weight and adapter. It differs from PEFT's output by the rounding of fp32, which
  the tolerance of on-policy ratios covers. Under autocast the sum is rounded once to autocast's type, as autocast rounds the weight
  alone. This also saves autocast's conversion of a frozen weight, which it repeats in every call.
- **Weights in bf16 or fp16, under autocast.** Such weights lie on the grid of their type. Wherever the adapter is less than half a
  unit in the last place, the sum would round to the weight itself, and the rollout would be that of another policy. So nothing is
  merged. The adapter is converted once, and the outputs are PEFT's, bit by bit.
- **Otherwise** PEFT computes the layer.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule

from alphagrpo_ext.models.finite import is_finite


logger = logging.getLogger(__name__)


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """
    While the block runs, a model samples with its adapters merged where [`mergeable_layers`] says so, and else converted once.
    Only the forwards of adapted layers are replaced meanwhile; parameters stay as they are.

    Enter it under the autocast that the model is called under, and leave it before anything switches adapters. Merged weights are in
    memory beside the original ones, in the type that the model computes in. A model without adapters stays as it is. What was chosen
    is logged once.

    Args:
        model (`torch.nn.Module`): A policy: a [`~peft.PeftModel`] or what it wraps.
    """
    merged = mergeable_layers(model)
    others = set(_plain_layers(model)) - set(merged)
    converted = [layer for layer in others if _computing_dtype(layer) != torch.float32]
    _log_choice(sum(isinstance(m, BaseTunerLayer) for m in model.modules()), len(merged), len(converted))
    with ExitStack() as stack:
        with torch.no_grad():
            for layer in merged:
                stack.enter_context(_merged(layer))
            for layer in converted:
                stack.enter_context(_converted(layer))
        yield


@functools.cache
def _log_choice(num_layers: int, num_merged: int, num_converted: int) -> None:
    """Say once how a policy with so many adapted layers samples."""
    if num_layers:
        logger.info(
            "Of %d adapted layers, %d sample with their adapter merged, %d with their adapter converted once, and %d as PEFT "
            "computes them.",
            *(num_layers, num_merged, num_converted, num_layers - num_merged - num_converted),
        )


def mergeable_layers(model: nn.Module) -> list[LoraLinear]:
    """
    Adapted layers whose adapter may be added to their weight for a while.

    These are linear layers with a whole, frozen weight in fp32 and active LoRA adapters in fp32 without dropout. A layer whose
    weight is quantized or sharded does not belong to them, nor does one with DoRA or another variant of LoRA, nor one whose
    adapters are switched off, merged already or not finite.
    """
    return [layer for layer in _plain_layers(model) if _can_merge(layer)]


def _plain_layers(model: nn.Module) -> list[LoraLinear]:
    """Adapted linear layers that compute the base layer's output and low-rank products, and nothing else."""
    modules = list(model.modules())
    if any(isinstance(module, FSDPModule) for module in modules):
        return []
    return [m for m in modules if type(m) is LoraLinear and not (m.disable_adapters or m.merged) and _is_plain(m)]


def _is_plain(layer: LoraLinear) -> bool:
    names, is_linear = _active_adapters(layer), type(layer.get_base_layer()) is nn.Linear
    is_variant = any(name in layer.lora_variant or layer.lora_bias[name] for name in names)
    drops = layer.training and any(getattr(layer.lora_dropout[name], "p", 0.0) for name in names)
    is_fp32 = all(weight.dtype == torch.float32 and _is_whole(weight) for weight in _factors(layer))
    # Another library may have replaced the forward of the module.
    return bool(names) and is_linear and is_fp32 and not (is_variant or drops or "forward" in vars(layer))


def _active_adapters(layer: LoraLinear) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _factors(layer: LoraLinear) -> list[torch.Tensor]:
    names = _active_adapters(layer)
    return [factor[name].weight for name in names for factor in (layer.lora_A, layer.lora_B)]


def _is_whole(weight: torch.Tensor) -> bool:
    # DeepSpeed marks parameters that it partitions.
    return type(weight.data) is torch.Tensor and not hasattr(weight, "ds_id")


def _can_merge(layer: LoraLinear) -> bool:
    weight = layer.get_base_layer().weight
    if weight.dtype != torch.float32 or weight.requires_grad or not _is_whole(weight):
        return False
    # An error about an adapter that is not finite names it, and not the weight that it was merged into.
    return all(map(is_finite, _factors(layer)))


def _computing_dtype(layer: LoraLinear) -> torch.dtype:
    """The type of an adapter's outputs."""
    kind = layer.get_base_layer().weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


@contextmanager
def _merged(layer: LoraLinear) -> Iterator[None]:
    # Nothing but the layer's forward changes, so a judge that asks the policy in another thread sees either form of the layer whole.
    layer.forward = functools.partial(F.linear, weight=_merged_weight(layer), bias=layer.get_base_layer().bias)
    try:
        yield
    finally:
        del layer.forward


def _merged_weight(layer: LoraLinear) -> torch.Tensor:
    """The sum of a layer's weight and its active adapters, in the type that the layer computes in."""
    total = layer.get_base_layer().weight.data
    with torch.autocast(total.device.type, enabled=False):
        for name in _active_adapters(layer):
            total = total + layer.get_delta_weight(name)
    return total.to(_computing_dtype(layer))


@contextmanager
def _converted(layer: LoraLinear) -> Iterator[None]:
    base, dtype = layer.get_base_layer(), _computing_dtype(layer)
    adapters = [
        (layer.lora_A[name].weight.to(dtype), layer.lora_B[name].weight.to(dtype), layer.scaling[name])
        for name in _active_adapters(layer)
    ]

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        outputs = base(inputs)
        for down, up, scaling in adapters:
            # The order of operations, and so the rounding, is PEFT's.
            outputs = outputs + F.linear(F.linear(inputs, down), up) * scaling
        return outputs

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
