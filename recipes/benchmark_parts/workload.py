# SPDX-License-Identifier: Apache-2.0

"""What is measured: models of two sizes, and trajectories of self-reflection with random contents."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.flow.timesteps import flow_timesteps
from alphagrpo_ext.models.bagel import BagelConfig, BagelModel, BagelProcessor
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.shapes.model import build_config, build_processor
from alphagrpo_ext.trajectory import DenoisingWindow, ImageSegment, Segment, TextSegment, Trajectory


@dataclass(frozen=True)
class Size:
    """
    A model and the trajectories that it is measured with.

    Args:
        hidden_size, intermediate_size, num_layers, num_heads (`int`): Of the decoder.
        image_size (`int`): Height and width in pixels, 4 of which are a latent token and a patch of the vision tower.
        system_tokens, request_tokens, thought_tokens (`int`): Length of texts.
        num_trajectories (`int`): Of a micro-batch.
        num_steps (`int`): Trained steps K.
        attn_implementation (`str`): What is fastest on a CPU at this size.
        released (`bool`, *optional*, defaults to `False`): Whether to load `bagel-shapes` instead of random weights.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    system_tokens: int
    request_tokens: int
    thought_tokens: int
    num_trajectories: int
    num_steps: int
    attn_implementation: str
    released: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of latent tokens."""
        return (self.image_size // 4, self.image_size // 4)


SIZES = {
    "bagel-shapes": Size(128, 256, 6, 4, 24, 16, 32, 32, 8, 5, "eager", released=True),
    "100m": Size(512, 2048, 12, 8, 56, 32, 64, 64, 1, 5, "sdpa"),
}
"""About 2 million parameters and 36 image tokens, and about 100 million and 196."""


GUIDANCE = GuidanceConfig(text_scale=4.0, image_scale=2.0, interval=(0.0, 1.0), renorm_type="text_channel")
"""Of the paper's self-reflection: all three branches in all steps."""


def build_benchmark_config(size: Size) -> BagelConfig:
    """The architecture of `bagel-shapes` with another width, depth and image size."""
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
    """The model of a size, in fp32, with its vision tower frozen as in training."""
    if size.released:
        model, _ = load_model("bagel-shapes", dtype="float32", attn_implementation=size.attn_implementation)
    else:
        config = build_benchmark_config(size)
        config._attn_implementation = size.attn_implementation
        torch.manual_seed(seed)
        model = BagelModel(config)
        # A new model predicts no velocity at all, and then nothing else has a gradient.
        torch.nn.init.normal_(model.llm2vae.weight, std=0.02)
    model.family.freeze_vision_tower(model)
    return model.train()


def build_image_processor(size: Size) -> BagelProcessor:
    """The processor of the shapes world for images of another size."""
    processor = build_processor()
    for tower in ("vae", "vit"):
        for name in ("max_size", "min_size"):
            setattr(processor, f"{tower}_{name}", size.image_size)
    return processor


def self_reflection_trajectories(model: BagelModel, size: Size, seed: int = 0) -> list[Trajectory]:
    """
    `[system] [image] [request] [reflection*] [image*]` with random contents. Members of a group share what was given.

    Args:
        model ([`BagelModel`]): Whose vocabulary and latents.
        size ([`Size`]): Lengths and numbers.
        seed (`int`, *optional*, defaults to `0`): Of the contents.
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
    """The same trajectories up to their images: what a forward of the texts alone is given."""
    return [
        Trajectory([replace(s, window=None) if isinstance(s, ImageSegment) else s for s in trajectory.segments])
        for trajectory in trajectories
    ]
