# SPDX-License-Identifier: Apache-2.0

"""Identity of a checkpoint: a fingerprint of its files, and a label that can name a folder."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from alphagrpo_ext.models.adapters import adapter_base, is_adapter
from alphagrpo_ext.models.loading import resolve_model_path


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
