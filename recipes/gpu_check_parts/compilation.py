# SPDX-License-Identifier: Apache-2.0

"""
Whether compilation, CUDA graphs or another attention make a denoising step and an update faster on a device.

Decoder layers are compiled one by one, because they share what is compiled, so that its time does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from alphagrpo_ext.models.attention.choice import attention_implementations
from alphagrpo_ext.models.contract import FAMILIES, Cache, UnifiedModel
from gpu_check_parts.arguments import IMAGE_SIZES, GPUCheckArguments
from gpu_check_parts.candidates import Way, compare, compiled_forwards, cuda_graph, forwards
from gpu_check_parts.results import PartResult
from gpu_check_parts.speed import build_on_device, size_config, update, update_settings
from recipe_tools.memory import example_trajectories, prepare_policy
from recipe_tools.memory_settings import MemorySettings


AGREEMENT = {"denoising": 0.05, "update": 0.15}
"""
Largest relative distances of velocities and of gradients in bf16 to those of eager mode. Another attention changed the gradients of
tiny models by less than 0.01 on a CPU. More layers round more: these bounds find what is wrong, not what is rounded.
"""
SHORT_CALLS = 5
"""How many times as often a denoising step is timed as an update."""


def trained_model(name: str, attention: str, device: torch.device, args: GPUCheckArguments) -> tuple[Any, ...]:
    """A model with random weights and an adapter on a device, the policy around it, and the settings of its update."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = build_on_device(size_config(name), attention, device)
    settings = update_settings(name, args.trained_steps[0], attention, args)
    with torch.device(device):
        policy = prepare_policy(model, settings)
    return model, policy, settings


def filled_cache(model: UnifiedModel, settings: MemorySettings, num_samples: int) -> Cache:
    """A cache of all guidance branches, in which samples of one prompt have written a thought."""
    (trajectory,) = example_trajectories(model, settings)
    (image,) = trajectory.sampled_images
    given = [segment for segment in trajectory.segments if not segment.sampled]
    branches = [given, *image.guidance_contexts.values()]
    slots = model.text_slots(settings.thought_tokens) + model.image_slots(image.grid)
    contexts = [list(context) for context in branches[: settings.num_branches]]
    cache = model.prefill(contexts, num_samples, slots)
    model.sample_text(cache, torch.rand(num_samples, settings.thought_tokens))
    return cache


def denoising_candidates(
    step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    inputs: Sequence[torch.Tensor],
    layers: Sequence[torch.nn.Module],
    backend: str,
) -> list[Way]:
    """
    Ways to compute a denoising step, eager mode first.

    Args:
        step (`Callable`): Velocities of latents at a time, from a cache that stays where it is.
        inputs (`Sequence[torch.Tensor]`): Latents and time.
        layers (`Sequence[torch.nn.Module]`): Decoder layers.
        backend (`str`): Backend of `torch.compile`.

    The compiled layers in a CUDA graph are compiled before, so their first call is that of the graph alone.
    """
    compiled = compiled_forwards(layers, backend)

    def with_compiled_layers(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with forwards(layers, compiled):
            return step(latents, t)

    def call(function: Callable[..., torch.Tensor]) -> Callable[[], torch.Tensor]:
        return lambda: function(*inputs)

    return [
        Way("eager", lambda: call(step)),
        Way("compiled layers", lambda: call(with_compiled_layers)),
        Way("CUDA graph", lambda: call(cuda_graph(step, *inputs))),
        Way("compiled layers in a CUDA graph", lambda: call(cuda_graph(with_compiled_layers, *inputs))),
        Way("compiled step", lambda: call(torch.compile(step, backend=backend, fullgraph=True))),
    ]


def check_denoising(name: str, device: torch.device, args: GPUCheckArguments) -> Iterator[PartResult]:
    """
    Compare ways to compute one denoising step with all guidance branches.

    Args:
        name (`str`): Name of a size.
        device (`torch.device`): The device to check.
        args ([`GPUCheckArguments`]): Numbers and lengths.

    Returns:
        `Iterator[PartResult]`: What is known after each way.
    """
    attention = attention_implementations(FAMILIES.get(size_config(name).model_type)())[0]
    model, policy, settings = trained_model(name, attention, device, args)
    policy.eval()
    grid = model.latent_grid(settings.height, settings.width)
    # As in a rollout, casts of the adapter are kept.
    with torch.autocast(device.type, dtype=torch.bfloat16), torch.no_grad():
        cache = filled_cache(model, settings, args.num_samples)
        num_images = args.num_samples * settings.num_branches
        latents = torch.randn(num_images, grid[0] * grid[1], model.latent_channels, device=device)
        inputs = (latents, torch.tensor(0.6, device=device))

        def step(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return model.predict_velocity(cache, latents, grid, t)

        layers = model.family.sharded_layers(model)
        eager, *candidates = denoising_candidates(step, inputs, layers, args.compile_backend)
        note = (
            f"{args.num_samples} images of {IMAGE_SIZES[name]} pixels in {settings.num_branches} guidance branches, after a prompt of "
            f"{args.prompt_tokens} and thoughts of at most {args.thought_tokens} tokens. {rule(args)}"
        )
        # A step is short.
        numbers = (SHORT_CALLS * args.repetitions, args.amortised_calls)
        title, bound = f"Denoising step: {name}", AGREEMENT["denoising"]
        yield from compare(title, note, eager, candidates, bound, device, *numbers)


def check_update(name: str, device: torch.device, args: GPUCheckArguments) -> Iterator[PartResult]:
    """
    Compare attentions and compiled layers in the forward and backward of one trajectory. Eager mode has the family's first
    attention.

    Args:
        name (`str`): Name of a size.
        device (`torch.device`): The device to check.
        args ([`GPUCheckArguments`]): Numbers and lengths.

    Returns:
        `Iterator[PartResult]`: What is known after each way.
    """
    all_attentions = attention_implementations(FAMILIES.get(size_config(name).model_type)())
    # Eager attention keeps the scores of all pairs.
    attentions = [attention for attention in all_attentions if attention != "eager"]
    model, policy, settings = trained_model(name, attentions[0], device, args)
    layers = model.family.sharded_layers(model)
    compiled = compiled_forwards(layers, args.compile_backend)
    own = [layer.forward for layer in layers]

    def gradient(attention: str, functions: Sequence[Callable[..., Any]]) -> torch.Tensor:
        model.set_attn_implementation(attention)
        policy.zero_grad()
        with forwards(layers, functions):
            update(model, policy, settings)
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    def way(attention: str, functions: Sequence[Callable[..., Any]], suffix: str) -> Way:
        return Way(attention + suffix, lambda: lambda: gradient(attention, functions))

    eager, *others = (way(attention, own, "") for attention in attentions)
    candidates = [*others, *(way(attention, compiled, ", compiled layers") for attention in attentions)]
    note = (
        f"One trajectory with a prompt of {args.prompt_tokens} and a thought of {args.thought_tokens} tokens, K = "
        f"{args.trained_steps[0]}, LoRA of rank {args.lora_rank}, gradient checkpointing. {rule(args)}"
    )
    numbers = (args.repetitions, args.amortised_calls)
    yield from compare(f"Update: {name}", note, eager, candidates, AGREEMENT["update"], device, *numbers)


def rule(args: GPUCheckArguments) -> str:
    """The last sentence of a note."""
    return (
        f"A gain is the share of the time of eager mode that is saved, with the first call divided among {args.amortised_calls} "
        "calls. The best way agrees, is faster in every repetition, and gains more than 5%."
    )
