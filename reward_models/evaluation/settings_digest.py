# SPDX-License-Identifier: Apache-2.0

"""A digest of the settings that a result depends on, so that a later run reuses the result only if it would be the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from PIL import Image

from alphagrpo_ext.rollout.generator import image_key


def settings_digest(*settings: Any) -> str:
    """
    Compute a digest of settings. Settings with equal values have the same digest in every process.

    Args:
        settings (`Any`):
            Dataclasses, mappings, sequences, images (compared by their pixels), and values whose `repr` describes them
            completely.

    Raises:
        `ValueError`: If the `repr` of a setting shows only its address in memory.
    """
    return hashlib.sha256(repr(_comparable(settings)).encode()).hexdigest()


def _comparable(value: Any) -> Any:
    """A value whose `repr` is the same in every process."""
    if isinstance(value, Image.Image):
        return image_key(value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, [(f.name, _comparable(getattr(value, f.name))) for f in fields(value)]
    if isinstance(value, Mapping):
        return [(_comparable(key), _comparable(entry)) for key, entry in value.items()]
    if isinstance(value, str | bytes | range):
        return value
    if isinstance(value, Sequence):
        return [_comparable(entry) for entry in value]
    if type(value).__repr__ is object.__repr__:
        raise ValueError(f"{value!r} cannot be compared with that of another run: pass what it was made from")
    return value
