# SPDX-License-Identifier: Apache-2.0

"""Rollouts that were sampled and not yet trained on, as a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from alphagrpo_ext.trajectory import DenoisingWindow, ImageSegment, TextSegment, Trajectory


_DATACLASSES = {cls.__name__: cls for cls in (DenoisingWindow, ImageSegment, TextSegment, Trajectory)}


class _Encoder:
    """
    Values as JSON. Tensors, images and parts of trajectories go to a table, each once: members of a group share their
    context.
    """

    def __init__(self) -> None:
        self.table: list[Any] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self._places: dict[int, int] = {}

    def encode(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, list):
            return [self.encode(item) for item in value]
        if isinstance(value, tuple):
            return {"tuple": [self.encode(item) for item in value]}
        if isinstance(value, dict):
            return {"dict": {key: self.encode(item) for key, item in value.items()}}
        if id(value) not in self._places:
            place = self._places[id(value)] = len(self.table)
            self.table.append(None)
            self.table[place] = self._entry(value, str(place))
        return {"place": self._places[id(value)]}

    def _entry(self, value: Any, name: str) -> dict[str, Any]:
        if isinstance(value, torch.Tensor):
            # A copy, since safetensors takes no two tensors that share memory.
            self.tensors[name] = value.detach().cpu().contiguous().clone()
            return {"tensor": name, "on_cpu": value.device.type == "cpu"}
        if isinstance(value, Image.Image):
            self.tensors[name] = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8)
            return {"image": name, "mode": value.mode, "size": list(value.size)}
        if is_dataclass(value) and type(value).__name__ in _DATACLASSES:
            parts = {field.name: self.encode(getattr(value, field.name)) for field in fields(value)}
            return {"dataclass": type(value).__name__, "fields": parts}
        raise TypeError(f"a rollout holds a {type(value).__name__}, which a checkpoint cannot keep: {value!r}")


class _Decoder:
    """The way back."""

    def __init__(self, table: Sequence[Any], tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        self._table = table
        self._tensors = tensors
        self._device = device
        self._values: dict[int, Any] = {}

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "tuple" in value:
            return tuple(self.decode(item) for item in value["tuple"])
        if "dict" in value:
            return {key: self.decode(item) for key, item in value["dict"].items()}
        place = value["place"]
        if place not in self._values:
            self._values[place] = self._value(self._table[place])
        return self._values[place]

    def _value(self, entry: dict[str, Any]) -> Any:
        if "tensor" in entry:
            tensor = self._tensors[entry["tensor"]]
            return tensor if entry["on_cpu"] else tensor.to(self._device)
        if "image" in entry:
            data = self._tensors[entry["image"]].numpy().tobytes()
            return Image.frombytes(entry["mode"], tuple(entry["size"]), data)
        parts = {name: self.decode(item) for name, item in entry["fields"].items()}
        return _DATACLASSES[entry["dataclass"]](**parts)


def save_rollouts(batches: list[dict[str, Any]], path: Path) -> None:
    """
    Write TRL's buffered batches: the structure as JSON in the file's metadata, no pickle.

    Args:
        batches (`list[dict[str, Any]]`):
            Dictionaries of tensors, numbers, trajectories, images, and lists of them.
        path (`Path`): The file.

    Raises:
        `TypeError`: If a batch holds anything else.
    """
    encoder = _Encoder()
    structure = encoder.encode(batches)
    metadata = {"batches": json.dumps(structure), "table": json.dumps(encoder.table)}
    save_file(encoder.tensors, path, metadata=metadata)


def load_rollouts(path: Path, device: torch.device) -> list[dict[str, Any]]:
    """
    Read them back, bit by bit the same.

    Args:
        path (`Path`): The file.
        device (`torch.device`): Where tensors go that were not on the CPU.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    return _Decoder(json.loads(metadata["table"]), tensors, device).decode(json.loads(metadata["batches"]))
