# SPDX-License-Identifier: Apache-2.0

"""Checkpoint folders: complete or not there at all, and which of them a run goes on from."""

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
"""Written last into a checkpoint: what belongs to it."""
INCOMPLETE_NAME = "incomplete"
"""Folder of `output_dir` where a checkpoint lies until it is complete."""
_CHECKPOINT = re.compile(r"checkpoint-\d+")


class DamagedCheckpointError(ValueError):
    """A checkpoint is incomplete or is not what was written."""


@dataclass(frozen=True)
class Manifest:
    """
    What belongs to a checkpoint.

    Args:
        step (`int`): Optimizer steps done.
        num_processes (`int`): Processes that trained.
        written_at (`float`): When it was completed, in seconds since the epoch.
        files (`dict[str, int]`): Size in bytes of every file, by its path in the folder.
    """

    step: int
    num_processes: int
    written_at: float
    files: dict[str, int]


def write_manifest(folder: Path, step: int, num_processes: int) -> None:
    """
    Note what a folder holds: the last thing to do before it is a checkpoint.

    Args:
        folder (`Path`): The folder.
        step (`int`): Optimizer steps done.
        num_processes (`int`): Processes that train.
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
    What a checkpoint holds, after a check that it is all there.

    Args:
        folder (`Path`): The checkpoint.

    Raises:
        `DamagedCheckpointError`: If the folder does not exist, has no manifest, or a file is missing or of another size;
            the message names it.
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
    Move a complete checkpoint to its place, in one step.

    Args:
        staged (`Path`): The folder, below the `incomplete` of the same file system. That is removed.
        final (`Path`): Its place. What lies there already, as after a resume from an earlier step, is replaced.
    """
    if final.exists():
        os.replace(final, staged.with_name(f"replaced-{final.name}"))
    os.replace(staged, final)
    shutil.rmtree(staged.parent, ignore_errors=True)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """
    The complete checkpoint that was written last. One that is not complete is reported and passed over.

    Not the one with the highest step: a run that starts anew in the folder of an earlier one has lower steps.

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
    """Whether an argument, which a command line gives as text, asks to go on with a run."""
    return str(resume_from_checkpoint or "").lower() not in ("", "false", "none")


def asks_for_last(resume_from_checkpoint: str | bool | None) -> bool:
    """Whether an argument asks to go on from the last checkpoint, and names none."""
    return str(resume_from_checkpoint).lower() in ("true", "last")


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str | Path) -> Path | None:
    """
    The checkpoint that a run goes on from.

    Args:
        resume_from_checkpoint (`str` or `bool`, *optional*):
            `True`, `"true"` or `"last"` for the last complete one in `output_dir`, a path for that one. `None`, `False`,
            `"false"` or an empty string for none.
        output_dir (`str` or `Path`): Folder of the run.

    Returns:
        `Path`: `None` to start from the beginning, as also where the last one is asked for and there is none: the same
        command then starts a run and goes on with it, however early it was stopped.

    Raises:
        `DamagedCheckpointError`: If the path that is named is no complete checkpoint.
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
