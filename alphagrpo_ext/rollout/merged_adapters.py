# SPDX-License-Identifier: Apache-2.0

"""
Adapters while a policy samples: added to its weights once, where what was sampled is still on-policy for the packed forward of training.

PEFT computes an adapted layer as three matrix multiplications. A rollout evaluates the network hundreds of times with the same weights,
so the sum of weight and adapter is computed once.

- **Weights in fp32.** The sum differs from PEFT's output by the rounding of fp32, which the tolerance of on-policy ratios covers. Under
  autocast the sum is rounded once to autocast's type, as autocast rounds the weight alone. It also saves autocast's conversion of
  the frozen weight, which it repeats in every call.
- **Weights in bf16 or fp16.** They lie on the grid of their type. Wherever the adapter is less than half a unit in the last place,
  the sum would round to the weight itself, and the rollout would be that of another policy. Nothing is merged. Under autocast
  PEFT's conversion of inputs to fp32 is left out, which autocast would undo.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.distributed.fsdp import FSDPModule

from alphagrpo_ext.models.finite import is_finite


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """
    While the block runs, a model samples with its adapters merged where [`mergeable_layers`] says so. Afterwards its weights are
    the same tensors as before.

    Enter it under the autocast that the model is called under, and leave it before anything switches adapters. Meanwhile merged
    weights are in memory beside the original ones, in the type that the model computes in. A model without adapters stays as it is.

    Args:
        model (`torch.nn.Module`): A policy: a [`~peft.PeftModel`] or what it wraps.
    """
    merged = set(mergeable_layers(model))
    with ExitStack() as stack:
        for layer in _plain_layers(model):
            stack.enter_context(_merged(layer) if layer in merged else _without_input_casts(layer))
        yield


def mergeable_layers(model: nn.Module) -> list[LoraLinear]:
    """
    Adapted layers whose adapter may be added to their weight for a while.

    These are linear layers with a whole, frozen weight in fp32 and active LoRA adapters in fp32 without dropout. A layer whose
    weight is quantized or sharded does not belong to them, nor does one with DoRA or another variant of LoRA, nor one whose
    adapters are switched off, merged already or not finite.
    """
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return []
    return [layer for layer in _plain_layers(model) if _can_merge(layer)]


def _plain_layers(model: nn.Module) -> list[LoraLinear]:
    """Linear layers with active adapters that are LoRA as its authors describe it."""
    return [m for m in model.modules() if type(m) is LoraLinear and not m.disable_adapters and _is_plain(m)]


def _is_plain(layer: LoraLinear) -> bool:
    names = _active_adapters(layer)
    return bool(names) and not layer.merged and not any(n in layer.lora_variant or layer.lora_bias[n] for n in names)


def _active_adapters(layer: LoraLinear) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _can_merge(layer: LoraLinear) -> bool:
    base, names = layer.get_base_layer(), _active_adapters(layer)
    if type(base) is not nn.Linear or base.weight.requires_grad:
        return False
    # DeepSpeed marks parameters that it partitions.
    is_whole = type(base.weight.data) is torch.Tensor and not hasattr(base.weight, "ds_id")
    drops = layer.training and any(getattr(layer.lora_dropout[name], "p", 0.0) for name in names)
    factors = [factor[name].weight for name in names for factor in (layer.lora_A, layer.lora_B)]
    is_fp32 = all(weight.dtype == torch.float32 for weight in (base.weight, *factors))
    # An error about an adapter that is not finite names it, and not the weight that it was merged into.
    return is_whole and is_fp32 and not drops and all(map(is_finite, factors))


@contextmanager
def _merged(layer: LoraLinear) -> Iterator[None]:
    weight = layer.get_base_layer().weight
    original, weight.data = weight.data, _merged_weight(layer)
    layer.merged_adapters.extend(_active_adapters(layer))
    try:
        yield
    finally:
        weight.data = original
        layer.merged_adapters.clear()


@torch.no_grad()
def _merged_weight(layer: LoraLinear) -> torch.Tensor:
    """The sum of a layer's weight and its active adapters, in the type that the layer computes in."""
    total = layer.get_base_layer().weight.data
    kind = total.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else total.dtype
    with torch.autocast(kind, enabled=False):
        for name in _active_adapters(layer):
            total = total + layer.get_delta_weight(name)
    return total.to(dtype)


@contextmanager
def _without_input_casts(layer: LoraLinear) -> Iterator[None]:
    if not torch.is_autocast_enabled(layer.get_base_layer().weight.device.type):
        yield
        return
    before, layer.cast_input_dtype_enabled = layer.cast_input_dtype_enabled, False
    try:
        yield
    finally:
        layer.cast_input_dtype_enabled = before
