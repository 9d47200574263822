# SPDX-License-Identifier: Apache-2.0

"""What tells one checkpoint from another: by its files, and as a name for a folder."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from alphagrpo_ext.models.adapters import adapter_base, is_adapter
from alphagrpo_ext.models.loading import resolve_model_path


def checkpoint_fingerprint(model_name_or_path: str | Path) -> tuple[str, ...]:
    """
    Tells a checkpoint from one that was written in its place later, by names, sizes and times of its files; no weights are
    read.

    Args:
        model_name_or_path (`str` or `Path`): As in [`~alphagrpo_ext.models.loading.load_model`].

    Returns:
        `tuple[str, ...]`: An entry a file, and those of the model that an adapter was made for. A repository on the Hub that is
        not downloaded as a folder has its name alone.
    """
    path = Path(resolve_model_path(model_name_or_path))
    if not path.is_dir():
        return (str(path),)
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".json"))
    stats = [(file.name, file.stat()) for file in files]
    entries = tuple(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    return (*entries, *checkpoint_fingerprint(adapter_base(path))) if is_adapter(path) else entries


def model_label(model_name_or_path: str) -> str:
    """A name for a model's folder, e.g. `"bagel-shapes"`; no two models have the same."""
    label = re.sub(r"[^\w.-]+", "-", model_name_or_path).strip("-.")
    if label == model_name_or_path:
        return label
    return f"{label or 'model'}-{hashlib.sha256(model_name_or_path.encode()).hexdigest()[:8]}"
