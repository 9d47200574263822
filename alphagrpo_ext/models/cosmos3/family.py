# SPDX-License-Identifier: Apache-2.0

"""Cosmos3 as a registered model family."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from alphagrpo_ext.models.contract import FAMILIES, Family
from alphagrpo_ext.models.cosmos3.configuration_cosmos3 import (
    TRANSFORMER_CONFIGS,
    Cosmos3Config,
    check_cosmos3_values,
)
from alphagrpo_ext.models.cosmos3.modeling_cosmos3 import Cosmos3Model
from alphagrpo_ext.models.cosmos3.processing_cosmos3 import Cosmos3Processor
from alphagrpo_ext.models.cosmos3.released.checkpoint import (
    HUB_PATTERNS,
    keeps_fp32,
    load_cosmos3,
    load_cosmos3_config,
    load_cosmos3_processor,
    matches,
    save_cosmos3,
)


_LAYER = r"(.*\.)?transformer\.layers\.\d+\."
_UNDERSTANDING = r"self_attn\.to_(q|k|v|out)|mlp\.(gate|up|down)_proj"
_GENERATION = r"self_attn\.(add_[qkv]_proj|to_add_out)|mlp_moe_gen\.(gate|up|down)_proj"
_LORA_PRESETS = {
    "both": f"{_LAYER}({_UNDERSTANDING}|{_GENERATION})",
    "generation": f"{_LAYER}({_GENERATION})",
    "understanding": f"{_LAYER}({_UNDERSTANDING})",
}
# As many tokens as the releases put around texts: <|im_start|>, a role and a line break; <|im_end|> and a line break.
_STAND_IN_PIECES = {
    name: [0] * num_tokens
    for name, num_tokens in (
        *(("default_system", 5), ("system_start", 3), ("system_end", 2), ("user_start", 3), ("user_end", 2)),
        *(("reply_start", 5), ("answer_start", 5), ("after_reply", 1)),
    )
}
_RELEASED_SIZES = {
    "Cosmos3-Nano": {
        "variant": "omni",
        # The rest are the defaults of Transformers.
        "vision_config": {"out_hidden_size": TRANSFORMER_CONFIGS["omni"]["hidden_size"]},
        "chat_pieces": _STAND_IN_PIECES,
    },
    "Cosmos3-Edge": {"variant": "edge", "vision_config": {}, "chat_pieces": _STAND_IN_PIECES},
}
_GENERATION_PARAMETER = re.compile(
    r"(_moe_gen|\.add_[qkv]_proj|\.to_add_out|\.norm_added_[qk]|\.k_norm_und_for_gen)\."
    r"|(^|\.)transformer\.(proj_in|proj_out|time_embedder|action_|audio_)"
)


@FAMILIES.register(Cosmos3Config.model_type)
class Cosmos3Family(Family):
    """Cosmos3 Nano and Edge, in the released layout and in that of `save_pretrained`."""

    model_class = Cosmos3Model
    processor_class = Cosmos3Processor
    lora_presets = _LORA_PRESETS
    frozen_modules = ("autoencoder",)
    vision_modules = ("vision",)
    hub_marker = "model_index.json"
    hub_files = HUB_PATTERNS
    # NVIDIA's for images.
    sampling_settings = {
        "image_height": 640,
        "image_width": 640,
        "num_timesteps": 51,
        "timestep_shift": 3.0,
        "cfg_text_scale": 4.0,
        "cfg_interval": [0.0, 1.0],
        "max_completion_length": 1000,
    }
    released_sizes = _RELEASED_SIZES
    vision_inputs = ("pixels", "pixel_sizes", "feature_index", "feature_places")

    def matches(self, folder: Path) -> bool:
        return matches(folder)

    def load(
        self, path: str, dtype: torch.dtype | str, revision: str | None = None, **kwargs: Any
    ) -> tuple[Cosmos3Model, Cosmos3Processor]:
        if not matches(path):
            return super().load(path, dtype, revision, **kwargs)
        return load_cosmos3(path, None if dtype == "auto" else dtype)

    def check_config(self, values: Mapping[str, Any], source: Path) -> None:
        super().check_config(values, source)
        parts = ("", "transformer_config", "vision_config", "autoencoder_config")
        check_cosmos3_values(values, dict.fromkeys(parts, source))

    def load_config(self, path: str, revision: str | None = None) -> Cosmos3Config:
        return load_cosmos3_config(path) if matches(path) else super().load_config(path, revision)

    def load_processor(self, path: str, revision: str | None = None) -> Cosmos3Processor:
        return load_cosmos3_processor(path) if matches(path) else super().load_processor(path, revision)

    def save_released(self, model: Cosmos3Model, processor: Cosmos3Processor, folder: str | Path) -> None:
        save_cosmos3(model, processor, folder)

    def is_generation_parameter(self, name: str) -> bool:
        return _GENERATION_PARAMETER.search(name) is not None

    def keeps_fp32(self, name: str) -> bool:
        return keeps_fp32(name)

    def sharded_layers(self, model: Cosmos3Model) -> Sequence[torch.nn.Module]:
        return [*model.transformer.layers, *([] if model.vision is None else model.vision.blocks)]

    def freeze_vision_tower(self, model: Cosmos3Model) -> None:
        if model.vision is not None:
            super().freeze_vision_tower(model)
