# SPDX-License-Identifier: Apache-2.0

"""From a name to a model and its processor: the packaged checkpoint, a released folder, or one that was saved."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from peft import PeftModel
from transformers import AutoConfig, AutoProcessor
from transformers.processing_utils import ProcessorMixin

import alphagrpo_ext.models.bagel  # noqa: F401  (registers with the Auto classes)
from alphagrpo_ext.models.adapters import adapter_base, is_adapter, load_adapter
from alphagrpo_ext.models.bagel.checkpoint import (
    DOWNLOADED_FILES,
    is_released_layout,
    load_released,
    load_released_processor,
)
from alphagrpo_ext.models.contract import MODELS, UnifiedModel
from alphagrpo_ext.models.weight_files import read_shapes, summarize


PACKAGED_CHECKPOINTS = {"bagel-shapes": Path(__file__).parents[1] / "shapes" / "checkpoint"}
SAVED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "processor_config.json")


def resolve_model_path(model_name_or_path: str | Path, revision: str | None = None) -> str:
    """
    Folder of a packaged checkpoint, of a local one, or of the files of a repository on the Hub that has BAGEL's released
    layout, which are downloaded first; the id unchanged if the repository has another layout.

    Args:
        model_name_or_path (`str` or `Path`): As [`load_model`].
        revision (`str`, *optional*): Branch, tag or commit of a repository on the Hub.

    Raises:
        `FileNotFoundError`: If the name is a local folder that lacks a file, or is not there at all; the message names it.
        `ValueError`: If a weight file is truncated.
    """
    path = Path(PACKAGED_CHECKPOINTS.get(str(model_name_or_path), model_name_or_path))
    if not path.is_dir():
        return _download(str(model_name_or_path), revision)
    if not (is_released_layout(path) or is_adapter(path)):
        _check_saved_files(path)
    return str(path)


def _check_saved_files(folder: Path) -> None:
    missing = [name for name in SAVED_FILES if not (folder / name).exists()]
    weights, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if "model.safetensors" in missing and index.exists():
        missing.remove("model.safetensors")
        weights = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing += [name for name in weights if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"the checkpoint folder {folder} lacks {', '.join(missing)}")
    for name in weights:
        read_shapes(folder / name)


def _download(name: str, revision: str | None) -> str:
    """Folder of a released checkpoint's files in the Hub's cache, or the id of a repository with another layout."""
    if os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {name}")
    try:
        if _has_file(name, "llm_config.json", revision):
            return snapshot_download(name, revision=revision, allow_patterns=list(DOWNLOADED_FILES))
        if _has_file(name, "config.json", revision):
            return name
        reason = "it has no config.json, or the Hub cannot be reached and the cache lacks it"
    except (OSError, HFValidationError) as error:
        reason = str(error)
    raise FileNotFoundError(
        f"'{name}' is no packaged checkpoint ({', '.join(PACKAGED_CHECKPOINTS)}), no folder, and no model on the Hub that "
        f"could be read: {reason}"
    )


def _has_file(repository: str, file: str, revision: str | None) -> bool:
    """Whether a repository has a file; offline, whether the cache has it."""
    try:
        hf_hub_download(repository, file, revision=revision)
    except EntryNotFoundError:
        return False
    return True


def load_model(
    model_name_or_path: str | Path,
    dtype: torch.dtype | str = torch.float32,
    revision: str | None = None,
    **kwargs: Any,
) -> tuple[UnifiedModel | PeftModel, ProcessorMixin]:
    """
    Load a model and its processor.

    Args:
        model_name_or_path (`str` or `Path`):
            `"bagel-shapes"` for the packaged checkpoint, a folder (BAGEL's released layout, one written by
            `save_pretrained`, or an adapter's, which is put onto the model that it names), or the id of a repository on
            the Hub, of which a released layout's files alone are downloaded.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`):
            Of the weights; the autoencoder stays fp32. `"auto"` leaves them in the type in which they are stored.
        revision (`str`, *optional*):
            Branch, tag or commit of a repository on the Hub.
        kwargs:
            Passed to `from_pretrained`, e.g. `attn_implementation`.

    Raises:
        `FileNotFoundError`: If there is no such model, or it lacks a file; the message names it.
        `ValueError`: If a file is truncated or damaged, if a weight is missing, left over or of another shape, or if an
            adapter was made for another model.
    """
    path = resolve_model_path(model_name_or_path, revision)
    if is_adapter(path):
        model, processor = load_model(adapter_base(path), dtype, **kwargs)
        return load_adapter(model, path), processor
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    if is_released_layout(path):
        model, processor = load_released(path, None if dtype == "auto" else dtype)
        if not Path(model_name_or_path).is_dir():
            # So that an adapter names the repository and not a folder of this machine.
            model.name_or_path = model.config._name_or_path = str(model_name_or_path)
        if kwargs.get("attn_implementation"):
            model.set_attn_implementation(kwargs["attn_implementation"])
        return model, processor
    config = AutoConfig.from_pretrained(path, revision=revision)
    model, info = MODELS.get(config.model_type).from_pretrained(
        path, dtype=dtype, revision=revision, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
    )
    problems = [f"it lacks {name}" for name in sorted(info["missing_keys"])]
    problems += [f"it has {name}, which the model has not" for name in sorted(info["unexpected_keys"])]
    problems += [
        f"{name} has shape {tuple(actual)} instead of {tuple(expected)}"
        for name, actual, expected in sorted(info["mismatched_keys"])
    ]
    if problems:
        raise ValueError(f"the weights in {path} do not fit its configuration: {summarize(problems)}")
    return model, load_processor(path, revision)


def load_processor(model_name_or_path: str | Path, revision: str | None = None) -> ProcessorMixin:
    """
    The processor of a model alone.

    Args:
        model_name_or_path (`str` or `Path`): As [`load_model`].
        revision (`str`, *optional*): Branch, tag or commit of a repository on the Hub.

    Raises:
        `FileNotFoundError`: If there is no such model, or it lacks a file; the message names it.
    """
    path = resolve_model_path(model_name_or_path, revision)
    if is_adapter(path):
        return load_processor(adapter_base(path))
    if is_released_layout(path):
        return load_released_processor(Path(path))
    return AutoProcessor.from_pretrained(path, revision=revision)
