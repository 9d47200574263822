# SPDX-License-Identifier: Apache-2.0

"""Weights in safetensors files, which are read through a memory map and written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from alphagrpo_ext.models.finite import check_finite_weights, is_finite


# The map is renewed after this many bytes, because its pages count as memory of the process until it is closed.
REMAP_BYTES = 256 * 2**20

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def read_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """
    Names and shapes of the tensors of a safetensors file, in the file's order. Only the header is read.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If the file is shorter than its header says, or not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): copy or download it again") from error


def check_weight_file(path: str | Path, floating: Container[str] | None = None) -> None:
    """
    Check types and values of the tensors of a safetensors file. At most [`REMAP_BYTES`] of it are mapped at once.

    Args:
        path (`str` or `Path`): The file.
        floating (`Container[str]`, *optional*): Names of the tensors that must be floating point; all by default.

    Raises:
        `ValueError`: If a tensor has another type, or a value that is NaN or infinite; the message names tensor and file.
    """
    names = list(read_shapes(path))
    while names:
        mapped_bytes = 0
        with safe_open(path, framework="pt") as file:
            while names and mapped_bytes < REMAP_BYTES:
                name = names.pop(0)
                dtype = file.get_slice(name).get_dtype()
                if dtype not in DTYPE_NAMES.values():
                    if floating is None or name in floating:
                        raise ValueError(
                            f"{name} in {path} is of type {dtype}, but weights must be of type {', '.join(DTYPE_NAMES.values())}: "
                            f"a quantized model must be converted first"
                        )
                    continue
                tensor = file.get_tensor(name)
                mapped_bytes += tensor.nbytes
                if not is_finite(tensor):
                    raise ValueError(
                        f"{name} in {path} has values that are NaN or infinite: copy or download it again, or take an earlier "
                        f"checkpoint"
                    )


def read_tensors(path: str | Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Names and tensors of a safetensors file, in the file's order.

    A tensor that has the wanted type stays a view of the memory map. Its pages take memory when they are read,
    processes share them, and a write copies the page without a change of the file. Other tensors are converted one at
    a time. The file must not be overwritten in place while a view is in use.

    Args:
        path (`str` or `Path`): The file.
        dtype (`torch.dtype`, *optional*): Data type of the tensors; `None` keeps the type of each.
    """
    names = list(read_shapes(path))
    while names:
        converted_bytes = 0
        with safe_open(path, framework="pt") as file:
            while names and converted_bytes < REMAP_BYTES:
                name = names.pop(0)
                tensor = file.get_tensor(name)
                if dtype not in (None, tensor.dtype):
                    converted_bytes += tensor.nbytes
                    tensor = tensor.to(dtype)
                yield name, tensor


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Write a safetensors file tensor by tensor, with a progress bar. Of tensors on a GPU, one at a time is copied to
    memory.

    Args:
        path (`str` or `Path`): The file.
        tensors (`Mapping[str, torch.Tensor]`): Its contents: fp64, fp32, bf16 or fp16.

    Raises:
        `ValueError`: If a tensor has another type; the message names it.
        `FloatingPointError`: If a tensor has a value that is NaN or infinite; the message names it.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is of type {tensor.dtype}, but weights must be floating point")
    check_finite_weights(tensors.items(), f"{path} is not written")
    # Wide types first, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, DTYPE_NAMES[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (
        open(path, "wb") as file,
        logging.tqdm(total=offset, unit="B", unit_scale=True, desc=f"Writing {Path(path).name}") as progress,
    ):
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in order:
            data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            file.write(memoryview(data.numpy()))
            progress.update(len(data))


def shape_differences(
    expected: Mapping[str, Sequence[int]], actual: Mapping[str, Sequence[int]], source: str
) -> list[str]:
    """
    Differences between expected and actual tensors, each as a part of a sentence.

    Args:
        expected, actual (`Mapping[str, Sequence[int]]`): Shapes by name.
        source (`str`): File or folder that the actual shapes were read from.
    """
    missing = [f"{source} lacks {name}" for name in expected if name not in actual]
    extra = [f"{source} has {name}, which the model does not have" for name in actual if name not in expected]
    wrong = [
        f"{name} in {source} has shape {tuple(actual[name])} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in actual and tuple(actual[name]) != tuple(shape)
    ]
    return [*missing, *extra, *wrong]


def summarize(problems: Sequence[str], limit: int = 5) -> str:
    """The first `limit` problems in one line, and the number of the others."""
    rest = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + rest
