# SPDX-License-Identifier: Apache-2.0

"""Parts of Cosmos3, and its understanding stream with texts and images."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from alphagrpo_ext.models.cosmos3.autoencoder import Cosmos3Autoencoder
from alphagrpo_ext.models.cosmos3.configuration_cosmos3 import Cosmos3Config
from alphagrpo_ext.models.cosmos3.layout import stream_mask
from alphagrpo_ext.models.cosmos3.transformer import Cosmos3Transformer, StreamStates
from alphagrpo_ext.models.cosmos3.vision import Cosmos3Vision
from alphagrpo_ext.models.work import WorkCounter


class Cosmos3Network(PreTrainedModel):
    """
    All parts of Cosmos3 that texts and images need.

    Args:
        config ([`Cosmos3Config`]): Sizes of every part.
    """

    config_class = Cosmos3Config
    base_model_prefix = "cosmos3"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Cosmos3DecoderLayer"]
    _keep_in_fp32_modules_strict = [r"^autoencoder\.", r"^transformer\.time_embedder\."]
    _supports_sdpa = True
    work: WorkCounter | None = None

    def __init__(self, config: Cosmos3Config) -> None:
        super().__init__(config)
        if not config.transformer_config["unified_3d_mrope_reset_spatial_ids"]:
            raise ValueError(
                "unified_3d_mrope_reset_spatial_ids must be true: rows and columns of latents begin at 0 in every image"
            )
        self.transformer = Cosmos3Transformer(config)
        self.vision = None if config.vision_config is None else Cosmos3Vision(config)
        self.autoencoder = Cosmos3Autoencoder(config)
        self.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.eos_token_id)
        self.post_init()
        # `post_init` adds classes of the parts, and FSDP would look for those that this model does not have.
        layers = [*self.transformer.layers, *(() if self.vision is None else self.vision.blocks)]
        self._no_split_modules = {type(layer).__name__ for layer in layers}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        # Loading replaces the parameters, and the new ones are not frozen.
        model.transformer.freeze_unused_heads()
        model.autoencoder.requires_grad_(False)
        return loaded

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.transformer.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.transformer.lm_head = value

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    def understand_contexts(
        self,
        inputs: dict[str, torch.Tensor],
        past: StreamStates | None = None,
        past_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, StreamStates]:
        """
        Run the understanding stream.

        Args:
            inputs (`dict[str, torch.Tensor]`): What [`collate_contexts`] returns, on the model's device.
            past ([`StreamStates`], *optional*): Earlier tokens of the same rows.
            past_mask (`torch.Tensor` of shape `(rows, past)`, *optional*): Which of them are seen.

        Returns:
            States after the final norm, `(rows, tokens, hidden)`, and the [`StreamStates`] of these tokens.
        """
        states, deepstack = self.transformer.embed(inputs["input_ids"]), None
        if "pixels" in inputs:
            states, deepstack = self._embed_images(states, inputs)
        mask = stream_mask(inputs["horizons"], inputs["forks"])
        if past is not None:
            mask = torch.cat([past_mask[:, None].expand(-1, mask.shape[1], -1), mask], dim=2)
        positions = inputs["positions"].transpose(0, 1)
        return self.transformer.understand(states, positions, mask[:, None], past, deepstack)

    def _embed_images(
        self, states: torch.Tensor, inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, list[torch.Tensor]]]:
        """States with the features of images in their places, and what the decoder's first layers add."""
        sizes = inputs["pixel_sizes"].tolist()
        images = [image[:, :height, :width] for image, (height, width) in zip(inputs["pixels"], sizes, strict=True)]
        features, added = self.vision(images)
        index, places = inputs["feature_index"], inputs["feature_places"]
        flat = states.flatten(0, 1).index_put((places,), features[index].to(states.dtype))
        is_image = torch.zeros(len(flat), dtype=torch.bool, device=states.device).index_fill(0, places, True)
        deepstack = (is_image.view(states.shape[:2]), [layer[index] for layer in added])
        return flat.view_as(states), deepstack
