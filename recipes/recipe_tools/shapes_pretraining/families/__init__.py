# SPDX-License-Identifier: Apache-2.0

"""What differs between the families that are pretrained on shapes: one registered object each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.registry import Registry


_FOLDER = "recipe_tools.shapes_pretraining.families"
SHAPES_FAMILIES: Registry = Registry(
    "family of the shapes world",
    "alphagrpo_ext.shapes_families",
    {"bagel": f"{_FOLDER}.bagel:BagelShapes", "cosmos3": f"{_FOLDER}.cosmos3:Cosmos3Shapes"},
)
"""Subclasses of [`ShapesFamily`] by name."""


class ShapesAutoencoder(ABC):
    """The autoencoder of a model while it is trained. Its latents have shape `(batch, channels, height, width)`."""

    module: nn.Module
    """All its weights."""
    decoder: nn.Module
    """The weights that are trained once the latents are fixed."""

    @abstractmethod
    def posterior(self, pixels: torch.Tensor) -> Any:
        """
        Diffusers' `DiagonalGaussianDistribution` of pixels `(batch, 3, height, width)` in [-1, 1].
        """

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels of latents."""

    @abstractmethod
    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Set mean and standard deviation of the latents in the model's configuration from a sample of them.

        Returns:
            `torch.Tensor`: The standard deviation, of a shape that broadcasts to that of latents.
        """

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The part of the model's configuration that belongs to the autoencoder."""

    @abstractmethod
    def load_settings(self, settings: dict[str, Any]) -> None:
        """Set that part."""


class ShapesFamily(ABC):
    """A family's tiny model of the shapes world. Register a subclass with `@SHAPES_FAMILIES.register("name")`."""

    @abstractmethod
    def build_processor(self) -> UnifiedProcessor:
        """Make the processor, with a tokenizer of one token per word."""

    @abstractmethod
    def build_model(self, processor: UnifiedProcessor) -> UnifiedModel:
        """Make a model with random weights, whose generation head begins with small velocities that are not 0."""

    @abstractmethod
    def autoencoder(self, model: Any) -> ShapesAutoencoder:
        """The autoencoder of a model."""
