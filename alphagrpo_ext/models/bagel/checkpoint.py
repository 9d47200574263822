# Copyright 2026 The AlphaGRPO-Ext Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Reads BAGEL's released checkpoint folder into [`BagelModel`]."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, SiglipVisionConfig

from alphagrpo_ext.models.bagel.configuration_bagel import FLUX_VAE_CONFIG, BagelConfig
from alphagrpo_ext.models.bagel.modeling_bagel import BagelModel
from alphagrpo_ext.models.bagel.processing_bagel import BagelProcessor


RELEASED_FILES = ("ema.safetensors", "ae.safetensors", "llm_config.json", "vit_config.json", "tokenizer_config.json")
SPECIAL_TOKENS = {
    "bos_token_id": "<|im_start|>",
    "eos_token_id": "<|im_end|>",
    "image_start_token_id": "<|vision_start|>",
    "image_end_token_id": "<|vision_end|>",
}


def is_released_layout(folder: str | Path) -> bool:
    """Whether `folder` looks like a released BAGEL checkpoint rather than one that this package saved."""
    folder = Path(folder)
    return (folder / "llm_config.json").exists() or (folder / "ema.safetensors").exists()


def check_released_files(folder: str | Path) -> None:
    """Raise `FileNotFoundError` that names every file that is missing."""
    missing = [name for name in RELEASED_FILES if not (Path(folder) / name).exists()]
    if missing:
        raise FileNotFoundError(f"the BAGEL checkpoint folder {folder} lacks {', '.join(missing)}")


def convert_vae_key(key: str, num_levels: int) -> str:
    """Name of a parameter of the FLUX autoencoder in Diffusers' `AutoencoderKL`."""
    key = key.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")
    key = re.sub(r"mid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", key)
    key = key.replace("mid.attn_1.norm", "mid_block.attentions.0.group_norm")
    key = re.sub(r"mid\.attn_1\.([qkv])\.", r"mid_block.attentions.0.to_\1.", key)
    key = key.replace("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0")
    key = re.sub(r"down\.(\d+)\.block\.(\d+)", r"down_blocks.\1.resnets.\2", key)
    key = re.sub(r"down\.(\d+)\.downsample", r"down_blocks.\1.downsamplers.0", key)
    # The original numbers the decoder's levels from the finest, Diffusers from the coarsest.
    key = re.sub(r"up\.(\d+)\.block\.(\d+)", lambda m: f"up_blocks.{num_levels - 1 - int(m[1])}.resnets.{m[2]}", key)
    return re.sub(r"up\.(\d+)\.upsample", lambda m: f"up_blocks.{num_levels - 1 - int(m[1])}.upsamplers.0", key)


def vae_config_from_weights(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """
    Sizes of the autoencoder, which the release does not write down: read off the shapes of its weights.

    Args:
        weights (`dict[str, torch.Tensor]`): Contents of `ae.safetensors`.
    """
    levels = sorted({int(m[1]) for key in weights if (m := re.match(r"encoder\.down\.(\d+)\.", key))})
    blocks = {int(m[1]) for key in weights if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", key))}
    return {
        **FLUX_VAE_CONFIG,
        "block_out_channels": [len(weights[f"encoder.down.{level}.block.0.conv1.bias"]) for level in levels],
        "layers_per_block": len(blocks),
        "latent_channels": weights["decoder.conv_in.weight"].shape[1],
    }


def convert_vae_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of the FLUX autoencoder for `AutoencoderKL`, whose attention is linear where the original's is a 1x1
    convolution."""
    num_levels = len(vae_config_from_weights(weights)["block_out_channels"])
    converted = {convert_vae_key(key, num_levels): tensor for key, tensor in weights.items()}
    return {
        key: tensor.flatten(1) if "attentions" in key and tensor.ndim == 4 else tensor
        for key, tensor in converted.items()
    }


def config_from_released(
    folder: str | Path, weights: dict[str, torch.Tensor], vae_weights: dict[str, torch.Tensor]
) -> BagelConfig:
    """
    Configuration from the released JSON files, and from shapes where they are silent.

    Args:
        folder (`str` or `Path`): The checkpoint folder.
        weights, vae_weights (`dict[str, torch.Tensor]`): Contents of `ema.safetensors` and `ae.safetensors`.
    """
    folder = Path(folder)
    llm_config = json.loads((folder / "llm_config.json").read_text())
    vit_config = json.loads((folder / "vit_config.json").read_text())
    # As the reference does after reading: heads untied, and the last layer of the vision tower dropped.
    llm_config["tie_word_embeddings"] = False
    vit_config["num_hidden_layers"] -= 1
    vae_config = vae_config_from_weights(vae_weights)
    patch_values = weights["vae2llm.weight"].shape[1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return BagelConfig(
        text_config=Qwen2Config(**llm_config),
        vision_config=SiglipVisionConfig(**vit_config),
        vae_config=vae_config,
        latent_patch_size=round((patch_values / vae_config["latent_channels"]) ** 0.5),
        max_latent_size=round(weights["latent_pos_embed.pos_embed"].shape[0] ** 0.5),
        **{name: _token_id(tokenizer, token, folder) for name, token in SPECIAL_TOKENS.items()},
    )


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str, folder: Path) -> int:
    token_id = tokenizer.get_vocab().get(token)
    if token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no token {token}")
    return token_id


def load_released(folder: str | Path, dtype: torch.dtype = torch.float32) -> tuple[BagelModel, BagelProcessor]:
    """
    Load a released checkpoint.

    Args:
        folder (`str` or `Path`): Folder with the released files.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of all weights but the autoencoder's, which
            stay fp32.

    Raises:
        `FileNotFoundError`: If a file is missing; the message names it.
        `ValueError`: If a weight is missing, left over or of another shape.
    """
    folder = Path(folder)
    check_released_files(folder)
    weights, vae_weights = load_file(folder / "ema.safetensors"), load_file(folder / "ae.safetensors")
    config = config_from_released(folder, weights, vae_weights)
    with torch.device("meta"):
        model = BagelModel(config)
    state = {**weights, **{f"vae.{key}": tensor for key, tensor in convert_vae_weights(vae_weights).items()}}
    state = {key: tensor.to(torch.float32 if key.startswith("vae.") else dtype) for key, tensor in state.items()}
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights in {folder} do not fit its configuration: {error}") from error
    # The rotary frequencies are no part of a checkpoint, so they are still on the meta device.
    model.language_model.model.rotary_emb = type(model.language_model.model.rotary_emb)(config.text_config)
    model.vae.requires_grad_(False)
    model.config._name_or_path = str(folder)
    processor = BagelProcessor(tokenizer=AutoTokenizer.from_pretrained(folder))
    return model.eval(), processor
