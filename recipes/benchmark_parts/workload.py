# SPDX-License-Identifier: Apache-2.0

"""The benchmark's models, and trajectories of self-reflection with random contents."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from PIL import Image

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.flow.timesteps import flow_timesteps
from alphagrpo_ext.models.contract import FAMILIES, UnifiedModel, UnifiedProcessor
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.trajectory import DenoisingWindow, ImageSegment, TextSegment, Trajectory
from benchmark_parts.families import BENCHMARK_FAMILIES
from benchmark_parts.sizes import Size
from recipe_tools.shapes_pretraining.families import SHAPES_FAMILIES


GUIDANCE = GuidanceConfig(text_scale=4.0, image_scale=2.0, interval=(0.0, 1.0), renorm_type="text_channel")
"""Guidance of the paper's self-reflection: all branches of a family in all steps, which are three for BAGEL."""


def build_image_processor(size: Size) -> UnifiedProcessor:
    """Build the processor of the family's shapes world for images of another size."""
    processor = SHAPES_FAMILIES.get(size.family)().build_processor()
    BENCHMARK_FAMILIES[size.family].set_image_size(processor, size.image_size)
    return processor


def build_random_model(size: Size) -> UnifiedModel:
    """Build the model of a size in fp32 with random weights."""
    family = BENCHMARK_FAMILIES[size.family]
    config = family.build_config(size, build_image_processor(size))
    model_class = FAMILIES.get(size.family).model_class
    model = model_class._from_config(config, attn_implementation=size.attn_implementation)
    family.initialize(model)
    return model


def build_model(size: Size, seed: int = 0) -> UnifiedModel:
    """Build the model of a size in fp32, with its vision tower frozen as in training."""
    if size.released:
        model, _ = load_model("bagel-shapes", dtype="float32", attn_implementation=size.attn_implementation)
    else:
        torch.manual_seed(seed)
        model = build_random_model(size)
    model.family.freeze_vision_tower(model)
    return model.train()


def self_reflection_trajectories(model: UnifiedModel, size: Size, seed: int = 0) -> list[Trajectory]:
    """
    Make trajectories `[system] [image] [request] [reflection*] [image*]` with random contents. Members of a group share the given
    segments.

    Args:
        model ([`UnifiedModel`]): The model, for its vocabulary and latents.
        size ([`Size`]): Lengths and numbers.
        seed (`int`, *optional*, defaults to `0`): Seed of the contents.
    """
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    processor, image_size = build_image_processor(size), (size.image_size, size.image_size)
    grid = model.latent_grid(*image_size)
    num_latents, channels = grid[0] * grid[1], model.latent_channels
    vocab_size = model.config.get_text_config().vocab_size

    def ids(count: int) -> list[int]:
        return [rng.randrange(10, vocab_size) for _ in range(count)]

    look = processor.look(Image.new("RGB", image_size))
    given_image = ImageSegment(
        torch.randn(num_latents, channels, generator=generator),
        grid,
        pixel_values=None if look is None else torch.rand(look.shape, generator=generator) * 2 - 1,
    )
    system, request = TextSegment(ids(size.system_tokens), role="system"), TextSegment(ids(size.request_tokens))
    given = [system, given_image, request]
    contexts = {branch: processor.branch_context(branch, given, image_size) for branch in model.branches[1:]}
    timesteps = flow_timesteps(2 * size.num_steps + 1, 1.0)[1 : size.num_steps + 2]
    trajectories = []
    for _ in range(size.num_trajectories):
        window = DenoisingWindow(
            latents=torch.randn(size.num_steps + 1, num_latents, channels, generator=generator),
            timesteps=timesteps,
            start=1,
            log_probs=torch.zeros(size.num_steps),
        )
        image = ImageSegment(
            torch.randn(num_latents, channels, generator=generator),
            grid,
            sampled=True,
            window=window,
            guidance_contexts=contexts,
        )
        thought = TextSegment(ids(size.thought_tokens), sampled=True, ended=False)
        trajectories.append(Trajectory([*given, thought, image]))
    return trajectories


def without_windows(trajectories: list[Trajectory]) -> list[Trajectory]:
    """Remove the trained windows from trajectories, for a forward of the texts alone."""
    return [
        Trajectory([replace(s, window=None) if isinstance(s, ImageSegment) else s for s in trajectory.segments])
        for trajectory in trajectories
    ]
