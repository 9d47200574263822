# SPDX-License-Identifier: Apache-2.0

"""The benchmark's models, and trajectories of self-reflection with random contents."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.flow.timesteps import flow_timesteps
from alphagrpo_ext.models.bagel import BagelConfig, BagelModel, BagelProcessor
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.shapes.model import build_config, build_processor
from alphagrpo_ext.trajectory import DenoisingWindow, ImageSegment, Segment, TextSegment, Trajectory
from benchmark_parts.sizes import Size


GUIDANCE = GuidanceConfig(text_scale=4.0, image_scale=2.0, interval=(0.0, 1.0), renorm_type="text_channel")
"""Guidance of the paper's self-reflection: all three branches in all steps."""


def build_benchmark_config(size: Size) -> BagelConfig:
    """Make a configuration with the architecture of `bagel-shapes` and another width, depth and image size."""
    config = build_config(build_processor().tokenizer).to_dict()
    config["text_config"] |= {
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_heads,
        "max_position_embeddings": 4096,
        "layer_types": None,
    }
    config["vision_config"] |= {"image_size": size.image_size}
    return BagelConfig.from_dict(config | {"max_latent_size": max(size.grid)})


def build_model(size: Size, seed: int = 0) -> BagelModel:
    """Build the model of a size in fp32, with its vision tower frozen as in training."""
    if size.released:
        model, _ = load_model("bagel-shapes", dtype="float32", attn_implementation=size.attn_implementation)
    else:
        config = build_benchmark_config(size)
        config._attn_implementation = size.attn_implementation
        torch.manual_seed(seed)
        model = BagelModel(config)
        # The velocity of a new model is 0, and then no other weight has a gradient.
        torch.nn.init.normal_(model.llm2vae.weight, std=0.02)
    model.family.freeze_vision_tower(model)
    return model.train()


def build_image_processor(size: Size) -> BagelProcessor:
    """Build the processor of the shapes world for images of another size."""
    processor = build_processor()
    for tower in ("vae", "vit"):
        for name in ("max_size", "min_size"):
            setattr(processor, f"{tower}_{name}", size.image_size)
    return processor


def self_reflection_trajectories(model: BagelModel, size: Size, seed: int = 0) -> list[Trajectory]:
    """
    Make trajectories `[system] [image] [request] [reflection*] [image*]` with random contents. Members of a group share the given
    segments.

    Args:
        model ([`BagelModel`]): The model, for its vocabulary and latents.
        size ([`Size`]): Lengths and numbers.
        seed (`int`, *optional*, defaults to `0`): Seed of the contents.
    """
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    num_latents, channels = size.grid[0] * size.grid[1], model.latent_channels

    def ids(count: int) -> list[int]:
        return [rng.randrange(10, model.config.text_config.vocab_size) for _ in range(count)]

    given_image = ImageSegment(
        torch.randn(num_latents, channels, generator=generator),
        size.grid,
        pixel_values=torch.rand(3, size.image_size, size.image_size, generator=generator) * 2 - 1,
    )
    system, request = TextSegment(ids(size.system_tokens)), TextSegment(ids(size.request_tokens))
    contexts: dict[str, list[Segment]] = {
        "text_dropped": [system, given_image],
        "image_dropped": [system, request],
    }
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
            size.grid,
            sampled=True,
            window=window,
            guidance_contexts=contexts,
        )
        thought = TextSegment(ids(size.thought_tokens), sampled=True, ended=False)
        trajectories.append(Trajectory([system, given_image, request, thought, image]))
    return trajectories


def without_windows(trajectories: list[Trajectory]) -> list[Trajectory]:
    """Remove the trained windows from trajectories, for a forward of the texts alone."""
    return [
        Trajectory([replace(s, window=None) if isinstance(s, ImageSegment) else s for s in trajectory.segments])
        for trajectory in trajectories
    ]
