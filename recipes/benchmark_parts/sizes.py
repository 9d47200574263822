# SPDX-License-Identifier: Apache-2.0

"""Sizes of the models and trajectories that the benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """
    A model and the trajectories that it is measured with.

    Args:
        family (`str`): `model_type` of the model's family.
        hidden_size, intermediate_size, num_layers, num_heads (`int`): Sizes of the decoder.
        image_size (`int`): Height and width of images in pixels.
        system_tokens, request_tokens, thought_tokens (`int`): Length of texts.
        num_trajectories (`int`): Trajectories per micro-batch.
        num_steps (`int`): Trained steps K.
        attn_implementation (`str`):
            Attention of the parts that do not compare implementations. From 64 image tokens on it is the one that stores no scores,
            since these parts also compare peak memory.
        released (`bool`, *optional*, defaults to `False`): Whether to load `bagel-shapes` instead of random weights.
    """

    family: str
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


SIZES = {
    "bagel-shapes": Size("bagel", 128, 256, 6, 4, 24, 16, 32, 32, 8, 5, "eager", released=True),
    "shapes-256": Size("bagel", 128, 256, 6, 4, 64, 16, 32, 32, 2, 5, "sdpa"),
    "100m": Size("bagel", 512, 2048, 12, 8, 56, 32, 64, 64, 1, 5, "sdpa"),
    "66m": Size("bagel", 512, 2048, 8, 8, 32, 32, 32, 32, 8, 10, "sdpa"),
    "66m-256": Size("bagel", 512, 2048, 8, 8, 64, 32, 32, 32, 2, 10, "sdpa"),
    "cosmos3-shapes": Size("cosmos3", 128, 256, 6, 4, 24, 16, 32, 32, 8, 5, "eager"),
}
"""
About 2 million parameters and 36 or 256 image tokens, about 100 million and 196, about 66 million and 64 or 256, and about 3 million
and 36.
"""
