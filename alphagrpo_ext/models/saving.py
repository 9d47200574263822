# SPDX-License-Identifier: Apache-2.0

"""Writing of folders that appear complete or not at all, and of a model into such a folder."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from alphagrpo_ext.models.finite import check_finite_weights


def check_output_folder(folder: str | Path) -> None:
    """Raise `FileExistsError` if `folder` has files, or is one."""
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"the output folder {folder} has files: empty it, or name another one")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name a folder for the output")


def check_free_space(folder: str | Path, num_bytes: int) -> None:
    """
    Check that the disk of a folder, which need not exist yet, has room for `num_bytes`.

    Raises:
        `OSError`: If it has less room; the message gives both figures.
    """
    existing = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{folder} needs {num_bytes / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free: make room, or name a "
            f"folder on another disk",
        )


@contextmanager
def staged_folder(folder: str | Path, num_bytes: int = 0) -> Iterator[Path]:
    """
    A temporary folder that is renamed to `folder` when the block ends, and removed if the block fails. A process that
    is killed leaves the temporary folder, whose name starts with a dot and ends in `.tmp`, and no `folder`.

    Args:
        folder (`str` or `Path`): The folder to write, which must be empty or not exist.
        num_bytes (`int`, *optional*, defaults to `0`): Least number of bytes that the block writes.

    Raises:
        `FileExistsError`: If `folder` has files.
        `OSError`: If the disk has no room for `num_bytes`.
    """
    check_output_folder(folder)
    check_free_space(folder, num_bytes)
    folder = Path(folder).resolve()
    stage = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    stage.mkdir(parents=True)
    try:
        yield stage
        for path in [*(path for path in stage.rglob("*") if path.is_file()), stage]:
            _flush(path)
        os.replace(stage, folder)
        _flush(folder.parent)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _flush(path: Path) -> None:
    """
    Flush a file, or the entries of a folder, to the disk, so that a renamed folder is complete even after a crash.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def state_bytes(model: torch.nn.Module) -> int:
    """Size of a model's weights, in bytes."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def save_model(
    model: PreTrainedModel, processor: ProcessorMixin, folder: str | Path, max_shard_size: str = "5GB"
) -> None:
    """
    Write a model and its processor by `save_pretrained`. The folder appears complete or not at all.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        processor ([`~transformers.ProcessorMixin`]): Its processor.
        folder (`str` or `Path`): The folder to write, which must be empty or not exist.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`): Size of the largest weight file.

    Raises:
        `FileExistsError`: If `folder` has files.
        `OSError`: If the disk has no room.
        `FloatingPointError`: If a weight is NaN or infinite; the message names it.
    """
    with staged_folder(folder, state_bytes(model)) as stage:
        check_finite_weights(model.state_dict().items(), f"the model is not saved to {folder}")
        model.save_pretrained(stage, max_shard_size=max_shard_size)
        processor.save_pretrained(stage)
