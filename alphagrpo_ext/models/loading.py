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

"""From a name to a model and its processor: the packaged checkpoint, a released folder, or one that was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor
from transformers.processing_utils import ProcessorMixin

import alphagrpo_ext.models.bagel  # noqa: F401  (registers with the Auto classes)
from alphagrpo_ext.models.bagel.checkpoint import is_released_layout, load_released
from alphagrpo_ext.models.unified import MODELS, UnifiedModel


PACKAGED_CHECKPOINTS = {"bagel-shapes": Path(__file__).parents[1] / "shapes" / "checkpoint"}
SAVED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "processor_config.json")


def resolve_model_path(model_name_or_path: str | Path) -> str:
    """
    Folder of a packaged checkpoint, or the name unchanged.

    Raises:
        `FileNotFoundError`: If the name is a local folder that lacks a file; the message names it.
    """
    path = Path(PACKAGED_CHECKPOINTS.get(str(model_name_or_path), model_name_or_path))
    if path.is_dir() and not is_released_layout(path):
        missing = [name for name in SAVED_FILES if not (path / name).exists()]
        if "model.safetensors" in missing and (path / "model.safetensors.index.json").exists():
            missing.remove("model.safetensors")
        if missing:
            raise FileNotFoundError(f"the checkpoint folder {path} lacks {', '.join(missing)}")
    return str(path) if path.is_dir() else str(model_name_or_path)


def load_model(
    model_name_or_path: str | Path, dtype: torch.dtype | str = torch.float32, **kwargs: Any
) -> tuple[UnifiedModel, ProcessorMixin]:
    """
    Load a model and its processor.

    Args:
        model_name_or_path (`str` or `Path`):
            `"bagel-shapes"` for the packaged checkpoint, a folder (BAGEL's released layout or one written by
            `save_pretrained`), or the id of a repository on the Hub.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`):
            Of the weights; the autoencoder stays fp32.
        kwargs:
            Passed to `from_pretrained`, e.g. `attn_implementation`.
    """
    path = resolve_model_path(model_name_or_path)
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    if is_released_layout(path):
        model, processor = load_released(path, dtype)
        if kwargs.get("attn_implementation"):
            model.set_attn_implementation(kwargs["attn_implementation"])
        return model, processor
    config = AutoConfig.from_pretrained(path)
    model = MODELS.get(config.model_type).from_pretrained(path, dtype=dtype, **kwargs)
    return model, AutoProcessor.from_pretrained(path)
