# SPDX-License-Identifier: Apache-2.0

"""BAGEL in the shapes world: the packaged checkpoint `bagel-shapes`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from alphagrpo_ext.models.bagel.modeling_bagel import BagelModel
from alphagrpo_ext.models.bagel.processing_bagel import BagelProcessor
from alphagrpo_ext.shapes.model import build_config, build_processor
from recipe_tools.shapes_pretraining.families import SHAPES_FAMILIES, ShapesAutoencoder, ShapesFamily


class _Autoencoder(ShapesAutoencoder):
    """Diffusers' `AutoencoderKL`, with one mean and one standard deviation for all channels."""

    def __init__(self, model: BagelModel) -> None:
        self.model, self.module, self.decoder = model, model.vae, model.vae.decoder

    def posterior(self, pixels: torch.Tensor) -> Any:
        return self.module.encode(pixels).latent_dist

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.module.decode(latents).sample

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        std = latents.std()
        self.load_settings({"shift_factor": latents.mean().item(), "scaling_factor": 1 / std.item()})
        return std

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model.config.vae_config)

    def load_settings(self, settings: dict[str, Any]) -> None:
        self.model.config.vae_config.update(settings)
        names = ("shift_factor", "scaling_factor")
        self.module.register_to_config(**{name: self.model.config.vae_config[name] for name in names})


@SHAPES_FAMILIES.register("bagel")
class BagelShapes(ShapesFamily):
    """Two experts of 6 layers and width 128, a vision tower and a small `AutoencoderKL`."""

    def build_processor(self) -> BagelProcessor:
        return build_processor()

    def build_model(self, processor: BagelProcessor) -> BagelModel:
        config = build_config(processor.tokenizer)
        model = BagelModel._from_config(config)
        nn.init.normal_(model.llm2vae.weight, std=config.text_config.initializer_range)
        return model

    def autoencoder(self, model: BagelModel) -> ShapesAutoencoder:
        return _Autoencoder(model)
