# SPDX-License-Identifier: Apache-2.0

"""Configuration files of a released Cosmos3 checkpoint: Diffusers' per component, and the reasoner's of Transformers."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoencoderKLWan
from diffusers.models.transformers.transformer_cosmos3 import Cosmos3OmniTransformer
from transformers import PreTrainedTokenizerBase

from alphagrpo_ext.models.cosmos3.chat_template import chat_pieces
from alphagrpo_ext.models.cosmos3.configuration_cosmos3 import (
    GENERATION_SHIFT,
    TRANSFORMER_CONFIGS,
    Cosmos3Config,
    check_cosmos3_values,
)
from alphagrpo_ext.models.preflight import read_json


PIPELINE_CLASS, TRANSFORMER_CLASS = "Cosmos3OmniPipeline", "Cosmos3OmniTransformer"
REASONER_TYPES = {"cosmos3_omni": "omni", "cosmos3_edge": "edge"}
TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
TEXT_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps"),
)
"""Fields that the reasoner's configuration and the transformer's have in common."""


def _library_defaults(library_class: type) -> dict[str, Any]:
    """Arguments of a Diffusers class that a configuration file may leave out."""
    parameters = inspect.signature(library_class.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items() if name != "dtype"
    }


def _component_config(path: Path, library_class: type) -> dict[str, Any]:
    """All arguments of a component of Diffusers: those of its file, and the library's defaults."""
    values = {name: value for name, value in read_json(path).items() if not name.startswith("_")}
    if values.get("quantization_config"):
        raise ValueError(f"{path} has a quantization_config: a quantized model must be converted first")
    if read_json(path).get("_class_name", library_class.__name__) != library_class.__name__:
        raise ValueError(f"{path} is of a {read_json(path)['_class_name']}, not of a {library_class.__name__}")
    return {**_library_defaults(library_class), **values}


def _transformer_variant(config: Mapping[str, Any], path: Path) -> str:
    for variant, sizes in TRANSFORMER_CONFIGS.items():
        if config["hidden_act"] == sizes["hidden_act"]:
            return variant
    raise ValueError(f"hidden_act={config['hidden_act']!r} in {path} belongs to no variant of Cosmos3")


def read_configs(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> Cosmos3Config:
    """
    Configuration from the JSON files of a released folder.

    Args:
        folder (`str` or `Path`): The checkpoint folder.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.

    Raises:
        `ValueError`: If a file is damaged or of another model than the others, or if a value is impossible.
    """
    folder = Path(folder)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {folder / 'text_tokenizer'} has no eos_token")
    sources = {
        "": folder / "model_index.json",
        "transformer_config": folder / "transformer" / "config.json",
        "autoencoder_config": folder / "vae" / "config.json",
        "vision_config": folder / "config.json",
    }
    index = read_json(sources[""])
    if index.get("_class_name") != PIPELINE_CLASS:
        raise ValueError(f"{sources['']} is of a {index.get('_class_name')}, not of a {PIPELINE_CLASS}")
    transformer = _component_config(sources["transformer_config"], Cosmos3OmniTransformer)
    if transformer["rope_axes_dim"] is None:
        transformer["rope_axes_dim"] = (transformer["rope_scaling"] or {}).get("mrope_section", [24, 20, 20])
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    pipeline = {
        name: value for name, value in index.items() if not name.startswith("_") and not isinstance(value, list)
    }
    values: dict[str, Any] = {
        "variant": _transformer_variant(transformer, sources["transformer_config"]),
        "transformer_config": transformer,
        "autoencoder_config": _component_config(sources["autoencoder_config"], AutoencoderKLWan),
        "timestep_shift": _timestep_shift(pipeline, scheduler),
        "pipeline_config": pipeline,
        "scheduler_config": scheduler,
        "chat_pieces": _chat_pieces(tokenizer, folder),
        "eos_token_id": tokenizer.eos_token_id,
        **{name: _token_id(tokenizer, token, folder) for name, token in TOKENS.items()},
    }
    if not sources["vision_config"].exists():
        del sources["vision_config"]
        check_cosmos3_values(values, sources)
        return Cosmos3Config(**values)
    values |= _reasoner_values(sources["vision_config"])
    check_cosmos3_values(values, sources)
    _check_reasoner(sources["vision_config"], values)
    return Cosmos3Config(**values)


def _chat_pieces(tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, list[int]]:
    try:
        return chat_pieces(tokenizer)
    except ValueError as error:
        raise ValueError(f"{folder / 'text_tokenizer'}: {error}") from error


def _timestep_shift(pipeline: Mapping[str, Any], scheduler: Mapping[str, Any]) -> float:
    """The shift that has an effect in the release: a scheduler ignores its own under Karras' sigmas."""
    if pipeline.get("native_flow_shift"):
        return pipeline["native_flow_shift"]
    if scheduler.get("use_karras_sigmas") or not scheduler.get("flow_shift"):
        return GENERATION_SHIFT
    return scheduler["flow_shift"]


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str, folder: Path) -> int:
    token_id = tokenizer.get_vocab().get(token)
    if token_id is None:
        raise ValueError(f"the tokenizer in {folder / 'text_tokenizer'} has no token {token}")
    return token_id


def _reasoner_values(path: Path) -> dict[str, Any]:
    """What the configuration of Transformers' reasoner adds to the others."""
    root = read_json(path)
    if not isinstance(root.get("vision_config"), Mapping):
        raise ValueError(f"{path} lacks vision_config")
    added = {
        "vision_config": dict(root["vision_config"]),
        "projector_hidden_size": root.get("projector_hidden_size"),
        "max_position_embeddings": (root.get("text_config") or {}).get("max_position_embeddings"),
    }
    return {name: value for name, value in added.items() if value is not None}


def _check_reasoner(path: Path, values: Mapping[str, Any]) -> None:
    """Raise `ValueError` if the reasoner's configuration is of another model than the rest of the folder."""
    root, transformer = read_json(path), values["transformer_config"]
    if REASONER_TYPES.get(root.get("model_type")) != values["variant"]:
        raise ValueError(
            f"{path} has model_type={root.get('model_type')!r}, but transformer/config.json is of the variant "
            f"{values['variant']!r}: they belong to different models"
        )
    text = root.get("text_config") or {}
    pairs = {f"text_config.{name}": (text.get(name), transformer.get(name)) for name in TEXT_SIZES}
    pairs |= {name: (root.get(name), values[name]) for name in TOKENS}
    for name, (given, expected) in pairs.items():
        if given is not None and given != expected:
            raise ValueError(
                f"{name}={given!r} in {path} differs from {expected!r} in the rest of the folder: they belong to different "
                f"models"
            )


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_configs(config: Cosmos3Config, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Configurations of all components, of the pipeline, and of the reasoner if there is a vision tower."""
    version = {"_diffusers_version": diffusers.__version__}
    for name, library_class, values in (
        ("transformer", TRANSFORMER_CLASS, config.transformer_config),
        ("vae", "AutoencoderKLWan", config.autoencoder_config),
    ):
        write_json(folder / name / "config.json", {"_class_name": library_class, **version, **values})
    scheduler = {"_class_name": "UniPCMultistepScheduler", **(config.scheduler_config or _scheduler(config))}
    write_json(folder / "scheduler" / "scheduler_config.json", {**version, **scheduler})
    settings = {
        "enable_safety_checker": True,
        "default_use_system_prompt": config.variant == "omni",
        "use_native_flow_schedule": config.variant == "edge",
        **config.pipeline_config,
    }
    index = {
        "transformer": ["diffusers", TRANSFORMER_CLASS],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_tokenizer": ["transformers", type(tokenizer).__name__],
        "sound_tokenizer": [None, None],
        "safety_checker": [None, None],
    }
    write_json(folder / "model_index.json", {"_class_name": PIPELINE_CLASS, **version, **settings, **index})
    if config.vision_config is None:
        return
    root = _reasoner_config(config)
    write_json(folder / "config.json", root)
    if config.variant == "omni":
        write_json(folder / "vision_encoder" / "config.json", root["vision_config"])


def _scheduler(config: Cosmos3Config) -> dict[str, Any]:
    """Settings of the pipeline's scheduler for a model that was not loaded from a release."""
    return {
        "num_train_timesteps": 1000,
        "solver_order": 2,
        "solver_type": "bh2",
        "predict_x0": True,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "final_sigmas_type": "zero",
        "flow_shift": config.timestep_shift,
    }


def _reasoner_config(config: Cosmos3Config) -> dict[str, Any]:
    """`config.json` of Transformers' reasoner."""
    is_omni, sizes = config.variant == "omni", config.transformer_config
    rope = {"rope_type": "default", "rope_theta": sizes["rope_theta"], "mrope_section": list(sizes["rope_axes_dim"])}
    text = {
        "model_type": "qwen3_vl_text" if is_omni else "cosmos3_edge_text",
        **{name: sizes[name] for name in (*TEXT_SIZES, "attention_bias")},
        "max_position_embeddings": config.max_position_embeddings,
        "eos_token_id": config.eos_token_id,
        "rope_parameters": {**rope, "mrope_interleaved": True} if is_omni else rope,
    }
    vision_type = "qwen3_vl_vision" if is_omni else "cosmos3_edge_vision"
    return {
        "architectures": [f"Cosmos3{config.variant.title()}ForConditionalGeneration"],
        "model_type": f"cosmos3_{config.variant}",
        "text_config": text,
        "vision_config": {**config.vision_config, "model_type": vision_type},
        **({} if is_omni else {"projector_hidden_size": config.projector_hidden_size}),
        **{name: getattr(config, name) for name in TOKENS},
        "tie_word_embeddings": False,
    }
