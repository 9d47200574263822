# SPDX-License-Identifier: Apache-2.0

"""From a name to a model and its processor: a packaged checkpoint, a folder, or a repository on the Hub.

The `model_type` in `config.json` names the family in the registry, so that a third party's family loads by name. A
folder without one, or with a type that nobody registered, belongs to the family that recognises its layout.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from peft import PeftModel
from transformers.processing_utils import ProcessorMixin

from alphagrpo_ext.models.adapters import PACKAGED_CHECKPOINTS, adapter_base, is_adapter, load_adapter
from alphagrpo_ext.models.contract import FAMILIES, Family, UnifiedModel
from alphagrpo_ext.models.preflight import read_json, weight_files
from alphagrpo_ext.models.weight_files import read_shapes


def resolve_model_path(model_name_or_path: str | Path, revision: str | None = None) -> str:
    """
    Folder of a packaged checkpoint, of a local one, or of the downloaded files of a repository on the Hub that has a
    family's released layout. The id of a repository with another layout is returned unchanged.

    Args:
        model_name_or_path (`str` or `Path`): As in [`load_model`].
        revision (`str`, *optional*): Branch, tag or commit of a repository on the Hub.

    Raises:
        `FileNotFoundError`: If the name is a local folder that lacks a file, or does not exist at all; the message
        names it. Names that cannot be those of a repository are not looked up on the Hub: paths, and names without an owner.
        `ValueError`: If a weight file is truncated, or the name is none.
    """
    if not isinstance(model_name_or_path, str | os.PathLike) or not str(model_name_or_path):
        raise ValueError(
            f"model_name_or_path must be a packaged name ({', '.join(PACKAGED_CHECKPOINTS)}), a folder, or an id on the Hub, but "
            f"is {model_name_or_path!r}"
        )
    path = Path(PACKAGED_CHECKPOINTS.get(str(model_name_or_path), model_name_or_path))
    if not path.is_dir():
        return _download(str(model_name_or_path), revision)
    if is_adapter(path):
        return str(path)
    family = _family_of_folder(path)
    if family is None or not family.matches(path):
        _check_saved_files(path, Family.saved_files if family is None else family.saved_files)
    return str(path)


def find_family(path: str, revision: str | None = None) -> Family:
    """
    The family of a checkpoint.

    Args:
        path (`str`): What [`resolve_model_path`] returned.
        revision (`str`, *optional*): Branch, tag or commit of a repository on the Hub.

    Raises:
        `UnknownNameError`: If no family has the checkpoint's `model_type`; the message lists those that exist.
    """
    if not Path(path).is_dir():
        return FAMILIES.get(_model_type(hf_hub_download(path, "config.json", revision=revision)))()
    return _family_of_folder(Path(path)) or FAMILIES.get(_model_type(Path(path) / "config.json"))()


def _family_of_folder(folder: Path) -> Family | None:
    """The family by `model_type`, else the one that recognises the layout, else `None`."""
    config = folder / "config.json"
    if config.exists() and (model_type := _model_type(config)) in FAMILIES.names():
        return FAMILIES.get(model_type)()
    return next((family for family in _families() if family.matches(folder)), None)


def _families() -> Iterator[Family]:
    return (FAMILIES.get(name)() for name in FAMILIES.names())


def _model_type(config: str | Path) -> str | None:
    """The `model_type` in a `config.json`."""
    return read_json(config).get("model_type")


def _check_saved_files(folder: Path, names: Sequence[str]) -> None:
    weights = weight_files(folder)
    others = [folder / name for name in names if name != "model.safetensors"]
    missing = [path.name for path in (*others, *weights) if not path.exists()]
    if missing:
        newest = _newest_checkpoint(folder)
        advice = f"; its newest checkpoint is {newest}: give that folder" if newest else ""
        raise FileNotFoundError(f"the checkpoint folder {folder} lacks {', '.join(missing)}{advice}")
    for path in weights:
        read_shapes(path)


def _newest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint with a model or an adapter in the folder of a run."""
    steps = {
        path: int(match[1])
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
        and ((path / "config.json").is_file() or is_adapter(path))
    }
    return max(steps, key=steps.__getitem__, default=None)


def _refuse_local_names(name: str) -> None:
    """Raise an error if a name that is no folder cannot be that of a repository on the Hub, which takes long to find out."""
    if os.path.isfile(name):
        raise FileNotFoundError(f"{name} is a file: give the folder that it is in")
    owner, slash, _ = name.partition("/")
    if not slash:
        close = difflib.get_close_matches(name, PACKAGED_CHECKPOINTS, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise FileNotFoundError(
            f"'{name}' is no packaged checkpoint ({', '.join(PACKAGED_CHECKPOINTS)}) and no folder.{hint} The id of a model on "
            f"the Hub has its owner before a slash"
        )
    is_path = os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1
    if is_path or owner == "runs" or os.path.isdir(owner):
        folder = os.path.dirname(name.rstrip("/"))
        there = sorted(path.name for path in Path(folder).iterdir() if path.is_dir()) if os.path.isdir(folder) else []
        close = difflib.get_close_matches(os.path.basename(name.rstrip("/")), there, n=1)
        hint = f". Did you mean {os.path.join(folder, close[0])}?" if close else ""
        reason = (
            ""
            if is_path or owner == "runs"
            else f", and as {owner} is one, no model of that name is looked up on the Hub"
        )
        raise FileNotFoundError(f"there is no folder {name}{reason}{hint}")


def _download(name: str, revision: str | None) -> str:
    """
    Folder in the Hub's cache with the files of a released checkpoint, or the id of a repository with another layout.
    """
    _refuse_local_names(name)
    try:
        for family in _families():
            if family.hub_marker is not None and _has_file(name, family.hub_marker, revision):
                return snapshot_download(name, revision=revision, allow_patterns=list(family.hub_files))
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
            `"bagel-shapes"` for the packaged checkpoint, a folder, or the id of a repository on the Hub. A folder
            holds a family's released layout, what `save_pretrained` wrote, or an adapter, which is put onto the model
            that it names. Of a repository with a released layout, only the files of that layout are downloaded.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`):
            Data type of the weights, except those that the family keeps in fp32. `"auto"` leaves weights in the type
            in which they are stored.
        revision (`str`, *optional*):
            Branch, tag or commit of a repository on the Hub.
        kwargs:
            Passed to `from_pretrained`, e.g. `attn_implementation`.

    Raises:
        `FileNotFoundError`: If there is no such model, or it lacks a file; the message names it.
        `ValueError`: If a file is truncated or damaged, if a weight is missing, left over or of another shape, if an
            adapter was made for another model, if no registered family has the model's type, or if there is no such data type.
    """
    if isinstance(dtype, str) and dtype != "auto":
        dtype = _dtype(dtype)
    path = resolve_model_path(model_name_or_path, revision)
    if is_adapter(path):
        model, _ = load_model(adapter_base(path), dtype, **kwargs)
        return load_adapter(model, path), load_processor(path)
    model, processor = find_family(path, revision).load(path, dtype, revision=revision, **kwargs)
    if (
        Path(path).is_dir()
        and not Path(model_name_or_path).is_dir()
        and str(model_name_or_path) not in PACKAGED_CHECKPOINTS
    ):
        # So that an adapter names the repository and not a folder of this machine.
        model.name_or_path = model.config._name_or_path = str(model_name_or_path)
    return model, processor


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"dtype must be the name of a data type of PyTorch, e.g. 'bfloat16', or 'auto', but is {name!r}"
        )
    return dtype


def load_processor(model_name_or_path: str | Path, revision: str | None = None) -> ProcessorMixin:
    """
    Load the processor of a model alone.

    Args:
        model_name_or_path (`str` or `Path`): As in [`load_model`].
        revision (`str`, *optional*): Branch, tag or commit of a repository on the Hub.

    Raises:
        `FileNotFoundError`: If there is no such model, or it lacks a file; the message names it.
    """
    path = resolve_model_path(model_name_or_path, revision)
    if is_adapter(path):
        base = adapter_base(path)
        if not (Path(path) / "processor_config.json").exists():
            return load_processor(base)
        # Its texts may not be those of the base.
        return find_family(resolve_model_path(base)).load_processor(path)
    return find_family(path, revision).load_processor(path, revision)
