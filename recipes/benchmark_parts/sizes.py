# SPDX-License-Identifier: Apache-2.0

"""Sizes of the models and trajectories that the benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """
    A model and the trajectories that it is measured with.

    Args:
        hidden_size, intermediate_size, num_layers, num_heads (`int`): Sizes of the decoder.
        image_size (`int`): Height and width of images in pixels. A latent token and a patch of the vision tower have 4 x 4 pixels.
        system_tokens, request_tokens, thought_tokens (`int`): Length of texts.
        num_trajectories (`int`): Trajectories per micro-batch.
        num_steps (`int`): Trained steps K.
        attn_implementation (`str`): The attention that is fastest on a CPU at this size.
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
