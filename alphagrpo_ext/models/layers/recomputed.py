# SPDX-License-Identifier: Apache-2.0

"""
Norms and gated MLPs that keep little for the backward.

Autograd keeps what comes between their operations, in a decoder layer a quarter of all that it keeps or more. Here a norm keeps its input, a gate its
two inputs, and the backward computes the rest again, which takes little time beside the matrix products. Outputs are those of the modules in
Transformers and Diffusers bit by bit. Gradients of norms are computed in fp32 and rounded once. A compiler sees the plain operations, because it
decides by itself what to compute again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


def _normalize(states: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalized states in fp32, and the factors `(..., 1)` that they were multiplied by."""
    states = states.float()
    scale = torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps)
    return states * scale, scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, eps: float, apply_weight: Callable
    ) -> torch.Tensor:
        normed, scale = _normalize(states, eps)
        ctx.save_for_backward(states, weight, scale)
        return apply_weight(normed, weight, states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight, scale = ctx.saved_tensors
        normed, gradient = states.float() * scale, gradient.float()
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype)
        gradient = gradient * weight
        along = (gradient * normed).mean(-1, keepdim=True)
        return ((gradient - normed * along) * scale).to(states.dtype), weight_gradient, None, None


class RMSNorm(nn.Module):
    """
    Root mean square norm of the last dimension.

    Args:
        size (`int`): Number of channels.
        eps (`float`): What is added to the mean square.
        apply_weight (`Callable`):
            Multiplies normalized states in fp32 by the weight. Its last argument is the data type of the input. Families differ in what they round
            here, and to which type.
    """

    def __init__(
        self,
        size: int,
        eps: float,
        apply_weight: Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor],
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.apply_weight = apply_weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return self.apply_weight(_normalize(states, self.eps)[0], self.weight, states.dtype)
        return _RMSNorm.apply(states, self.weight, self.eps, self.apply_weight)


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), gradient * F.silu(gate)


class GatedMLP(nn.Module):
    """The MLP of Llama and Qwen: a gate by SiLU, without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(states), self.up_proj(states)
        return self.down_proj(F.silu(gate) * up if torch.compiler.is_compiling() else _SiluGate.apply(gate, up))


def round_once(states: torch.Tensor) -> torch.Tensor:
    """
    States in autocast's type, for linear layers alone. Autocast would round them in every layer that reads them, and each would keep a
    tensor of its own. Without autocast, the states themselves.
    """
    kind = states.device.type
    return states.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else states
