# SPDX-License-Identifier: Apache-2.0

"""Reading and writing of [`BagelModel`] in the layout of the released checkpoint."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, Qwen2Config, SiglipVisionConfig
from transformers.utils import logging

from alphagrpo_ext.models.bagel.configuration_bagel import FLUX_VAE_CONFIG, BagelConfig, check_bagel_values
from alphagrpo_ext.models.bagel.modeling_bagel import BagelModel
from alphagrpo_ext.models.bagel.processing_bagel import BagelProcessor
from alphagrpo_ext.models.preflight import check_processor_file, check_vocabulary, read_json
from alphagrpo_ext.models.saving import staged_folder, state_bytes
from alphagrpo_ext.models.weight_files import (
    check_weight_file,
    read_shapes,
    read_tensors,
    shape_differences,
    summarize,
    write_tensors,
)


MODEL_WEIGHTS = "ema.safetensors"
VAE_WEIGHTS = "ae.safetensors"
RELEASED_FILES = (MODEL_WEIGHTS, VAE_WEIGHTS, "llm_config.json", "vit_config.json", "tokenizer_config.json")
PROCESSOR_CONFIG = "processor_config.json"
DOWNLOADED_FILES = (
    *RELEASED_FILES,
    *("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    PROCESSOR_CONFIG,
)
"""All files of a released checkpoint that are read. A repository may hold others, such as weights without EMA."""
DELIMITER_TOKENS = {
    "bos_token_id": "<|im_start|>",
    "eos_token_id": "<|im_end|>",
    "image_start_token_id": "<|vision_start|>",
    "image_end_token_id": "<|vision_end|>",
}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ReleasedTensor:
    """
    Place of a tensor of [`BagelModel`] in the release.

    Args:
        file (`str`): `"ema.safetensors"`, or `"ae.safetensors"` for the autoencoder.
        name (`str`): Its name there.
        shape (`tuple[int, ...]`): Its shape there.
    """

    file: str
    name: str
    shape: tuple[int, ...]


def is_released_layout(folder: str | Path) -> bool:
    """Whether `folder` looks like a released BAGEL checkpoint rather than one that this package saved."""
    folder = Path(folder)
    return (folder / "llm_config.json").exists() or (folder / MODEL_WEIGHTS).exists()


def check_released_files(folder: str | Path) -> None:
    """Raise `FileNotFoundError` that names every file that is missing."""
    folder = Path(folder)
    missing = [name for name in RELEASED_FILES if not (folder / name).exists()]
    # Without its vocabulary a tokenizer loads all the same, and is empty.
    if not (folder / "tokenizer.json").exists():
        vocabulary = [name for name in ("vocab.json", "merges.txt") if not (folder / name).exists()]
        missing += ["tokenizer.json (or vocab.json and merges.txt)"] if len(vocabulary) == 2 else vocabulary
    if missing:
        raise FileNotFoundError(f"the BAGEL checkpoint folder {folder} lacks {', '.join(missing)}")


def released_vae_key(key: str, num_levels: int) -> str:
    """Name of a parameter of Diffusers' `AutoencoderKL` in the FLUX autoencoder."""
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = key.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
    key = re.sub(r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1.", key)
    key = key.replace("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out")
    key = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    # The original numbers the decoder's levels from the finest, Diffusers from the coarsest.
    key = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{num_levels - 1 - int(m[1])}.block.{m[2]}", key)
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{num_levels - 1 - int(m[1])}.upsample", key)


def released_tensors(model: BagelModel) -> dict[str, ReleasedTensor]:
    """
    Places of all tensors of a model in the release, by their names in the model, which may be on the meta device.
    """
    num_levels = len(model.config.vae_config["block_out_channels"])
    tensors = {}
    for key, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if not key.startswith("vae."):
            tensors[key] = ReleasedTensor(MODEL_WEIGHTS, key, shape)
            continue
        # The original's attention is a 1x1 convolution where Diffusers' is linear.
        shape += (1, 1) if "attentions" in key and len(shape) == 2 else ()
        tensors[key] = ReleasedTensor(VAE_WEIGHTS, released_vae_key(key.removeprefix("vae."), num_levels), shape)
    return tensors


def _empty_model(config: BagelConfig) -> BagelModel:
    """A model on the meta device: names and shapes without weights."""
    with torch.device("meta"):
        return BagelModel(config)


def _shape(shapes: Shapes, name: str, file: str) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"{file} lacks {name}, from which sizes of the model are read")
    return shapes[name]


def vae_config_from_shapes(shapes: Shapes) -> dict[str, Any]:
    """
    Sizes of the autoencoder, read from the shapes of its weights because the release does not state them.

    Args:
        shapes (`Mapping[str, tuple[int, ...]]`): Shapes of `ae.safetensors`.

    Raises:
        `ValueError`: If a weight that tells a size is missing.
    """
    levels = sorted({int(m[1]) for key in shapes if (m := re.match(r"encoder\.down\.(\d+)\.", key))})
    blocks = {int(m[1]) for key in shapes if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", key))}
    channels = [_shape(shapes, f"encoder.down.{level}.block.0.conv1.bias", VAE_WEIGHTS)[0] for level in levels]
    return {
        **FLUX_VAE_CONFIG,
        "block_out_channels": channels,
        "layers_per_block": len(blocks),
        "latent_channels": _shape(shapes, "decoder.conv_in.weight", VAE_WEIGHTS)[1],
    }


def config_from_released(folder: str | Path, shapes: Shapes, vae_shapes: Shapes) -> BagelConfig:
    """
    Configuration from the released JSON files, and from the shapes of weights where these say nothing.

    Args:
        folder (`str` or `Path`): The checkpoint folder.
        shapes, vae_shapes (`Mapping[str, tuple[int, ...]]`): Shapes of `ema.safetensors` and `ae.safetensors`.

    Raises:
        `ValueError`: If a file is damaged, a weight that tells a size is missing, or the tokenizer does not fit.
    """
    folder = Path(folder)
    sources = {"text_config": folder / "llm_config.json", "vision_config": folder / "vit_config.json"}
    llm_config, vit_config = (read_json(path) for path in sources.values())
    for name, values, field in (("llm", llm_config, "vocab_size"), ("vit", vit_config, "num_hidden_layers")):
        if field not in values:
            raise ValueError(f"{folder / name}_config.json lacks {field}")
    check_bagel_values({"text_config": llm_config, "vision_config": vit_config}, sources)
    # The reference unties the heads and drops the last layer of the vision tower after reading.
    llm_config["tie_word_embeddings"] = False
    vit_config["num_hidden_layers"] -= 1
    vae_config = vae_config_from_shapes(vae_shapes)
    patch_values = _shape(shapes, "vae2llm.weight", MODEL_WEIGHTS)[1]
    positions = _shape(shapes, "latent_pos_embed.pos_embed", MODEL_WEIGHTS)[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return BagelConfig(
        text_config=Qwen2Config(**llm_config),
        vision_config=SiglipVisionConfig(**vit_config),
        vae_config=vae_config,
        latent_patch_size=round((patch_values / vae_config["latent_channels"]) ** 0.5),
        max_latent_size=round(positions**0.5),
        **{
            name: _token_id(tokenizer, token, folder, llm_config["vocab_size"])
            for name, token in DELIMITER_TOKENS.items()
        },
    )


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str, folder: Path, vocab_size: int) -> int:
    token_id = tokenizer.get_vocab().get(token)
    if token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no token {token}")
    if token_id >= vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} gives {token} the id {token_id}, but the vocabulary of llm_config.json has "
            f"{vocab_size} entries: they belong to different models"
        )
    return token_id


def load_released_config(folder: str | Path) -> BagelConfig:
    """
    Load the configuration of a released checkpoint, for which the headers of its weight files are read as well.

    Raises:
        `FileNotFoundError`, `ValueError`: As [`load_released`].
    """
    check_released_files(folder)
    shapes = (read_shapes(Path(folder) / file) for file in (MODEL_WEIGHTS, VAE_WEIGHTS))
    return config_from_released(folder, *shapes)


def load_released(folder: str | Path, dtype: torch.dtype | None = torch.float32) -> tuple[BagelModel, BagelProcessor]:
    """
    Load a released checkpoint.

    Names and shapes are checked before a weight is read, and no weight is initialised. A weight that is stored in
    `dtype` stays a view of the file until it is written to or moved to another device. Other weights are converted one
    at a time.

    Args:
        folder (`str` or `Path`): Folder with the released files, which must not change while the model is in use.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Data type of all weights except those of the
            autoencoder, which stay fp32. `None` keeps the type in which each weight is stored.

    Raises:
        `FileNotFoundError`: If a file is missing; the message names it.
        `ValueError`: If a file is truncated or damaged, if a weight is missing, left over, of another shape or type, NaN or
            infinite, or if a configuration has an impossible value.
    """
    folder = Path(folder)
    check_released_files(folder)
    shapes = {file: read_shapes(folder / file) for file in (MODEL_WEIGHTS, VAE_WEIGHTS)}
    config = config_from_released(folder, shapes[MODEL_WEIGHTS], shapes[VAE_WEIGHTS])
    model = _empty_model(config)
    tensors = released_tensors(model)
    problems = []
    for file, actual in shapes.items():
        expected = {tensor.name: tensor.shape for tensor in tensors.values() if tensor.file == file}
        problems += shape_differences(expected, actual, file)
    if problems:
        raise ValueError(f"the weights in {folder} do not fit its configuration: {summarize(problems)}")
    for file in shapes:
        check_weight_file(folder / file)
    processor = load_released_processor(folder)
    check_vocabulary(processor.tokenizer, config.text_config.vocab_size, folder)
    model.load_state_dict(_read_state(folder, tensors, model, dtype), strict=True, assign=True)
    # The rotary frequencies are not in a checkpoint, so they are still on the meta device.
    model.language_model.model.rotary_emb = type(model.language_model.model.rotary_emb)(config.text_config)
    model.vae.requires_grad_(False)
    # PEFT writes the first of these names, TRL reads the second.
    model.name_or_path = model.config._name_or_path = str(folder)
    return model.eval(), processor


def _read_state(
    folder: Path, tensors: Mapping[str, ReleasedTensor], model: BagelModel, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = {}
    with logging.tqdm(total=len(tensors), desc="Loading weights") as progress:
        for file in (MODEL_WEIGHTS, VAE_WEIGHTS):
            own_names = {tensor.name: own for own, tensor in tensors.items() if tensor.file == file}
            file_dtype = torch.float32 if file == VAE_WEIGHTS else dtype
            for name, tensor in read_tensors(folder / file, file_dtype):
                state[own_names[name]] = tensor.reshape(shapes[own_names[name]])
                progress.update()
    return state


def load_released_processor(folder: Path) -> BagelProcessor:
    # `save_released` adds this file to the layout, so that prompts and sizes are kept.
    if (folder / PROCESSOR_CONFIG).exists():
        check_processor_file(folder / PROCESSOR_CONFIG, BagelProcessor.number_ranges)
        return BagelProcessor.from_pretrained(folder)
    return BagelProcessor(tokenizer=AutoTokenizer.from_pretrained(folder))


def save_released(model: BagelModel, processor: BagelProcessor, folder: str | Path) -> None:
    """
    Write a model in the released layout, which [`load_released`] and the reference code read. The folder appears
    complete or not at all. Settings of the processor go into `processor_config.json`, which the reference code does
    not read.

    Args:
        model ([`BagelModel`]): The model, with its adapters merged. Weights keep their data types.
        processor ([`BagelProcessor`]): Its processor.
        folder (`str` or `Path`): The folder to write, which must be empty or not exist.

    Raises:
        `FileExistsError`: If `folder` has files.
        `OSError`: If the disk has no room.
        `ValueError`: If the model has something that the released layout has no place for, e.g. an adapter.
    """
    if not isinstance(model, BagelModel):
        raise ValueError(
            f"the released layout is for a BagelModel, but this is a {type(model).__name__}: merge an adapter first "
            f"(merge_and_unload), and unwrap what a launcher has wrapped"
        )
    empty, state = _empty_model(copy.deepcopy(model.config)), model.state_dict()
    tensors = released_tensors(empty)
    expected, actual = (
        {name: tensor.shape for name, tensor in weights.items()} for weights in (empty.state_dict(), state)
    )
    problems = shape_differences(expected, actual, "the model")
    if problems:
        raise ValueError(f"the model's weights do not fit its configuration: {summarize(problems)}")
    with staged_folder(folder, state_bytes(model)) as stage:
        _write_configs(model.config, stage)
        _write_processor(processor, stage)
        _check_readable(model.config, stage, tensors)
        for file in (MODEL_WEIGHTS, VAE_WEIGHTS):
            write_tensors(
                stage / file,
                {t.name: state[own].reshape(t.shape) for own, t in tensors.items() if t.file == file},
            )


def _write_configs(config: BagelConfig, folder: Path) -> None:
    generic = PreTrainedConfig().to_dict().keys() - {"tie_word_embeddings"}
    # The Transformers version of the reference code has neither of them, and both follow from the other settings.
    generic |= {"rope_parameters", "layer_types"}
    llm_config, vit_config = (
        {"model_type": part.model_type, **{k: v for k, v in part.to_dict().items() if k not in generic}}
        for part in (config.text_config, config.vision_config)
    )
    llm_config |= {
        "architectures": ["Qwen2ForCausalLM"],
        "rope_theta": config.text_config.rope_parameters["rope_theta"],
    }
    vit_config["num_hidden_layers"] += 1
    for name, values in (("llm", llm_config), ("vit", vit_config)):
        (folder / f"{name}_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_processor(processor: BagelProcessor, folder: Path) -> None:
    """
    Write tokenizer files as in the release. The Transformers version of the reference code reads the slow tokenizer's
    files.
    """
    processor.save_pretrained(folder)
    tokenizer = processor.tokenizer
    tokenizer.backend_tokenizer.model.save(str(folder))
    path = folder / "tokenizer_config.json"
    settings = read_json(path)
    for key in ("backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens", [])
    settings["added_tokens_decoder"] = {
        str(token_id): {
            "content": token.content,
            **{name: getattr(token, name) for name in ("lstrip", "normalized", "rstrip", "single_word", "special")},
        }
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_readable(config: BagelConfig, folder: Path, tensors: Mapping[str, ReleasedTensor]) -> None:
    """Raise `ValueError` that names every setting of `config` that would be read back with another value."""
    shapes = [{t.name: t.shape for t in tensors.values() if t.file == file} for file in (MODEL_WEIGHTS, VAE_WEIGHTS)]
    actual = config_from_released(folder, *shapes)
    pairs = {
        field: (getattr(config, field), getattr(actual, field))
        for field in ("latent_patch_size", "max_latent_size", "connector_hidden_act", *DELIMITER_TOKENS)
    }
    vae_config = {key: list(v) if isinstance(v, tuple) else v for key, v in config.vae_config.items()}
    for key in sorted(vae_config.keys() | actual.vae_config.keys()):
        pairs[f"vae_config['{key}']"] = (vae_config.get(key), actual.vae_config.get(key))
    rope_type = config.text_config.rope_parameters.get("rope_type", "default")
    pairs["text_config.rope_parameters['rope_type']"] = (rope_type, "default")
    lost = [
        f"{name}={given!r} (it would be read as {read!r})" for name, (given, read) in pairs.items() if given != read
    ]
    if lost:
        raise ValueError(f"the released layout has no place for {', '.join(lost)}: use save_pretrained")
