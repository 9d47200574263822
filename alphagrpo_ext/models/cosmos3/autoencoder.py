# SPDX-License-Identifier: Apache-2.0

"""The autoencoder of Cosmos3, from pixels to latent tokens and back."""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import nn

from alphagrpo_ext.models.cosmos3.configuration_cosmos3 import Cosmos3Config


# The autoencoder keeps features of earlier video frames as its own state, so that two threads must not use it at once.
# The lock is no attribute, because a model is copied.
_LOCK = threading.Lock()


class FrameConvolution(WanCausalConv3d):
    """
    A causal convolution for a frame that stands alone. The frames before it are zeros, so that the last frame of the kernel is all
    that matters, and a convolution of two dimensions computes the same in a third of the time.
    """

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        # Wan's convolutions keep height and width.
        padding = tuple(size // 2 for size in self.kernel_size[1:])
        frame = F.conv2d(x.squeeze(2), self.weight[:, :, -1], self.bias, self.stride[1:], padding)
        return frame[:, :, None]


class Cosmos3Autoencoder(nn.Module):
    """
    `AutoencoderKLWan` for single images. It computes in fp32, without gradient.

    A token holds `latent_patch_size**2` neighbouring latents, channels varying fastest. Latents are normalised by the
    means and standard deviations of the configuration.
    """

    def __init__(self, config: Cosmos3Config) -> None:
        super().__init__()
        self.config = config
        self.vae = AutoencoderKLWan.from_config(config.autoencoder_config)
        for module in self.vae.modules():
            if type(module) is WanCausalConv3d:
                module.__class__ = FrameConvolution
        self.requires_grad_(False)

    def _statistics(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = (
            torch.tensor(self.config.autoencoder_config[name], dtype=torch.float32, device=device).view(1, -1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return mean, std

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """
        Latent tokens of images: the mode of the posterior, normalised.

        Args:
            images (`torch.Tensor` of shape `(batch, 3, height, width)`):
                Pixels in [-1, 1]. Height and width are multiples of the pixels per token.

        Returns:
            `torch.Tensor` of shape `(batch, tokens, channels)`, fp32.

        Raises:
            `ValueError`: If an image is not a whole number of tokens high and wide.
        """
        height, width = images.shape[-2:]
        stride = self.config.latent_downsample
        if height % stride or width % stride:
            raise ValueError(
                f"an image of {height} x {width} pixels cannot be encoded: both sides must be multiples of {stride} pixels"
            )
        with _LOCK, torch.autocast(device_type=images.device.type, enabled=False):
            latents = self.vae.encode(images[:, :, None].to(self.vae.dtype)).latent_dist.mode()[:, :, 0].float()
        mean, std = self._statistics(latents.device)
        side = self.config.latent_patch_size
        patches = ((latents - mean) / std).unflatten(3, (-1, side)).unflatten(2, (-1, side))
        return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """
        Pixels `(batch, 3, height, width)` in [-1, 1] of latent tokens `(batch, tokens, channels)`, fp32. `grid` is their
        rows and columns.
        """
        side = self.config.latent_patch_size
        patches = tokens.float().unflatten(1, grid).unflatten(3, (side, side, -1))
        mean, std = self._statistics(tokens.device)
        latents = patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3) * std + mean
        with _LOCK, torch.autocast(device_type=tokens.device.type, enabled=False):
            return self.vae.decode(latents[:, :, None].to(self.vae.dtype)).sample[:, :, 0].float()
