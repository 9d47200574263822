# SPDX-License-Identifier: Apache-2.0

"""Checkpoint folders, which are complete or absent, and the choice of the one that a run resumes from."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path


logger = logging.getLogger(__name__)

MANIFEST_NAME = "checkpoint.json"
"""File that lists the files of a checkpoint. It is written last."""
INCOMPLETE_NAME = "incomplete"
"""Folder of `output_dir` where a checkpoint is written until it is complete."""
_CHECKPOINT = re.compile(r"checkpoint-\d+")


class DamagedCheckpointError(ValueError):
    """Raised for a checkpoint that is incomplete or differs from what was written."""


@dataclass(frozen=True)
class Manifest:
    """
    The contents of a checkpoint.

    Args:
        step (`int`): Number of optimizer steps done.
        num_processes (`int`): Number of processes that trained.
        written_at (`float`): Time of completion, in seconds since the epoch.
        files (`dict[str, int]`): Size in bytes of every file, by its path in the folder.
    """

    step: int
    num_processes: int
    written_at: float
    files: dict[str, int]


def write_manifest(folder: Path, step: int, num_processes: int) -> None:
    """
    Write the manifest of a folder. This is the last step before the folder is a checkpoint.

    Args:
        folder (`Path`): The folder.
        step (`int`): Number of optimizer steps done.
        num_processes (`int`): Number of processes that train.
    """
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    files.pop(MANIFEST_NAME, None)
    manifest = Manifest(step, num_processes, time.time(), files)
    (folder / MANIFEST_NAME).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """
    Read the manifest of a checkpoint and check that all of its files are there.

    Args:
        folder (`Path`): The checkpoint.

    Raises:
        `DamagedCheckpointError`: If the folder does not exist or has no manifest, or if a file is missing or of another size.
            The message names it.
    """
    if not folder.is_dir():
        raise DamagedCheckpointError(f"there is no checkpoint folder {folder}")
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise DamagedCheckpointError(
            f"the checkpoint {folder} has no {MANIFEST_NAME}: it is incomplete, or another trainer wrote it. Name "
            f"another one, or 'last'; to start from its weights alone, give it as model_name_or_path"
        )
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error
    for name, size in manifest.files.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes where {size} were written"
            raise DamagedCheckpointError(f"the checkpoint {folder} is damaged: {name} {state}")
    return manifest


def publish(staged: Path, final: Path) -> None:
    """
    Move a complete checkpoint to its final path, in one step.

    Args:
        staged (`Path`): The folder, inside a folder `incomplete` on the same file system, which is removed.
        final (`Path`): Its final path. A checkpoint that is there already, as after a resume from an earlier step, is replaced.
    """
    if final.exists():
        os.replace(final, staged.with_name(f"replaced-{final.name}"))
    os.replace(staged, final)
    shutil.rmtree(staged.parent, ignore_errors=True)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """
    Find the complete checkpoint that was written last. Incomplete ones are skipped with a warning.

    It need not have the highest step: a run that starts anew in the folder of an earlier one has lower steps.

    Args:
        output_dir (`str` or `Path`): Folder of a run.
    """
    output_dir = Path(output_dir)
    for path in sorted(output_dir.glob(f"{INCOMPLETE_NAME}/*")):
        logger.warning("%s was not completed and is not used: the run was stopped while it wrote it", path)
    complete: list[tuple[float, int, Path]] = []
    for path in sorted(output_dir.glob("checkpoint-*")):
        if not _CHECKPOINT.fullmatch(path.name):
            continue
        try:
            manifest = read_manifest(path)
        except DamagedCheckpointError as error:
            logger.warning("%s is not used: %s", path, error)
            continue
        complete.append((manifest.written_at, manifest.step, path))
    return max(complete)[2] if complete else None


def asks_to_resume(resume_from_checkpoint: str | bool | None) -> bool:
    """Whether an argument, which is text on a command line, asks to resume a run."""
    return str(resume_from_checkpoint or "").lower() not in ("", "false", "none")


def asks_for_last(resume_from_checkpoint: str | bool | None) -> bool:
    """Whether an argument asks for the last checkpoint, without naming it."""
    return str(resume_from_checkpoint).lower() in ("true", "last")


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str | Path) -> Path | None:
    """
    Find the checkpoint that a run resumes from.

    Args:
        resume_from_checkpoint (`str` or `bool`, *optional*):
            `True`, `"true"` or `"last"` for the last complete one in `output_dir`, or a path. `None`, `False`, `"false"` or an
            empty string for none.
        output_dir (`str` or `Path`): Folder of the run.

    Returns:
        `Path`: `None` to start from the beginning. That is also the result if the last one is asked for and there is none, so
        that the same command starts a run and resumes it, however early it was stopped.

    Raises:
        `DamagedCheckpointError`: If the named path is not a complete checkpoint.
    """
    if not asks_to_resume(resume_from_checkpoint):
        return None
    if not asks_for_last(resume_from_checkpoint):
        checkpoint = Path(resume_from_checkpoint)
        read_manifest(checkpoint)
        return checkpoint
    checkpoint = last_checkpoint(output_dir)
    if checkpoint is None:
        logger.warning("%s holds no complete checkpoint: the run starts from the beginning", output_dir)
    else:
        logger.warning("the run goes on from %s", checkpoint)
    return checkpoint
