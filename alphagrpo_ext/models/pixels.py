# SPDX-License-Identifier: Apache-2.0

"""Conversion of images to tensors and back."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """Convert an image to pixels `(3, height, width)` in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return (pixels.permute(2, 0, 1) / 255 - 0.5) / 0.5


def tensor_to_image(pixels: torch.Tensor) -> Image.Image:
    """
    Convert pixels `(3, height, width)` in [-1, 1] to an image. Values are truncated to eight bits, as the reference
    does.
    """
    pixels = (pixels.float().cpu() * 0.5 + 0.5).clamp(0, 1) * 255
    return Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).numpy())
