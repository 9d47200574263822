# SPDX-License-Identifier: Apache-2.0

"""PEFT adapters in folders of their own, without the model that they adapt."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel

from alphagrpo_ext.models.saving import staged_folder
from alphagrpo_ext.models.weight_files import read_shapes, shape_differences, summarize


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def is_adapter(folder: str | Path) -> bool:
    """Whether `folder` holds an adapter rather than a model."""
    return (Path(folder) / ADAPTER_CONFIG).exists() and not (Path(folder) / "config.json").exists()


def adapter_base(folder: str | Path) -> str:
    """
    Name or folder of the model that an adapter was made for.

    Raises:
        `ValueError`: If the adapter's configuration does not name it.
    """
    name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not name:
        raise ValueError(
            f"{ADAPTER_CONFIG} in {folder} has no base_model_name_or_path: write it there, or load the model yourself and "
            f"pass it to load_adapter"
        )
    return name


def check_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """
    Check that an adapter fits a model, which is not changed.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to adapt.
        folder (`str` or `Path`): Folder of the adapter.

    Raises:
        `FileNotFoundError`: If a file is missing; the message names it.
        `ValueError`: If a file is truncated, or if names or shapes do not match. PEFT alone would only warn, and leave
        missing
            weights at their initial values.
    """
    if isinstance(model, PeftModel):
        raise ValueError("the model has an adapter already: merge it first (merge_and_unload)")
    folder = Path(folder)
    missing = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"the adapter folder {folder} lacks {', '.join(missing)}")
    shapes = read_shapes(folder / ADAPTER_WEIGHTS)
    peft_config = PeftConfig.from_pretrained(str(folder))
    # Without this, PEFT warns if the base model was moved.
    peft_config.base_model_name_or_path = None
    try:
        with torch.device("meta"):
            adapted = get_peft_model(type(model)(copy.deepcopy(model.config)), peft_config)
    except ValueError as error:
        raise ValueError(f"the adapter in {folder} was made for another model: {error}") from error
    # Without the option, PEFT asks the Hub whether the vocabulary has grown.
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    problems = shape_differences({name: t.shape for name, t in expected.items()}, shapes, ADAPTER_WEIGHTS)
    if problems:
        raise ValueError(f"the adapter in {folder} was made for another model: {summarize(problems)}")


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """
    Put a saved adapter onto a model.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model that the adapter was made for; its modules are wrapped.
        folder (`str` or `Path`): Folder of the adapter.

    Raises:
        `FileNotFoundError`, `ValueError`: As [`check_adapter`].
    """
    check_adapter(model, folder)
    return PeftModel.from_pretrained(model, str(folder))


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """
    Write an adapter without its model. The folder appears complete or not at all.

    Args:
        model ([`~peft.PeftModel`]): The adapted model.
        folder (`str` or `Path`): The folder to write, which must be empty or not exist.

    Raises:
        `FileExistsError`: If `folder` has files.
        `OSError`: If the disk has no room.
    """
    # Without the option, PEFT asks the Hub whether the vocabulary has grown.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    with staged_folder(folder, sum(tensor.nbytes for tensor in state.values())) as stage:
        model.save_pretrained(str(stage), save_embedding_layers=False)
