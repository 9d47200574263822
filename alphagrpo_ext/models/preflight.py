# SPDX-License-Identifier: Apache-2.0

"""Checks of a saved model's files before memory is taken for its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from alphagrpo_ext.models.weight_files import check_weight_file, read_shapes, summarize
from alphagrpo_ext.ranges import check_number


def read_json(path: str | Path) -> dict[str, Any]:
    """
    Read a JSON file that holds an object.

    Raises:
        `ValueError`: If the file is damaged; the message names it.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): copy or download it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(values).__name__}")
    return values


def check_finite_numbers(values: Any, source: str | Path, place: str = "") -> None:
    """Raise `ValueError` at the first NaN or infinity in the values of a JSON file, which JSON itself does not have."""
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        name = f"{place}.{key}" if place else str(key)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} in {source} must be a finite number, but is {value}")
        check_finite_numbers(value, source, name)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder that `save_pretrained` wrote: one, or those that its index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]


def check_saved_model(folder: Path, model_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """
    Compare the configuration of a saved model with the headers of its weight files, and check the weights' types and values.

    Args:
        folder (`Path`): A folder that `save_pretrained` wrote.
        model_class (`type[PreTrainedModel]`): Class of the model, which is built without memory for its weights.

    Returns:
        [`~transformers.PreTrainedConfig`]: The configuration.

    Raises:
        `ValueError`: If the configuration is of another model than the weights, or a weight is not a floating-point number
            where the model's is, is NaN or infinite; the message names fields, weights and files.
    """
    try:
        config = model_class.config_class.from_pretrained(folder)
    except StrictDataclassError as error:
        raise ValueError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error
    with torch.device("meta"):
        expected = model_class(config).state_dict()
    stored = {name: (path, shape) for path in weight_files(folder) for name, shape in read_shapes(path).items()}
    problems = [
        f"{name} has shape {shape} instead of {tuple(expected[name].shape)} (in {path.name})"
        for name, (path, shape) in stored.items()
        if name in expected and tuple(expected[name].shape) != shape
    ]
    if problems:
        raise ValueError(f"the weights in {folder} do not fit its configuration: {summarize(problems)}")
    described = sum(tensor.numel() for tensor in expected.values())
    held = sum(math.prod(shape) for _, shape in stored.values())
    # Tied weights are stored once.
    if described > 2 * held:
        raise ValueError(
            f"config.json in {folder} describes a model of {described:,} weights, but its files hold {held:,}: one of them belongs "
            f"to another model"
        )
    floating = {name for name, tensor in expected.items() if tensor.is_floating_point()}
    for path in weight_files(folder):
        check_weight_file(path, floating)
    return config


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, source: str | Path) -> None:
    """Raise `ValueError` if a token of the tokenizer has an id for which the model has no embedding."""
    token, token_id = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if token_id >= vocab_size:
        raise ValueError(
            f"the tokenizer in {source} gives {token!r} the id {token_id}, but the model's vocabulary has {vocab_size} entries: "
            f"they belong to different models"
        )


def check_processor_file(path: Path, ranges: Mapping[str, str]) -> None:
    """
    Check the whole numbers in a processor's file before a processor is made from it. Without the file, all have their defaults.

    Args:
        path (`Path`): The file.
        ranges (`Mapping[str, str]`): Intervals of the numbers by name.

    Raises:
        `ValueError`: If a value is no such number or outside of its interval; the message names field and file.
    """
    if path.exists():
        check_field_ranges(read_json(path), ranges, {}, "", path, takes_none=False)


def check_field_ranges(
    fields: Mapping[str, Any],
    whole: Mapping[str, str],
    others: Mapping[str, str],
    part: str,
    source: str | Path,
    takes_none: bool = True,
) -> None:
    """
    Check the numbers of a part of a configuration. A field that is missing is left to its default.

    Args:
        fields (`Mapping[str, Any]`): The part.
        whole, others (`Mapping[str, str]`): Intervals of whole and of other numbers by name, as [`check_number`] reads them.
        part (`str`): Name of the part for messages; empty for the configuration itself.
        source (`str` or `Path`): Its file for messages.
        takes_none (`bool`, *optional*, defaults to `True`): Whether `None` is left to a default as well.

    Raises:
        `ValueError`: If a value is no such number or outside of its interval; the message names field and file.
    """
    prefix = f"{part}." if part else ""
    for is_whole, ranges in ((True, whole), (False, others)):
        for name, interval in ranges.items():
            value = fields.get(name)
            if value is None and (takes_none or name not in fields):
                continue
            if isinstance(value, bool) or not isinstance(value, int if is_whole else int | float):
                kind = "whole number" if is_whole else "number"
                raise ValueError(f"{prefix}{name} in {source} must be a {kind}, but is {value!r}")
            check_number(f"{prefix}{name} in {source}", value, interval)
