# SPDX-License-Identifier: Apache-2.0

"""Configuration of Cosmos3, a causal understanding stream and a flow-matching generation stream in one decoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig

from alphagrpo_ext.models.preflight import check_field_ranges, check_finite_numbers


VARIANTS = ("omni", "edge")
"""Nano's form (Qwen3 layers, Qwen3-VL tower) and Edge's (Nemotron layers, SigLIP2 tower and projector)."""

_SHARED_TRANSFORMER: dict[str, Any] = {
    "attention_bias": False,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "base_fps": 24,
    "enable_fps_modulation": True,
    "latent_channel": 48,
    "latent_patch_size": 2,
    "patch_latent_dim": 192,
    "unified_3d_mrope_reset_spatial_ids": True,
    "unified_3d_mrope_temporal_modality_margin": 15000,
    "rope_axes_dim": [24, 20, 20],
    "timestep_scale": 0.001,
    "action_gen": True,
    "action_dim": 64,
    "num_embodiment_domains": 32,
    "sound_gen": False,
    "sound_dim": None,
}
TRANSFORMER_CONFIGS: dict[str, dict[str, Any]] = {
    "omni": {
        **_SHARED_TRANSFORMER,
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "qk_norm_for_text": True,
        "use_und_k_norm_for_gen": False,
    },
    "edge": {
        **_SHARED_TRANSFORMER,
        "vocab_size": 131072,
        "hidden_size": 2048,
        "intermediate_size": 9216,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "hidden_act": "relu2",
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e8,
        "qk_norm_for_text": False,
        "use_und_k_norm_for_gen": True,
    },
}
"""`transformer/config.json` of the released checkpoints, by variant."""
WAN_AUTOENCODER: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
"""
Sizes of the autoencoder of Wan2.2-TI2V-5B. A released `vae/config.json` also holds its 48 means and standard
deviations.
"""
TOKEN_IDS: dict[str, dict[str, int]] = {
    "omni": {
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
    },
    "edge": {
        "image_token_id": 19,
        "video_token_id": 18,
        "vision_start_token_id": 20,
        "vision_end_token_id": 21,
    },
}
EOS_TOKEN_IDS = {"omni": 151645, "edge": 11}
MAX_POSITIONS = {"omni": 262144, "edge": 131072}
GENERATION_SHIFT = 3.0
"""Timestep shift of NVIDIA's text-to-image defaults, for checkpoints whose schedule does not state one."""


class Cosmos3Config(PreTrainedConfig):
    """
    Configuration of a [`Cosmos3Model`]. The sizes of the released Nano (`"omni"`) or Edge (`"edge"`) are the defaults.

    Args:
        variant (`str`, *optional*, defaults to `"omni"`):
            One of [`VARIANTS`].
        transformer_config (`dict`, *optional*):
            Arguments of Diffusers' `Cosmos3OmniTransformer`.
        vision_config (`dict`, *optional*):
            Arguments of Transformers' `Qwen3VLVisionConfig` or `Cosmos3EdgeVisionConfig`. `None` makes a model without
            a vision tower, which refuses images as context of a text.
        projector_hidden_size (`int`, *optional*, defaults to `11520`):
            Width of the MLP between Edge's vision tower and its decoder.
        autoencoder_config (`dict`, *optional*):
            Arguments of Diffusers' `AutoencoderKLWan`.
        image_token_id, video_token_id, vision_start_token_id, vision_end_token_id (`int`, *optional*):
            Tokens of an image in the understanding stream.
        eos_token_id (`int`, *optional*):
            `<|im_end|>`.
        max_position_embeddings (`int`, *optional*):
            Largest number of positions that the understanding stream was trained for.
        timestep_shift (`float`, *optional*, defaults to `3.0`):
            Shift of the sampling schedule that the release recommends for images.
        pipeline_config, scheduler_config (`dict`, *optional*):
            Settings of `model_index.json` and of `scheduler/scheduler_config.json`. They are kept for `save_cosmos3`.
        chat_pieces (`dict`, *optional*):
            The pieces of the tokenizer's chat template as token ids, see `chat_template.py`.
    """

    model_type = "cosmos3"

    def __init__(
        self,
        variant: Literal["omni", "edge"] = "omni",
        transformer_config: Mapping[str, Any] | None = None,
        vision_config: Mapping[str, Any] | None = None,
        projector_hidden_size: int = 11520,
        autoencoder_config: Mapping[str, Any] | None = None,
        image_token_id: int | None = None,
        video_token_id: int | None = None,
        vision_start_token_id: int | None = None,
        vision_end_token_id: int | None = None,
        eos_token_id: int | None = None,
        max_position_embeddings: int | None = None,
        timestep_shift: float = GENERATION_SHIFT,
        pipeline_config: Mapping[str, Any] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        chat_pieces: Mapping[str, list[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is none of {', '.join(VARIANTS)}")
        self.variant = variant
        self.transformer_config = {**TRANSFORMER_CONFIGS[variant], **(transformer_config or {})}
        self.vision_config = None if vision_config is None else dict(vision_config)
        self.projector_hidden_size = projector_hidden_size
        self.autoencoder_config = {**WAN_AUTOENCODER, **(autoencoder_config or {})}
        tokens = {
            "image_token_id": image_token_id,
            "video_token_id": video_token_id,
            "vision_start_token_id": vision_start_token_id,
            "vision_end_token_id": vision_end_token_id,
        }
        for name, token_id in tokens.items():
            setattr(self, name, TOKEN_IDS[variant][name] if token_id is None else token_id)
        self.max_position_embeddings = max_position_embeddings or MAX_POSITIONS[variant]
        self.timestep_shift = timestep_shift
        self.pipeline_config = dict(pipeline_config or {})
        self.scheduler_config = dict(scheduler_config or {})
        self.chat_pieces = None if chat_pieces is None else {name: list(ids) for name, ids in chat_pieces.items()}
        super().__init__(
            eos_token_id=EOS_TOKEN_IDS[variant] if eos_token_id is None else eos_token_id,
            tie_word_embeddings=kwargs.pop("tie_word_embeddings", False),
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        return self.transformer_config["vocab_size"]

    @property
    def hidden_size(self) -> int:
        return self.transformer_config["hidden_size"]

    @property
    def num_hidden_layers(self) -> int:
        return self.transformer_config["num_hidden_layers"]

    @property
    def latent_patch_size(self) -> int:
        """Side of the square of autoencoder latents that forms one token."""
        return self.transformer_config["latent_patch_size"]

    @property
    def latent_downsample(self) -> int:
        """Pixels per latent token, along one side."""
        return self.autoencoder_config["scale_factor_spatial"] * self.latent_patch_size

    @property
    def latent_channels(self) -> int:
        """Values of one latent token."""
        return self.transformer_config["patch_latent_dim"]

    @property
    def latent_margin(self) -> int:
        """Distance in time between the last position of a context and that of the latents painted from it."""
        return self.transformer_config["unified_3d_mrope_temporal_modality_margin"]

    @property
    def vision_stride(self) -> int:
        """Pixels per token of the vision tower, along one side; 0 without a vision tower."""
        if self.vision_config is None:
            return 0
        return self.vision_config.get("patch_size", 16) * self.vision_config.get("spatial_merge_size", 2)


_WIDTH, _DEPTH, _COUNT = "[1, 1048576]", "[1, 1000]", "[1, 1024]"
_WHOLE_RANGES: dict[str, dict[str, str]] = {
    "transformer_config": {
        "vocab_size": "[1, 16777216]",
        "hidden_size": _WIDTH,
        "intermediate_size": _WIDTH,
        "num_hidden_layers": _DEPTH,
        "num_attention_heads": _COUNT,
        "num_key_value_heads": _COUNT,
        "head_dim": _WIDTH,
        "latent_channel": _WIDTH,
        "latent_patch_size": "[1, 64]",
        "patch_latent_dim": _WIDTH,
        "action_dim": _WIDTH,
        "num_embodiment_domains": _WIDTH,
        "sound_dim": _WIDTH,
        "unified_3d_mrope_temporal_modality_margin": "[0, inf)",
    },
    "vision_config": {
        "hidden_size": _WIDTH,
        "intermediate_size": _WIDTH,
        "depth": _DEPTH,
        "num_hidden_layers": _DEPTH,
        "num_heads": _COUNT,
        "num_attention_heads": _COUNT,
        "patch_size": "[1, 1024]",
        "spatial_merge_size": "[1, 64]",
        "num_position_embeddings": _WIDTH,
        "num_patches": _WIDTH,
        "out_hidden_size": _WIDTH,
    },
    "autoencoder_config": {
        "base_dim": _WIDTH,
        "decoder_base_dim": _WIDTH,
        "z_dim": _WIDTH,
        "num_res_blocks": _COUNT,
        "patch_size": "[1, 64]",
        "scale_factor_spatial": _COUNT,
    },
    "": {
        "projector_hidden_size": _WIDTH,
        "image_token_id": "[0, inf)",
        "video_token_id": "[0, inf)",
        "vision_start_token_id": "[0, inf)",
        "vision_end_token_id": "[0, inf)",
        "max_position_embeddings": "[1, inf)",
    },
}
"""Ranges of whole numbers by part of a [`Cosmos3Config`]. The upper bounds keep a damaged file from taking all memory."""
_FLOAT_RANGES: dict[str, dict[str, str]] = {
    "transformer_config": {"rms_norm_eps": "(0, 1)", "rope_theta": "(1, inf)", "timestep_scale": "(0, 1]"},
    "vision_config": {"layer_norm_eps": "(0, 1)"},
    "": {"timestep_shift": "(0, inf)"},
}


def check_cosmos3_values(values: Mapping[str, Any], sources: Mapping[str, Path]) -> None:
    """
    Check the values of configuration files before a [`Cosmos3Config`] is made from them. A field that is missing has
    its default.

    Args:
        values (`Mapping[str, Any]`):
            Arguments of [`Cosmos3Config`].
        sources (`Mapping[str, Path]`):
            The file of each part: `transformer_config`, `vision_config`, `autoencoder_config`, and `""` for everything
            else.

    Raises:
        `ValueError`: If a value is impossible; the message names field and file.
    """
    if values.get("variant", "omni") not in VARIANTS:
        raise ValueError(f"variant={values['variant']!r} in {sources['']} is none of {', '.join(VARIANTS)}")
    for part, source in sources.items():
        fields = (values.get(part) or {}) if part else values
        if not isinstance(fields, Mapping):
            raise ValueError(f"{part} in {source} must be a mapping, but is {fields!r}")
        check_finite_numbers(fields, source, part)
        check_field_ranges(fields, _WHOLE_RANGES.get(part, {}), _FLOAT_RANGES.get(part, {}), part, source)
    variant = values.get("variant", "omni")
    transformer = {**TRANSFORMER_CONFIGS[variant], **(values.get("transformer_config") or {})}
    autoencoder = {**WAN_AUTOENCODER, **(values.get("autoencoder_config") or {})}
    _check_transformer(transformer, variant, sources["transformer_config"])
    _check_autoencoder(autoencoder, transformer, sources["autoencoder_config"])
    for name in TOKEN_IDS[variant]:
        if (values.get(name) or 0) >= transformer["vocab_size"]:
            raise ValueError(
                f"{name}={values[name]} in {sources['']} is beyond the vocabulary of {transformer['vocab_size']} tokens"
            )


def _check_transformer(config: Mapping[str, Any], variant: str, source: Path) -> None:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads={heads} in {source} is no multiple of num_key_value_heads={kv_heads}")
    axes = config["rope_axes_dim"]
    if not isinstance(axes, list | tuple) or len(axes) != 3 or sum(axes) != config["head_dim"] // 2:
        raise ValueError(
            f"rope_axes_dim in {source} must be three numbers with the sum {config['head_dim'] // 2}, half of head_dim, but is "
            f"{axes!r}"
        )
    expected = TRANSFORMER_CONFIGS[variant]["hidden_act"]
    if config["hidden_act"] != expected:
        raise ValueError(
            f"hidden_act={config['hidden_act']!r} in {source} does not belong to the variant {variant!r}, which has "
            f"{expected!r}"
        )
    values = config["latent_channel"] * config["latent_patch_size"] ** 2
    if config["patch_latent_dim"] != values:
        raise ValueError(
            f"patch_latent_dim={config['patch_latent_dim']} in {source} is not latent_channel * latent_patch_size**2 = {values}"
        )
    if not config["unified_3d_mrope_reset_spatial_ids"]:
        raise ValueError(
            f"unified_3d_mrope_reset_spatial_ids in {source} must be true: latents whose rows and columns go on from the text's "
            f"positions are not supported"
        )
    for name, size in (("action_gen", "action_dim"), ("sound_gen", "sound_dim")):
        if config[name] and not config[size]:
            raise ValueError(f"{source} has {name}, but no {size}")


def _check_autoencoder(config: Mapping[str, Any], transformer: Mapping[str, Any], source: Path) -> None:
    if config["z_dim"] != transformer["latent_channel"]:
        raise ValueError(
            f"z_dim={config['z_dim']} in {source} is not the transformer's latent_channel={transformer['latent_channel']}"
        )
    for name in ("latents_mean", "latents_std"):
        numbers = config[name]
        if not isinstance(numbers, list | tuple) or len(numbers) != config["z_dim"]:
            raise ValueError(f"{name} in {source} must be a list of z_dim={config['z_dim']} numbers")
    if not all(isinstance(number, int | float) and number > 0 for number in config["latents_std"]):
        raise ValueError(f"latents_std in {source} must hold positive numbers, but is {config['latents_std']!r}")
    stages = config["dim_mult"]
    if not isinstance(stages, list | tuple) or not 0 < len(stages) <= 16:
        raise ValueError(f"dim_mult in {source} must be a list of up to 16 factors, but is {stages!r}")
    downsample = 2 ** (len(stages) - 1) * (config["patch_size"] or 1)
    if config["scale_factor_spatial"] != downsample:
        raise ValueError(
            f"scale_factor_spatial={config['scale_factor_spatial']} in {source} is not the {downsample} of its stages and "
            f"patches"
        )
