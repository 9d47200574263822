# SPDX-License-Identifier: Apache-2.0

"""Norms and gated MLPs against the modules of Transformers and Diffusers that they stand for."""

from collections.abc import Callable

import pytest
import torch
from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm
from diffusers.models.transformers.transformer_cosmos3 import Cosmos3NemotronRMSNorm, Cosmos3VLTextMLP
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from alphagrpo_ext.models.bagel import network
from alphagrpo_ext.models.cosmos3 import transformer
from alphagrpo_ext.models.cosmos3.configuration_cosmos3 import Cosmos3Config
from alphagrpo_ext.models.layers.recomputed import GatedMLP, round_once


SIZE, EPS = 24, 1e-5
HALF = torch.bfloat16


def cosmos3_norm(variant: str) -> Callable[[], nn.Module]:
    config = Cosmos3Config(variant=variant)
    config.transformer_config["rms_norm_eps"] = EPS
    return lambda: transformer.make_norm(config, SIZE)


NORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "bagel": (lambda: network.make_qwen_norm(SIZE, EPS), lambda: Qwen2RMSNorm(SIZE, EPS)),
    "cosmos3 omni": (
        cosmos3_norm("omni"),
        lambda: DiffusersRMSNorm(SIZE, EPS, elementwise_affine=True, bias=False),
    ),
    "cosmos3 edge": (cosmos3_norm("edge"), lambda: Cosmos3NemotronRMSNorm(SIZE, EPS)),
}
"""The norms of each family, and those that they stand for."""


def gradients(
    module: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, *parameters: torch.Tensor
) -> list[torch.Tensor]:
    """Output of a module, and its gradients at its input and at parameters."""
    states = states.detach().requires_grad_()
    output = module(states)
    upstream = torch.linspace(-1, 2, output.numel()).view_as(output).sin()
    return [output, *torch.autograd.grad(output, (states, *parameters), upstream.to(output.dtype))]


@pytest.mark.parametrize("types", [(torch.float32, torch.float32), (HALF, torch.float32), (HALF, HALF)], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_norm_is_that_of_the_library(name: str, types: tuple[torch.dtype, torch.dtype]) -> None:
    own, other = (make() for make in NORMS[name])
    with torch.no_grad():
        own.weight.copy_(torch.linspace(0.5, 2, SIZE))
    own, other = own.to(types[1]), other.to(types[1])
    other.load_state_dict(own.state_dict())
    states = (torch.randn(2, 5, SIZE, generator=torch.Generator().manual_seed(0)) * 3).to(types[0])
    found, expected = gradients(own, states, own.weight), gradients(other, states, other.weight)
    assert torch.equal(found[0], expected[0])
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    # In bf16 the library rounds between its operations, so its own gradient is off by some units in the last place.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if types[0] == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for gradient, reference in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(gradient, reference, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_gated_mlp_is_that_of_the_library(dtype: torch.dtype) -> None:
    own, other = GatedMLP(SIZE, 40).to(dtype), Cosmos3VLTextMLP(SIZE, 40).to(dtype)
    other.load_state_dict(own.state_dict())
    states = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)
    for found, expected in zip(
        gradients(own, states, *own.parameters()), gradients(other, states, *other.parameters()), strict=True
    ):
        assert torch.equal(found, expected)


def kept_shapes(module: nn.Module, states: torch.Tensor) -> list[tuple[int, ...]]:
    """Shapes of the tensors that a call keeps for the backward, each once, without parameters."""
    kept: dict[int, tuple[int, ...]] = {}
    parameters = {parameter.data_ptr() for parameter in module.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(states.requires_grad_())
    del output
    return sorted(kept.values())


@pytest.mark.parametrize("name", NORMS)
def test_norm_keeps_its_input(name: str) -> None:
    assert kept_shapes(NORMS[name][0](), torch.randn(7, SIZE)) == [(7, 1), (7, SIZE)]


def test_gated_mlp_keeps_three_hidden_tensors() -> None:
    """Gate, up, and what the last layer multiplies."""
    assert kept_shapes(GatedMLP(SIZE, 40), torch.randn(7, SIZE)) == [(7, SIZE), *[(7, 40)] * 3]


@pytest.mark.parametrize("name", NORMS)
def test_layers_compile_into_one_graph(name: str) -> None:
    layers = nn.Sequential(NORMS[name][0](), GatedMLP(SIZE, 40))
    states = torch.randn(4, SIZE)
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        gradients(compiled, states, *layers.parameters()), gradients(layers, states, *layers.parameters()), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_what_linear_layers_read_is_rounded_under_autocast_alone() -> None:
    states = torch.randn(3, SIZE)
    assert round_once(states) is states
    with torch.autocast("cpu", dtype=HALF):
        assert round_once(states).dtype == HALF
