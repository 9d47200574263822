# SPDX-License-Identifier: Apache-2.0

"""What the benchmark knows about families beyond their contract: how to build their models of the shapes world in other sizes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedConfig

from alphagrpo_ext.models.bagel import BagelConfig, BagelProcessor
from alphagrpo_ext.models.cosmos3.configuration_cosmos3 import Cosmos3Config
from alphagrpo_ext.models.cosmos3.processing_cosmos3 import Cosmos3Processor
from alphagrpo_ext.shapes.model import PATCH_SIZE, build_config
from benchmark_parts.sizes import Size
from recipe_tools.shapes_pretraining.families.cosmos3 import (
    VISION_PATCH_SIZE,
    build_cosmos3_config,
    initialize_autoencoder,
)


class BenchmarkFamily(ABC):
    """The architecture of a family's tiny model of the shapes world, with another width, depth and image size."""

    attention_bias: ClassVar[bool]
    """Whether queries, keys and values of the understanding expert have a bias."""

    @abstractmethod
    def set_image_size(self, processor: Any, image_size: int) -> None:
        """Make the processor of the shapes world resize images to this height and width."""

    @abstractmethod
    def build_config(self, size: Size, processor: Any) -> PreTrainedConfig:
        """Make the configuration of a size."""

    @abstractmethod
    def initialize(self, model: Any) -> None:
        """Draw again the weights whose default start is of no use."""


class BagelBenchmark(BenchmarkFamily):
    """BAGEL. A latent token and a patch of the vision tower have 4 x 4 pixels."""

    attention_bias = True

    def set_image_size(self, processor: BagelProcessor, image_size: int) -> None:
        for tower in ("vae", "vit"):
            for name in ("max_size", "min_size"):
                setattr(processor, f"{tower}_{name}", image_size)

    def build_config(self, size: Size, processor: BagelProcessor) -> BagelConfig:
        config = build_config(processor.tokenizer).to_dict()
        config["text_config"] |= {
            **_decoder_sizes(size),
            "max_position_embeddings": 4096,
            "layer_types": None,
        }
        config["vision_config"] |= {"image_size": size.image_size}
        return BagelConfig.from_dict(config | {"max_latent_size": size.image_size // PATCH_SIZE})

    def initialize(self, model: Any) -> None:
        # The velocity of a new model is 0, and then no other weight has a gradient.
        nn.init.normal_(model.llm2vae.weight, std=0.02)


class Cosmos3Benchmark(BenchmarkFamily):
    """Cosmos3 in Nano's form. A latent token and a patch of the vision tower have 4 x 4 pixels."""

    attention_bias = False

    def set_image_size(self, processor: Cosmos3Processor, image_size: int) -> None:
        processor.min_pixels = processor.max_pixels = image_size**2
        processor.max_image_size = image_size

    def build_config(self, size: Size, processor: Cosmos3Processor) -> Cosmos3Config:
        config = build_cosmos3_config(processor.tokenizer).to_dict()
        head_dim = size.hidden_size // size.num_heads
        # Shares of time, rows and columns as in the configuration of the shapes world, which has 6, 5 and 5 of 16.
        side = head_dim // 2 * 5 // 16
        config["transformer_config"] |= {
            **_decoder_sizes(size),
            "head_dim": head_dim,
            "rope_axes_dim": [head_dim // 2 - 2 * side, side, side],
        }
        config["vision_config"] |= {
            "out_hidden_size": size.hidden_size,
            "num_position_embeddings": (size.image_size // VISION_PATCH_SIZE) ** 2,
        }
        return Cosmos3Config.from_dict(config)

    def initialize(self, model: Any) -> None:
        # As pretraining starts it. By default, all images have one color.
        initialize_autoencoder(model.autoencoder.vae)


def _decoder_sizes(size: Size) -> dict[str, int]:
    return {
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_heads,
    }


BENCHMARK_FAMILIES: dict[str, BenchmarkFamily] = {"bagel": BagelBenchmark(), "cosmos3": Cosmos3Benchmark()}
"""By the `model_type` that a size names."""
