# SPDX-License-Identifier: Apache-2.0

"""BAGEL as a registered model family."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from alphagrpo_ext.models.bagel.checkpoint import (
    DOWNLOADED_FILES,
    is_released_layout,
    load_released,
    load_released_config,
    load_released_processor,
    save_released,
)
from alphagrpo_ext.models.bagel.configuration_bagel import LORA_PRESETS, BagelConfig, check_bagel_values
from alphagrpo_ext.models.bagel.modeling_bagel import BagelModel
from alphagrpo_ext.models.bagel.packing import Bucket
from alphagrpo_ext.models.bagel.processing_bagel import BagelProcessor
from alphagrpo_ext.models.contract import FAMILIES, Family


@FAMILIES.register(BagelConfig.model_type)
class BagelFamily(Family):
    """BAGEL, in its released layout and in that of `save_pretrained`."""

    model_class = BagelModel
    processor_class = BagelProcessor
    lora_presets = LORA_PRESETS
    frozen_modules = ("vae",)
    vision_modules = ("vit_model", "connector")
    hub_marker = "llm_config.json"
    hub_files = DOWNLOADED_FILES
    # Those of BAGEL's own demonstration.
    sampling_settings = {
        "image_height": 1024,
        "image_width": 1024,
        "num_timesteps": 50,
        "timestep_shift": 3.0,
        "cfg_text_scale": 4.0,
        "cfg_interval": [0.4, 1.0],
        "max_completion_length": 1000,
        "temperature": 0.3,
    }
    released_sizes = {"BAGEL-7B-MoT": {}}
    vision_inputs = ("vit_patches", "vit_position_ids", "vit_mask", "vit_image", "vit_index")
    number_inputs = ("buckets",)

    def matches(self, folder: Path) -> bool:
        return is_released_layout(folder)

    def load(
        self, path: str, dtype: torch.dtype | str, revision: str | None = None, **kwargs: Any
    ) -> tuple[BagelModel, BagelProcessor]:
        if not is_released_layout(path):
            return super().load(path, dtype, revision, **kwargs)
        model, processor = load_released(path, None if dtype == "auto" else dtype)
        if kwargs.get("attn_implementation"):
            model.set_attn_implementation(kwargs["attn_implementation"])
        return model, processor

    def save_released(self, model: BagelModel, processor: BagelProcessor, folder: str | Path) -> None:
        save_released(model, processor, folder)

    def check_config(self, values: Mapping[str, Any], source: Path) -> None:
        super().check_config(values, source)
        check_bagel_values(values, dict.fromkeys(("", "text_config", "vision_config", "vae_config"), source))

    def load_config(self, path: str, revision: str | None = None) -> BagelConfig:
        return load_released_config(path) if is_released_layout(path) else super().load_config(path, revision)

    def load_processor(self, path: str, revision: str | None = None) -> BagelProcessor:
        return (
            load_released_processor(Path(path)) if is_released_layout(path) else super().load_processor(path, revision)
        )

    def is_generation_parameter(self, name: str) -> bool:
        return re.search(r"_moe_gen\.|(^|\.)(vae2llm|llm2vae|time_embedder)\.", name) is not None

    def keeps_fp32(self, name: str) -> bool:
        return name.startswith("vae.")

    def mask_sizes(self, inputs: Mapping[str, torch.Tensor]) -> Sequence[int]:
        sizes = []
        for bucket in (Bucket(*line) for line in inputs["buckets"].tolist()):
            context = bucket.context_und + bucket.context_gen
            sizes += [
                bucket.sequences * queries * context for queries in (context, bucket.copies * bucket.copy_tokens)
            ]
        return sizes

    def sharded_layers(self, model: BagelModel) -> Sequence[torch.nn.Module]:
        return [*model.language_model.model.layers, *model.vit_model.vision_model.encoder.layers]
