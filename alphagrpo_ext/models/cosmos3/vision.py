# SPDX-License-Identifier: Apache-2.0

"""The vision tower of Cosmos3: Qwen3-VL's for Nano's form, SigLIP2 with a projector for Edge's form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers.models.cosmos3_edge.configuration_cosmos3_edge import (
    Cosmos3EdgeConfig,
)
from transformers.models.cosmos3_edge.image_processing_pil_cosmos3_edge import smart_resize as edge_smart_resize
from transformers.models.cosmos3_edge.modeling_cosmos3_edge import Cosmos3EdgePatchMerger, Cosmos3EdgeVisionModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from alphagrpo_ext.models.cosmos3.configuration_cosmos3 import Cosmos3Config


MIN_PIXELS, MAX_PIXELS = 256 * 256, 4096 * 4096
"""Area of an image that the released image processors resize to."""


class Cosmos3Vision(nn.Module):
    """
    Vision tower and connector. Both are Transformers' own modules. An image takes one token per square of
    `config.vision_stride` pixels.
    """

    def __init__(self, config: Cosmos3Config) -> None:
        super().__init__()
        self.config = config
        if config.variant == "omni":
            self.visual = Qwen3VLVisionModel(Qwen3VLVisionConfig(**config.vision_config))
            return
        edge = edge_config(config)
        self.visual = Cosmos3EdgeVisionModel(edge.vision_config)
        self.projector = Cosmos3EdgePatchMerger(edge)

    @property
    def blocks(self) -> nn.ModuleList:
        """Layers of the tower."""
        return self.visual.blocks if self.config.variant == "omni" else self.visual.encoder.layers

    def reset_buffers(self) -> None:
        """Compute the buffers that are in no checkpoint, for a tower that was made on the meta device."""
        if self.config.variant == "omni":
            self.visual.rotary_pos_emb = type(self.visual.rotary_pos_emb)(self.visual.config)

    def forward(self, images: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """
        Features of images as tokens of the understanding stream.

        Args:
            images (`Sequence[torch.Tensor]`):
                Pixels `(3, height, width)` in [-1, 1]. Sides are multiples of `config.vision_stride`.

        Returns:
            Features of all tokens of all images, `(tokens, hidden)`, row by row, and what is added to the states of these
            tokens after each of the decoder's first layers: one tensor of the same shape per layer, none in Edge's form.

        Raises:
            `ValueError`: If a side is no multiple of the stride.
        """
        for image in images:
            if image.shape[-2] % self.config.vision_stride or image.shape[-1] % self.config.vision_stride:
                raise ValueError(
                    f"the vision tower cannot read an image of {image.shape[-2]} x {image.shape[-1]} pixels: both sides must "
                    f"be multiples of {self.config.vision_stride} pixels"
                )
        device, dtype = images[0].device, next(self.visual.parameters()).dtype
        patch = self.visual.config.patch_size
        grids = torch.tensor([[1, image.shape[-2] // patch, image.shape[-1] // patch] for image in images])
        rows = torch.cat([self.patch_rows(image) for image in images]).to(dtype)
        if self.config.variant == "omni":
            output = self.visual(rows, grid_thw=grids.to(device), return_dict=True)
            return output.pooler_output, list(output.deepstack_features)
        output = self.visual(rows, grid_thw=grids.to(device), return_dict=True)
        return self.projector(output.last_hidden_state), []

    def patch_rows(self, image: torch.Tensor) -> torch.Tensor:
        """
        Values of the patches of one image `(3, height, width)` in the order of the tower: `(patches, values)`. The
        patches of one token follow each other. Nano's tower reads a video, in which an image is two equal frames.
        """
        config = self.visual.config
        patch, merge = config.patch_size, config.spatial_merge_size
        blocks = image.unflatten(2, (-1, merge, patch)).unflatten(1, (-1, merge, patch))
        # (channel, row, merge row, y, column, merge column, x)
        if self.config.variant == "edge":
            return blocks.permute(1, 4, 2, 5, 3, 6, 0).flatten(4).flatten(0, 3)
        frames = blocks.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
        return frames.expand(*[-1] * 5, config.temporal_patch_size, -1, -1).flatten(4).flatten(0, 3)


def edge_config(config: Cosmos3Config) -> Cosmos3EdgeConfig:
    """Transformers' configuration of Edge's form: vision tower, projector and understanding stream."""
    sizes = config.transformer_config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "attention_bias")
    rope = {"rope_type": "default", "rope_theta": sizes["rope_theta"], "mrope_section": list(sizes["rope_axes_dim"])}
    return Cosmos3EdgeConfig(
        text_config={name: sizes[name] for name in names} | {"rope_parameters": rope},
        vision_config=dict(config.vision_config),
        projector_hidden_size=config.projector_hidden_size,
    )


def smart_size(
    config: Cosmos3Config, height: int, width: int, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """
    The size that the variant's image processor resizes an image to, before the vision tower reads it.

    Args:
        config ([`Cosmos3Config`]): Configuration of a model with a vision tower.
        height, width (`int`): Size of the image in pixels.
        min_pixels, max_pixels (`int`, *optional*): Least and largest area of the result.
    """
    stride = config.vision_stride
    if config.variant == "omni":
        return smart_resize(height, width, factor=stride, min_pixels=min_pixels, max_pixels=max_pixels)
    return edge_smart_resize(
        1, height, width, temporal_factor=1, factor=stride, min_pixels=min_pixels, max_pixels=max_pixels
    )
