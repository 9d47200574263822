# SPDX-License-Identifier: Apache-2.0

"""
Reading and writing of [`Cosmos3Model`] in the layout of the released checkpoints.

A released folder serves two libraries. `model_index.json` and a folder per component are Diffusers' pipeline.
`config.json` and an index at the root, which points into `transformer/` and `vision_encoder/`, are Transformers'
reasoner: understanding stream and vision tower. Every weight is stored once. A folder that Diffusers' pipeline wrote has
no vision tower, and makes a model without one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoTokenizer
from transformers.utils import logging

from alphagrpo_ext.models.cosmos3.configuration_cosmos3 import Cosmos3Config
from alphagrpo_ext.models.cosmos3.modeling_cosmos3 import Cosmos3Model
from alphagrpo_ext.models.cosmos3.processing_cosmos3 import Cosmos3Processor
from alphagrpo_ext.models.cosmos3.released.configs import (
    PIPELINE_CLASS,
    REASONER_TYPES,
    TRANSFORMER_CLASS,
    read_configs,
    write_configs,
    write_json,
)
from alphagrpo_ext.models.preflight import check_field_ranges, check_processor_file, check_vocabulary, read_json
from alphagrpo_ext.models.saving import staged_folder, state_bytes
from alphagrpo_ext.models.weight_files import (
    DTYPE_NAMES,
    check_weight_file,
    read_shapes,
    read_tensors,
    shape_differences,
    summarize,
    write_tensors,
)


DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS = "diffusion_pytorch_model", "model"
ROOT_INDEX = "model.safetensors.index.json"
PROCESSOR_SETTINGS = "cosmos3_processor.json"
"""Settings of our processor. `processor_config.json` belongs to Transformers' processor."""
HUB_PATTERNS = (
    "*.json",
    "*.jinja",
    "*.txt",
    "transformer/*",
    "vae/*",
    "scheduler/*",
    "text_tokenizer/*",
    "vision_encoder/*",
)
"""Patterns of all files of a released checkpoint that are read. A repository may hold others, such as a sound tokenizer."""
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Component:
    """
    A part of the model, and where its weights are.

    Args:
        folder (`str`): Its folder in the release.
        stem (`str`): Name of its weight file, without suffix.
        prefixes (`Mapping[str, str]`): Beginnings of names in the model, by beginnings of names in the release.
    """

    folder: str
    stem: str
    prefixes: Mapping[str, str]

    def released_name(self, name: str) -> str | None:
        """Name in the release of a weight of the model, `None` if it belongs to another component."""
        for released, own in self.prefixes.items():
            if name.startswith(own):
                return released + name.removeprefix(own)
        return None

    def files(self, folder: Path) -> list[Path]:
        """Weight files of the component in a released folder, which need not exist."""
        index = folder / self.folder / f"{self.stem}.safetensors.index.json"
        if not index.exists():
            return [folder / self.folder / f"{self.stem}.safetensors"]
        names = read_json(index).get("weight_map", {}).values()
        return [folder / self.folder / name for name in sorted(set(names))]


def components(variant: str, vision: bool) -> tuple[Component, ...]:
    """The components of a model. Nano's vision tower is stored with flat names, Edge's with full ones."""
    tower = (
        {"": "vision.visual."}
        if variant == "omni"
        else {"model.visual.": "vision.visual.", "model.projector.": "vision.projector."}
    )
    parts = (
        Component("transformer", DIFFUSERS_WEIGHTS, {"": "transformer."}),
        Component("vae", DIFFUSERS_WEIGHTS, {"": "autoencoder.vae."}),
        Component("vision_encoder", TRANSFORMERS_WEIGHTS, tower),
    )
    return parts if vision else parts[:2]


def matches(folder: str | Path) -> bool:
    """Whether a folder looks like a Cosmos3 checkpoint that this package did not save, complete or not."""
    folder = Path(folder)
    for path, key, names in (
        (folder / "model_index.json", "_class_name", {PIPELINE_CLASS}),
        (folder / "transformer" / "config.json", "_class_name", {TRANSFORMER_CLASS}),
        (folder / "config.json", "model_type", REASONER_TYPES),
    ):
        if path.exists() and read_json(path).get(key) in names:
            return True
    return False


def check_components(folder: str | Path) -> None:
    """
    Check that a released folder has every component.

    Raises:
        `FileNotFoundError`: If a file is missing; the message names all of them, and says so if the folder holds
            Transformers' reasoner without a generator.
    """
    folder = Path(folder)
    weights = [path for part in components("omni", _has_reasoner(folder)) for path in part.files(folder)]
    _refuse_missing(folder, _missing_configs(folder) + [str(p.relative_to(folder)) for p in weights if not p.exists()])


def _has_reasoner(folder: Path) -> bool:
    return (folder / "config.json").exists() or (folder / "vision_encoder").is_dir()


def _missing_configs(folder: Path) -> list[str]:
    """
    Files of a released folder, other than weights, that it lacks.

    Raises:
        `FileNotFoundError`: If it has no generator.
    """
    has_reasoner = _has_reasoner(folder)
    names = ["model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
    missing = [name for name in names if not (folder / name).exists()]
    if has_reasoner and not (folder / "transformer" / "config.json").exists():
        raise FileNotFoundError(
            f"the folder {folder} holds the reasoner of Cosmos3 without its generator: it lacks {', '.join(missing)}. A model "
            f"that paints needs the whole released folder"
        )
    missing += [] if not has_reasoner or (folder / "config.json").exists() else ["config.json"]
    tokenizer = folder / "text_tokenizer"
    # Without its vocabulary a tokenizer loads all the same, and is empty.
    if not (tokenizer / "tokenizer.json").exists() and not (tokenizer / "vocab.json").exists():
        missing.append("text_tokenizer/tokenizer.json")
    return missing


def _refuse_missing(folder: Path, missing: Sequence[str]) -> None:
    if missing:
        raise FileNotFoundError(f"the Cosmos3 checkpoint folder {folder} lacks {', '.join(missing)}")


def _empty_model(config: Cosmos3Config) -> Cosmos3Model:
    """A model on the meta device: names and shapes without weights."""
    with torch.device("meta"):
        return Cosmos3Model(config)


def _check_types(path: Path) -> None:
    """Refuse a file of quantized weights by its header, whose extra tensors would else be the first thing to complain of."""
    with safe_open(path, framework="pt") as file:
        for name in file.offset_keys():
            dtype = file.get_slice(name).get_dtype()
            if dtype not in DTYPE_NAMES.values():
                raise ValueError(
                    f"{name} in {path} is of type {dtype}, but weights must be of type {', '.join(DTYPE_NAMES.values())}: a "
                    f"quantized model must be converted first"
                )


def load_cosmos3(
    folder: str | Path, dtype: torch.dtype | None = torch.float32
) -> tuple[Cosmos3Model, Cosmos3Processor]:
    """
    Load a released checkpoint of either variant.

    Names, shapes and types are checked before a weight is read, and no weight is initialised. A weight that is stored
    in `dtype` stays a view of the file until it is written to or moved to another device. Other weights are converted
    one at a time.

    Args:
        folder (`str` or `Path`): The released folder, which must not change while the model is in use.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Data type of all weights except those of the autoencoder and of the embedding of time, which are fp32.
            `None` keeps the type in which each of the others is stored.

    Raises:
        `FileNotFoundError`: If a component is missing; the message names it.
        `ValueError`: If a file is truncated or damaged, if a weight is missing, left over, quantized, of another shape, NaN
            or infinite, or if the configurations have an impossible value or belong to different models.
    """
    folder = Path(folder)
    check_components(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "text_tokenizer")
    config = read_configs(folder, tokenizer)
    check_vocabulary(tokenizer, config.vocab_size, folder / "text_tokenizer")
    model = _empty_model(config)
    parts = components(config.variant, config.vision_config is not None)
    _check_weights(folder, model, parts)
    processor = load_cosmos3_processor(folder)
    model.load_state_dict(_read_state(folder, model, parts, dtype), strict=True, assign=True)
    if model.vision is not None:
        model.vision.reset_buffers()
    # PEFT writes the first of these names, TRL reads the second.
    model.name_or_path = model.config._name_or_path = str(folder)
    return model.eval(), processor


def _check_weights(folder: Path, model: Cosmos3Model, parts: Sequence[Component]) -> None:
    files = [path for part in parts for path in part.files(folder)]
    for path in files:
        read_shapes(path)
        _check_types(path)
    problems = []
    for part in parts:
        expected = {
            released: tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
            if (released := part.released_name(name)) is not None
        }
        actual = {name: shape for path in part.files(folder) for name, shape in read_shapes(path).items()}
        problems += shape_differences(expected, actual, part.folder)
    if problems:
        raise ValueError(f"the weights in {folder} do not fit its configuration: {summarize(problems)}")
    for path in files:
        check_weight_file(path)


def _read_state(
    folder: Path, model: Cosmos3Model, parts: Sequence[Component], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    state = {}
    with logging.tqdm(total=len(model.state_dict()), desc="Loading weights") as progress:
        for part in parts:
            own_names = {part.released_name(name): name for name in model.state_dict()}
            part_dtype = torch.float32 if part.folder == "vae" else dtype
            for path in part.files(folder):
                for released, tensor in read_tensors(path, part_dtype):
                    name = own_names[released]
                    if keeps_fp32(name) and tensor.dtype != torch.float32:
                        tensor = _read_fp32(path, released)
                    state[name] = tensor
                    progress.update()
    return state


def _read_fp32(path: Path, name: str) -> torch.Tensor:
    """A weight whose exact values the conversion of the others has lost."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name).float()


def keeps_fp32(name: str) -> bool:
    """Whether a weight of the model is fp32 in a model of any data type."""
    return name.startswith(("autoencoder.", "transformer.time_embedder."))


def load_cosmos3_config(folder: str | Path) -> Cosmos3Config:
    """
    Load the configuration of a released folder, which need not hold any weights.

    Raises:
        `FileNotFoundError`: If a configuration or the tokenizer is missing; the message names it.
        `ValueError`: As [`load_cosmos3`].
    """
    folder = Path(folder)
    _refuse_missing(folder, _missing_configs(folder))
    return read_configs(folder, AutoTokenizer.from_pretrained(folder / "text_tokenizer"))


def load_cosmos3_processor(folder: str | Path) -> Cosmos3Processor:
    """
    Load the processor of a released folder: its tokenizer, the areas of its image processor, and whether its pipeline
    uses a system prompt. Settings that [`save_cosmos3`] wrote come first.

    Raises:
        `ValueError`: If the image processor does something else than what the vision tower's rows are made by.
    """
    folder = Path(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "text_tokenizer")
    if (folder / PROCESSOR_SETTINGS).exists():
        check_processor_file(folder / PROCESSOR_SETTINGS, Cosmos3Processor.number_ranges)
        return Cosmos3Processor(tokenizer=tokenizer, **read_json(folder / PROCESSOR_SETTINGS))
    config = read_configs(folder, tokenizer)
    settings = {
        "use_system_prompt": config.pipeline_config.get("default_use_system_prompt", True),
        "image_stride": config.latent_downsample,
        **({"vision_stride": config.vision_stride} if config.vision_stride else {}),
    }
    if (folder / "preprocessor_config.json").exists():
        settings |= _image_areas(folder / "preprocessor_config.json")
    return Cosmos3Processor(tokenizer=tokenizer, **settings)


def _image_areas(path: Path) -> dict[str, int]:
    values = read_json(path)
    for name in ("image_mean", "image_std"):
        if values.get(name, [0.5] * 3) != [0.5] * 3:
            raise ValueError(f"{name} in {path} must be [0.5, 0.5, 0.5], but is {values[name]}")
    size = values.get("size") or {}
    areas = {
        "min_pixels": size.get("shortest_edge", values.get("min_pixels")),
        "max_pixels": size.get("longest_edge", values.get("max_pixels")),
    }
    check_field_ranges(areas, Cosmos3Processor.number_ranges, {}, "", path)
    return {name: area for name, area in areas.items() if area is not None}


def save_cosmos3(model: Cosmos3Model, processor: Cosmos3Processor, folder: str | Path) -> None:
    """
    Write a model in the released layout, which Diffusers' pipeline, Transformers' reasoner and [`load_cosmos3`] read.
    The folder appears complete or not at all. It has no sound tokenizer, which the model does not hold and the pipeline
    does not need for images.

    Args:
        model ([`Cosmos3Model`]): The model, with its adapters merged. Weights keep their data types.
        processor ([`Cosmos3Processor`]): Its processor.
        folder (`str` or `Path`): The folder to write, which must be empty or not exist.

    Raises:
        `FileExistsError`: If `folder` has files.
        `OSError`: If the disk has no room.
        `ValueError`: If the model has something that the released layout has no place for, e.g. an adapter.
    """
    if not isinstance(model, Cosmos3Model):
        raise ValueError(
            f"the released layout is for a Cosmos3Model, but this is a {type(model).__name__}: merge an adapter first "
            f"(merge_and_unload), and unwrap what a launcher has wrapped"
        )
    config, state = model.config, model.state_dict()
    expected = {name: tensor.shape for name, tensor in _empty_model(config).state_dict().items()}
    problems = shape_differences(expected, {name: tensor.shape for name, tensor in state.items()}, "the model")
    if problems:
        raise ValueError(f"the model's weights do not fit its configuration: {summarize(problems)}")
    has_vision = config.vision_config is not None
    with staged_folder(folder, state_bytes(model)) as stage:
        for part in components(config.variant, has_vision):
            (stage / part.folder).mkdir()
        write_configs(config, processor.tokenizer, stage)
        _write_processor(config, processor, stage)
        weight_map = {}
        for part in components(config.variant, has_vision):
            tensors = {r: state[name] for name in state if (r := part.released_name(name)) is not None}
            names = _write_shards(tensors, stage / part.folder, part.stem)
            weight_map |= {} if part.folder == "vae" else {r: f"{part.folder}/{file}" for r, file in names.items()}
        if has_vision:
            size = sum(tensor.nbytes for name, tensor in state.items() if not name.startswith("autoencoder."))
            write_json(stage / ROOT_INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _shards(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Names of tensors in groups of at most [`MAX_SHARD_BYTES`]."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > MAX_SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _write_shards(tensors: Mapping[str, torch.Tensor], folder: Path, stem: str) -> dict[str, str]:
    """Write one file, or several and an index. Returns the file of every tensor."""
    shards = list(_shards(tensors))
    files = {}
    for i, names in enumerate(shards):
        number = "" if len(shards) == 1 else f"-{i + 1:05d}-of-{len(shards):05d}"
        write_tensors(folder / f"{stem}{number}.safetensors", {name: tensors[name] for name in names})
        files |= dict.fromkeys(names, f"{stem}{number}.safetensors")
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": files})
    return files


def _write_processor(config: Cosmos3Config, processor: Cosmos3Processor, folder: Path) -> None:
    """Tokenizer of both libraries, Transformers' image processor, and the settings of our own processor."""
    for target in (folder / "text_tokenizer", folder):
        processor.tokenizer.save_pretrained(target)
    settings = processor.to_dict()
    parameters = inspect.signature(type(processor).__init__).parameters
    own = {name: settings[name] for name in parameters if name in settings and name != "tokenizer"}
    write_json(folder / PROCESSOR_SETTINGS, own)
    if config.vision_config is None:
        return
    is_omni = config.variant == "omni"
    image_processor = {
        "image_processor_type": "Qwen2VLImageProcessor" if is_omni else "Cosmos3EdgeImageProcessor",
        "size": {"shortest_edge": processor.min_pixels, "longest_edge": processor.max_pixels},
        "patch_size": config.vision_config.get("patch_size", 16),
        "temporal_patch_size": config.vision_config.get("temporal_patch_size", 2) if is_omni else 1,
        "merge_size": config.vision_config.get("spatial_merge_size", 2),
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    write_json(folder / "preprocessor_config.json", image_processor)
