# SPDX-License-Identifier: Apache-2.0

"""
Identity of a checkpoint: a fingerprint of its files, and a label that can name a folder. Identity of a model and a processor that
are loaded: digests of what they hold, wherever it came from.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
import xxhash

from alphagrpo_ext.models.adapters import adapter_base, is_adapter
from alphagrpo_ext.models.loading import resolve_model_path


_NUM_SAMPLED = 64


def checkpoint_fingerprint(model_name_or_path: str | Path) -> tuple[str, ...]:
    """
    Fingerprint that tells a checkpoint from another one written in its place later. It consists of names, sizes and
    times of files; no weights are read.

    Args:
        model_name_or_path (`str` or `Path`): As in [`~alphagrpo_ext.models.loading.load_model`].

    Returns:
        `tuple[str, ...]`: One entry per file, followed by the entries of the model that an adapter was made for. For a
        repository on the Hub that is not downloaded as a folder, its name alone.
    """
    path = Path(resolve_model_path(model_name_or_path))
    if not path.is_dir():
        return (str(path),)
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".json"))
    stats = [(file.name, file.stat()) for file in files]
    entries = tuple(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    return (*entries, *checkpoint_fingerprint(adapter_base(path))) if is_adapter(path) else entries


def model_label(model_name_or_path: str) -> str:
    """Label of a model that can name a folder, e.g. `"bagel-shapes"`. Different models have different labels."""
    label = re.sub(r"[^\w.-]+", "-", model_name_or_path).strip("-.")
    if label == model_name_or_path:
        return label
    return f"{label or 'model'}-{hashlib.sha256(model_name_or_path.encode()).hexdigest()[:8]}"


def weights_digest(model: torch.nn.Module, reference: torch.nn.Module | None = None) -> str:
    """
    Digest of the weights that training does not change, from the shape and a few values of each: the frozen ones of a policy,
    and those of its reference. A checkpoint does not restore all of them.
    """
    digest = xxhash.xxh3_64()
    frozen = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad]
    for name, parameter in [*frozen, *(reference.named_parameters() if reference is not None else ())]:
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        # What is offloaded by Accelerate has no values here.
        if parameter.is_meta:
            continue
        values = parameter.detach()
        values = values.to_local() if hasattr(values, "to_local") else values
        values = values.reshape(-1)[:: max(1, values.numel() // _NUM_SAMPLED)].double().cpu()
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def frozen_model_settings(model: torch.nn.Module, processor: Any) -> dict[str, str]:
    """
    Digests of what the answers of a frozen model to texts depend on.

    Args:
        model (`torch.nn.Module`): The model. Weights that are trained are left out.
        processor (`ProcessorMixin`): Its processor.
    """
    return {"weights": weights_digest(model), **_text_digests(processor)}


def processor_settings(processor: Any) -> dict[str, Any]:
    """The settings of a policy's processor, its texts among them, and digests of its chat template and its vocabulary."""
    return {**processor.to_dict(), **_text_digests(processor)}


def _text_digests(processor: Any) -> dict[str, str]:
    tokenizer = processor.tokenizer
    # A processor that was saved has the tokenizer's template as its own.
    templates = {
        json.dumps(part.chat_template) for part in (processor, tokenizer) if getattr(part, "chat_template", None)
    }
    parts = {"chat_template": sorted(templates), "vocabulary": sorted(tokenizer.get_vocab().items())}
    return {name: xxhash.xxh3_64_hexdigest(json.dumps(part, default=str).encode()) for name, part in parts.items()}
