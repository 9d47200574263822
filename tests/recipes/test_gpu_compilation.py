# SPDX-License-Identifier: Apache-2.0

"""
What of compilation and of other devices can be known on a CPU: graph breaks, how often layers compile, equal numbers, copies from
the host, and the rule by which a way to compute wins.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

from alphagrpo_ext.models.contract import UnifiedModel
from gpu_check_parts import candidates, compilation
from gpu_check_parts.arguments import TINY_SIZES, GPUCheckArguments
from gpu_check_parts.candidates import Timing, Way, compare, compiled_forwards, forwards
from gpu_check_parts.compilation import check_denoising, check_update, filled_cache
from gpu_check_parts.speed import build_on_device, size_config, update_settings
from recipe_tools.memory import example_trajectories, prepare_policy
from recipe_tools.memory_settings import MemorySettings


CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget_compiled_code() -> None:
    torch.compiler.reset()


def arguments(backend: str = "eager") -> GPUCheckArguments:
    return GPUCheckArguments(
        device="cpu",
        trained_steps=[2],
        num_samples=2,
        prompt_tokens=4,
        thought_tokens=4,
        lora_rank=2,
        repetitions=1,
        compile_backend=backend,
    )


def settings_of(name: str, attention: str) -> MemorySettings:
    return update_settings(name, 2, attention, arguments())


@functools.cache
def shallow_config(name: str) -> PreTrainedConfig:
    """The configuration of a tiny size with three decoder layers, which compile quickly."""
    whole = size_config(name)
    config = whole.to_dict()
    if name == "bagel-shapes":
        config["text_config"] |= {"num_hidden_layers": 3, "layer_types": None}
    else:
        config["transformer_config"] |= {"num_hidden_layers": 3}
    return type(whole).from_dict(config)


def build(name: str, attention: str) -> UnifiedModel:
    """A model with random weights in fp32."""
    torch.manual_seed(0)
    return build_on_device(shallow_config(name), attention, "cpu").float().eval()


def denoising_step(name: str) -> tuple[UnifiedModel, Callable[[], torch.Tensor]]:
    """A model, and a denoising step of two images in two guidance branches."""
    model, settings = build(name, "eager"), settings_of(name, "eager")
    cache, grid = filled_cache(model, settings, 2), model.latent_grid(settings.height, settings.width)
    latents = torch.randn(4, grid[0] * grid[1], model.latent_channels, generator=torch.Generator().manual_seed(0))
    return model, lambda: model.predict_velocity(cache, latents, grid, torch.tensor(0.6))


def first_layer_call(model: UnifiedModel, call: Callable[[], Any]) -> Callable[[], Any]:
    """What the first decoder layer is called with."""
    layer, calls = model.family.sharded_layers(model)[0], []
    hook = layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    call()
    hook.remove()
    args, kwargs = calls[0]
    return lambda: layer(*args, **kwargs)


def graph_breaks(call: Callable[[], Any]) -> int:
    return torch._dynamo.explain(call)().graph_break_count


@pytest.mark.parametrize("name", TINY_SIZES)
def test_a_denoising_step_has_no_graph_break(name: str) -> None:
    model, step = denoising_step(name)
    assert graph_breaks(step) == 0
    with torch.no_grad():
        assert graph_breaks(first_layer_call(model, step)) == 0


@pytest.mark.parametrize(
    ("name", "attention"), [("bagel-shapes", "eager"), ("cosmos3-shapes", "sdpa"), ("cosmos3-shapes", "eager")]
)
def test_a_trained_layer_has_no_graph_break(name: str, attention: str) -> None:
    """
    With adapter and gradient checkpointing. BAGEL's `sdpa` and `flex_attention` have other code on a CPU than elsewhere, and both
    of these break a graph there: a cached mask, and a mask of all pairs.
    """
    model, settings = build(name, attention), settings_of(name, attention)
    policy = prepare_policy(model, settings)
    batch = model.pack(example_trajectories(model, settings), settings.guidance)
    assert graph_breaks(first_layer_call(model, lambda: policy(**batch.inputs))) == 0


@pytest.mark.parametrize(("name", "num_compilations"), [("bagel-shapes", 2), ("cosmos3-shapes", 1)])
def test_all_layers_share_what_is_compiled(name: str, num_compilations: int) -> None:
    """BAGEL's first layer alone has expanded embeddings of the delimiters, whose strides differ from those of later states."""
    model, step = denoising_step(name)
    expected = step()
    layers = model.family.sharded_layers(model)
    assert len(layers) > num_compilations
    counter = CompileCounter()
    with forwards(layers, compiled_forwards(layers, counter)):
        torch.testing.assert_close(step(), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(step(), expected, rtol=0, atol=1e-6)
    assert counter.frame_count == num_compilations
    torch.testing.assert_close(step(), expected, rtol=0, atol=0)
    assert counter.frame_count == num_compilations


@pytest.mark.slow
@pytest.mark.low_priority
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", TINY_SIZES)
def test_generated_code_agrees(name: str) -> None:
    """Decoder layers and the whole step, compiled by inductor."""
    model, step = denoising_step(name)
    expected = step()
    layers = model.family.sharded_layers(model)
    with forwards(layers, compiled_forwards(layers, "inductor")):
        torch.testing.assert_close(step(), expected, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bagel-shapes", "cosmos3-shapes"])
def test_ways_to_denoise_are_compared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "size_config", shallow_config)
    *partial, result = check_denoising(name, CPU, arguments())
    rows = {row[0]: row[1:] for row in result.table.rows}
    assert list(rows) == [
        *("eager", "compiled layers", "CUDA graph", "compiled layers in a CUDA graph", "compiled step")
    ]
    assert [len(earlier.table.rows) for earlier in partial] == [2, 3, 4] and result.passed
    for way in ("compiled layers", "compiled step"):
        first, seconds, eager, gain, difference, _, verdict = rows[way]
        assert first > seconds > 0 and eager > 0 and gain < 1
        assert difference < 1e-3 and verdict in ("wins", "no gain")
    for way in ("CUDA graph", "compiled layers in a CUDA graph"):
        assert rows[way][-1] == "cannot run: RuntimeError: a CUDA graph needs a CUDA device"
    assert json.loads(json.dumps(result.table.to_json()))["rows"] == result.table.rows


# Tracing looks at the gradients of what a layer is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize(
    ("name", "ways"),
    [
        pytest.param(
            "bagel-shapes",
            ["flex_attention", "sdpa", "flex_attention, compiled layers", "sdpa, compiled layers"],
            marks=pytest.mark.slow,
        ),
        ("cosmos3-shapes", ["sdpa", "sdpa, compiled layers"]),
    ],
)
def test_ways_to_update_are_compared(name: str, ways: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "size_config", shallow_config)
    *_, result = check_update(name, CPU, arguments())
    rows = {row[0]: row[1:] for row in result.table.rows}
    assert list(rows) == ways and result.passed
    if name == "bagel-shapes":
        # On a CPU these two break graphs; see above.
        assert all(rows[way][-1].startswith("cannot run: Unsupported: ") for way in ways[2:])
        assert 0 < rows["sdpa"][4] < 0.03
    else:
        assert rows[ways[1]][4] < 1e-3


@pytest.mark.parametrize(
    ("timing", "verdict"),
    [
        (Timing(0.9, [0.9, 0.9, 0.9], [1.0, 1.0, 1.0], 0.01, None), "wins"),
        (Timing(60.9, [0.9, 0.9, 0.9], [1.0, 1.0, 1.0], 0.01, None), "no gain"),
        (Timing(0.96, [0.96, 0.96, 0.96], [1.0, 1.0, 1.0], 0.01, None), "no gain"),
        (Timing(0.8, [0.8, 0.8, 1.1], [1.0, 1.0, 1.0], 0.01, None), "no gain"),
        (Timing(0.5, [0.5, 0.5, 0.5], [1.0, 1.0, 1.0], 0.06, None), "differs by more than 0.05"),
        (Timing(0.5, [0.5, 0.5, 0.5], [1.0, 1.0, 1.0], math.nan, None), "differs by more than 0.05"),
    ],
)
def test_a_way_wins_by_time_compilation_and_agreement(timing: Timing, verdict: str) -> None:
    """Compilation of 60 s among 1,000 calls costs 0.06 s a call, more than is left of 0.1 s after 5% of 1 s."""
    assert timing.verdict(1000, 0.05) == verdict


def test_the_best_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 0.8, 0.1, 0.7])

    def timed(functions: Any, repetitions: int) -> dict[str, list[float]]:
        return {"eager": [1.0] * repetitions, "candidate": [next(seconds)] * repetitions}

    monkeypatch.setattr(candidates, "time_interleaved", timed)

    def way(name: str, value: float) -> Way:
        return Way(name, lambda: lambda: torch.full((2,), value))

    ways = [way("fast", 1.0), way("wrong", 2.0), way("fastest", 1.01)]
    *_, last = compare("Ways", "A note.", way("eager", 1.0), ways, 0.05, CPU, 3, 1000)
    assert [row[-1] for row in last.table.rows] == ["eager", "wins", "differs by more than 0.05", "wins"]
    assert last.table.note == "Best: fastest. A note."


class HostCopies(TorchDispatchMode):
    """Records operations that copy between devices, or read a value."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = [
            {leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}
            for values in ((args, kwargs), result)
        ]
        if func is torch.ops.aten._local_scalar_dense.default or (devices[0] and devices[0] != devices[1]):
            self.found.append(str(func))
        return result


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast does not know `meta`, and raises even where it is asked whether it is on."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    monkeypatch.setattr(torch, "autocast", lambda **settings: nullcontext())


def moved(value: Any, device: str) -> Any:
    """A value with all tensors in it on another device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [moved(item, device) for item in value]
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, PreTrainedConfig):
        return replace(value, **{field.name: moved(getattr(value, field.name), device) for field in fields(value)})
    return value


@pytest.mark.parametrize(("name", "copies"), [("bagel-shapes", []), ("cosmos3-shapes", ["aten._to_copy.default"])])
def test_a_denoising_step_stays_on_its_device(name: str, copies: list[str], no_autocast: None) -> None:
    """
    `meta` stands for the device. What copies from the host cannot be in a CUDA graph: Cosmos3 copies its rotary frequencies, which
    are computed on the CPU for all devices.
    """
    model, settings = build(name, "sdpa"), settings_of(name, "sdpa")
    cache, grid = moved(filled_cache(model, settings, 2), "meta"), model.latent_grid(24, 24)
    model = model.to("meta")
    latents = torch.empty(4, grid[0] * grid[1], model.latent_channels, device="meta")
    with HostCopies() as host:
        velocity = model.predict_velocity(cache, latents, grid, torch.empty((), device="meta"))
    assert velocity.shape == latents.shape and velocity.device.type == "meta"
    assert host.found == copies


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TINY_SIZES)
def test_an_update_stays_on_its_device(name: str, attention: str, no_autocast: None) -> None:
    """
    Packed forward and backward, where `meta` stands for the device. BAGEL's `sdpa` runs what a GPU runs. The loss is a sum, because
    that of training reads where branches are.
    """
    model, settings = build(name, attention).to("meta"), settings_of(name, attention)
    with torch.device("meta"):
        policy = prepare_policy(model, settings)
    batch = model.pack(example_trajectories(model, settings), settings.guidance)
    # Nothing on `meta` has values to read.
    numbers = model.family.number_inputs
    output = policy(**{n: t if n in numbers else t.to("meta") for n, t in batch.inputs.items()})
    (output.velocities.sum() + output.log_probs.sum()).backward()
    gradients = [parameter.grad for parameter in policy.parameters() if parameter.requires_grad]
    assert gradients and all(gradient.device.type == "meta" for gradient in gradients)
