# SPDX-License-Identifier: Apache-2.0

"""Configuration of BAGEL, an AR-diffusion unified multimodal model with a mixture of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig, Qwen2Config, SiglipVisionConfig

from alphagrpo_ext.models.preflight import check_field_ranges, check_finite_numbers
from alphagrpo_ext.ranges import in_range


# The FLUX autoencoder in Diffusers' spelling; BAGEL's loader hard-codes the same numbers.
FLUX_VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}


def _lora_targets(expert: str) -> str:
    layer = r".*language_model\.model\.layers\.\d+\."
    return rf"{layer}(self_attn\.[qkvo]_proj{expert}|mlp{expert}\.(gate|up|down)_proj)"


# Attention and MLP of the experts, and nothing of the vision tower.
LORA_PRESETS = {
    "both": _lora_targets("(_moe_gen)?"),
    "generation": _lora_targets("_moe_gen"),
    "understanding": _lora_targets(""),
}
LORA_TARGET_MODULES = LORA_PRESETS["both"]


class BagelConfig(PreTrainedConfig):
    """
    Configuration of a [`BagelModel`].

    The sizes that BAGEL-7B-MoT was released with are the defaults.

    Args:
        text_config (`Qwen2Config` or `dict`, *optional*):
            The language model. Both experts have its sizes.
        vision_config (`SiglipVisionConfig` or `dict`, *optional*):
            The vision tower. `num_hidden_layers` counts the layers that are *used*: BAGEL stores 27 and uses 26.
        vae_config (`dict`, *optional*):
            Arguments of Diffusers' `AutoencoderKL`; `downsample` follows from its blocks.
        latent_patch_size (`int`, *optional*, defaults to `2`):
            Side of the square of VAE latents that forms one token.
        max_latent_size (`int`, *optional*, defaults to `64`):
            Side of the table of latent positions: the largest number of token rows or columns of an image.
        connector_hidden_act (`str`, *optional*, defaults to `"gelu_pytorch_tanh"`):
            Activation of the connector between vision tower and language model.
        bos_token_id, eos_token_id, image_start_token_id, image_end_token_id (`int`, *optional*):
            Delimiters of text and image blocks: `<|im_start|>`, `<|im_end|>`, `<|vision_start|>`, `<|vision_end|>`.
    """

    model_type = "bagel"
    # TRL looks here when it loads a reference model.
    auto_map: ClassVar[dict[str, str]] = {}
    sub_configs = {"text_config": Qwen2Config, "vision_config": SiglipVisionConfig}

    def __init__(
        self,
        text_config: Qwen2Config | dict[str, Any] | None = None,
        vision_config: SiglipVisionConfig | dict[str, Any] | None = None,
        vae_config: dict[str, Any] | None = None,
        latent_patch_size: int = 2,
        max_latent_size: int = 64,
        connector_hidden_act: str = "gelu_pytorch_tanh",
        bos_token_id: int = 151644,
        eos_token_id: int = 151645,
        image_start_token_id: int = 151652,
        image_end_token_id: int = 151653,
        **kwargs: Any,
    ) -> None:
        if text_config is None:
            text_config = Qwen2Config(
                vocab_size=152064,
                hidden_size=3584,
                intermediate_size=18944,
                num_hidden_layers=28,
                num_attention_heads=28,
                num_key_value_heads=4,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            )
        if vision_config is None:
            vision_config = SiglipVisionConfig(
                hidden_size=1152,
                intermediate_size=4304,
                num_hidden_layers=26,
                num_attention_heads=16,
                image_size=980,
                patch_size=14,
            )
        self.text_config = Qwen2Config(**text_config) if isinstance(text_config, dict) else text_config
        if self.text_config.hidden_act != "silu":
            raise ValueError(f"text_config.hidden_act must be 'silu', but is {self.text_config.hidden_act!r}")
        self.vision_config = SiglipVisionConfig(**vision_config) if isinstance(vision_config, dict) else vision_config
        self.vae_config = {**FLUX_VAE_CONFIG, **(vae_config or {})}
        self.latent_patch_size = latent_patch_size
        self.max_latent_size = max_latent_size
        self.connector_hidden_act = connector_hidden_act
        self.image_start_token_id = image_start_token_id
        self.image_end_token_id = image_end_token_id
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=kwargs.pop("tie_word_embeddings", False),
            **kwargs,
        )

    def get_text_config(self, *args: Any, **kwargs: Any) -> Qwen2Config:
        return self.text_config

    @property
    def image_token_id(self) -> int:
        """The token that TRL keeps a text generator from sampling."""
        return self.image_start_token_id

    @property
    def vae_downsample(self) -> int:
        """Pixels per VAE latent, along one side."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def latent_downsample(self) -> int:
        """Pixels per latent token, along one side."""
        return self.vae_downsample * self.latent_patch_size

    @property
    def latent_channels(self) -> int:
        """Values of one latent token."""
        return self.latent_patch_size**2 * self.vae_config["latent_channels"]

    @property
    def vision_patches_per_side(self) -> int:
        return self.vision_config.image_size // self.vision_config.patch_size


_WIDTH, _DEPTH, _COUNT, _ID = "[1, 1048576]", "[1, 1000]", "[1, 1024]", "[0, inf)"
WHOLE_RANGES: dict[str, dict[str, str]] = {
    "text_config": {
        "vocab_size": "[1, 16777216]",
        "hidden_size": _WIDTH,
        "intermediate_size": _WIDTH,
        "num_hidden_layers": _DEPTH,
        "num_attention_heads": _COUNT,
        "num_key_value_heads": _COUNT,
        "head_dim": _WIDTH,
        "max_position_embeddings": "[1, inf)",
    },
    "vision_config": {
        "hidden_size": _WIDTH,
        "intermediate_size": _WIDTH,
        "num_hidden_layers": _DEPTH,
        "num_attention_heads": _COUNT,
        "num_channels": "[3, 3]",
        "image_size": "[1, 65536]",
        "patch_size": "[1, 65536]",
    },
    "vae_config": {
        "in_channels": "[3, 3]",
        "out_channels": "[3, 3]",
        "layers_per_block": _COUNT,
        "latent_channels": _WIDTH,
        "norm_num_groups": _WIDTH,
    },
    "": {
        "latent_patch_size": _COUNT,
        "max_latent_size": "[1, 65536]",
        "bos_token_id": _ID,
        "eos_token_id": _ID,
        "image_start_token_id": _ID,
        "image_end_token_id": _ID,
    },
}
"""Ranges of whole numbers by part of a [`BagelConfig`]. The upper bounds keep a damaged file from taking all memory."""
FLOAT_RANGES: dict[str, dict[str, str]] = {
    "text_config": {"rms_norm_eps": "(0, 1)", "rope_theta": "(1, inf)", "attention_dropout": "[0, 1)"},
    "vision_config": {"layer_norm_eps": "(0, 1)", "attention_dropout": "[0, 1)"},
    "vae_config": {"scaling_factor": "(0, inf)", "shift_factor": "(-inf, inf)"},
}
DIVISORS = (
    ("text_config", "hidden_size", "num_attention_heads"),
    ("text_config", "num_attention_heads", "num_key_value_heads"),
    ("vision_config", "hidden_size", "num_attention_heads"),
    ("vision_config", "image_size", "patch_size"),
)
"""Part, and two of its fields of which the first is a multiple of the second."""


def check_bagel_values(values: Mapping[str, Any], sources: Mapping[str, Path]) -> None:
    """
    Check the values of a configuration file before a [`BagelConfig`] is made from them. A field that is missing has its default.

    Args:
        values (`Mapping[str, Any]`): Its contents, with the parts `text_config`, `vision_config` and `vae_config`.
        sources (`Mapping[str, Path]`): The file of each part; `""` is the part of everything else.

    Raises:
        `ValueError`: If a value is impossible; the message names field and file.
    """
    parts = {name: values.get(name) or {} if name else values for name in sources}
    for part, fields in parts.items():
        check_finite_numbers(fields, sources[part], part)
        rope = fields.get("rope_parameters") or {}
        given = {"rope_theta": rope.get("rope_theta"), **fields}
        check_field_ranges(given, WHOLE_RANGES.get(part, {}), FLOAT_RANGES.get(part, {}), part, sources[part])
    for part, multiple, divisor in DIVISORS:
        whole, by = (parts.get(part, {}).get(name) for name in (multiple, divisor))
        if whole and by and whole % by and not (multiple == "hidden_size" and parts[part].get("head_dim")):
            raise ValueError(f"{part}.{multiple}={whole} in {sources[part]} is no multiple of {divisor}={by}")
    autoencoder = {**FLUX_VAE_CONFIG, **parts.get("vae_config", {})}
    channels, groups = autoencoder["block_out_channels"], autoencoder["norm_num_groups"]
    is_list = isinstance(channels, list | tuple) and 0 < len(channels) <= 16
    if "vae_config" in parts and not (
        is_list and all(isinstance(n, int) and in_range(n, _WIDTH) and n % groups == 0 for n in channels)
    ):
        raise ValueError(
            f"vae_config.block_out_channels in {sources['vae_config']} must be up to 16 multiples of norm_num_groups={groups}, but "
            f"is {channels!r}"
        )
    vocab_size = parts.get("text_config", {}).get("vocab_size")
    for name in ("bos_token_id", "eos_token_id", "image_start_token_id", "image_end_token_id"):
        token_id = parts.get("", {}).get(name)
        if vocab_size and token_id is not None and token_id >= vocab_size:
            raise ValueError(f"{name}={token_id} in {sources['']} is beyond the vocabulary of {vocab_size} tokens")
