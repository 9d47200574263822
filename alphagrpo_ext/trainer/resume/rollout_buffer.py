# SPDX-License-Identifier: Apache-2.0

"""Rollouts that were sampled and not yet trained on, as a file that cannot run code when it is read."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from alphagrpo_ext.files import atomic_path
from alphagrpo_ext.trajectory import DenoisingWindow, ImageSegment, TextSegment, Trajectory


_ALLOWED = [DenoisingWindow, ImageSegment, TextSegment, Trajectory, Image.frombytes]
"""What a file may name beside tensors, numbers, strings and containers."""


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        # Pixels alone: an image that was read from a file has a class and metadata of its format.
        if isinstance(value, Image.Image):
            return Image.frombytes, (value.mode, value.size, value.tobytes())
        return NotImplemented


def save_rollouts(batches: list[dict[str, Any]], path: Path) -> None:
    """
    Write TRL's buffered batches.

    Args:
        batches (`list[dict[str, Any]]`): Dictionaries of tensors, numbers, trajectories, images, and lists of them.
        path (`Path`): The file.

    Raises:
        `TypeError`: If a batch holds anything else.
    """
    with atomic_path(path) as temporary, torch.serialization.safe_globals(_ALLOWED):
        torch.save(batches, temporary, pickle_module=SimpleNamespace(__name__=__name__, Pickler=_Pickler))
        if refused := torch.serialization.get_unsafe_globals_in_checkpoint(temporary):
            raise TypeError(f"a rollout holds {', '.join(sorted(refused))}, which a checkpoint cannot keep")


def load_rollouts(path: Path, device: torch.device) -> list[dict[str, Any]]:
    """
    Read what [`save_rollouts`] wrote, bit by bit the same.

    Args:
        path (`Path`): The file.
        device (`torch.device`): Where tensors go that were not on the CPU.
    """

    def place(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        return storage if location == "cpu" else storage.to(device=device)

    with torch.serialization.safe_globals(_ALLOWED):
        return torch.load(path, map_location=place, weights_only=True)
