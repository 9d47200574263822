# SPDX-License-Identifier: Apache-2.0

"""Checkpoint folders, which are complete or absent, and the choice of the one that a run resumes from."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from alphagrpo_ext.files import write_text
from alphagrpo_ext.trainer.resume import processes
from alphagrpo_ext.trainer.resume.file_records import (
    FileRecord,
    checksums,
    content_faults,
    file_sizes,
    make_records,
    pieces,
    shape_faults,
    signature,
)


logger = logging.getLogger(__name__)

MANIFEST_NAME = "checkpoint.json"
"""File that lists the files of a checkpoint. It is written last."""
INCOMPLETE_NAME = "incomplete"
"""Folder of `output_dir` where a checkpoint is written until it is complete."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_NUM_NAMED_FAULTS = 5
# Checkpoints whose contents this process has compared, so that a run that is prepared and then trained reads them once.
_compared: set[tuple[object, ...]] = set()


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
        files (`dict[str, FileRecord]`): Size and checksums of every file, by its path in the folder.
    """

    step: int
    num_processes: int
    written_at: float
    files: dict[str, FileRecord]

    @property
    def has_checksums(self) -> bool:
        """Whether contents were recorded. Earlier versions kept sizes alone."""
        return all(record.checksums is not None for record in self.files.values())

    def to_json(self) -> str:
        """The text of the file, with a checksum of its own."""
        content = asdict(self)
        return json.dumps({"checksum": _own_checksum(content), **content}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """
        Raises:
            `ValueError`: If the text is not that of a manifest, or differs from what was written.
        """
        try:
            content = json.loads(text)
            if "checksum" in content:
                if content.pop("checksum") != _own_checksum(content):
                    raise ValueError("its checksum differs from that of its contents")
                files = {
                    name: FileRecord(record["size"], tuple(record["checksums"]))
                    for name, record in content["files"].items()
                }
            else:
                files = {name: FileRecord(int(size)) for name, size in content["files"].items()}
            return cls(**{**content, "files": files})
        except (AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"it is not the manifest of a checkpoint ({error!r})") from error


def _own_checksum(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def record_files(folder: Path, on_each_node: bool = False) -> dict[str, FileRecord]:
    """
    Record the files of a folder. The processes of the node that saves share the work. All processes call it together, after the
    last file is written.

    Args:
        folder (`Path`): The folder.
        on_each_node (`bool`, *optional*, defaults to `False`): Whether every node has a folder of its own.
    """
    is_needed = processes.node() == 0 or on_each_node
    sizes = file_sizes(folder, MANIFEST_NAME) if is_needed else {}
    own = checksums(folder, processes.node_share(pieces(sizes)))
    found = {}
    for node, part in processes.gathered((processes.node(), own)):
        found |= part if node == processes.node() else {}
    return make_records(sizes, found)


def write_manifest(folder: Path, step: int, num_processes: int, files: Mapping[str, FileRecord] | None = None) -> None:
    """
    Write the manifest of a folder. This is the last step before the folder is a checkpoint.

    Args:
        folder (`Path`): The folder.
        step (`int`): Number of optimizer steps done.
        num_processes (`int`): Number of processes that train.
        files (`Mapping[str, FileRecord]`, *optional*): From [`record_files`]; made by this process alone by default.
    """
    if files is None:
        sizes = file_sizes(folder, MANIFEST_NAME)
        files = make_records(sizes, checksums(folder, pieces(sizes)))
    write_text(folder / MANIFEST_NAME, Manifest(step, num_processes, time.time(), dict(files)).to_json())


def read_manifest(folder: Path) -> Manifest:
    """
    Read the manifest of a checkpoint and check that its files, and no others, are there. Their contents are not read; see
    [`check_contents`].

    Args:
        folder (`Path`): The checkpoint.

    Raises:
        `DamagedCheckpointError`: If the folder does not exist or has no manifest, or if a file is missing, of another size,
            of another kind, or not of this checkpoint. The message names it.
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
        manifest = Manifest.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(
            f"the checkpoint {folder} is damaged: {MANIFEST_NAME} cannot be read: {error}"
        ) from error
    faults = list(shape_faults(folder, manifest.files, MANIFEST_NAME))
    name = _CHECKPOINT.fullmatch(folder.name)
    if name and int(name[1]) != manifest.step:
        faults.insert(0, f"its files are those of step {manifest.step}")
    _raise_faults(folder, faults)
    return manifest


def check_contents(folder: Path, manifest: Manifest) -> None:
    """
    Compare the contents of a checkpoint's files with what was written. The processes of a node share the work, and all
    processes call it together. What this process has compared before, and was not written since, is not read again.

    Args:
        folder (`Path`): The checkpoint.
        manifest ([`Manifest`]): From [`read_manifest`].

    Raises:
        `DamagedCheckpointError`: If a file differs, in any process. The message names it.
    """
    stamp = signature(folder, manifest.files)
    own = [] if stamp in _compared else list(content_faults(folder, manifest.files, processes.node_share))
    _raise_faults(folder, [fault for faults in processes.gathered(own) for fault in faults])
    _compared.add(stamp)


def _raise_faults(folder: Path, faults: list[str]) -> None:
    faults = list(dict.fromkeys(faults))
    if not faults:
        return
    more = f", and {len(faults) - _NUM_NAMED_FAULTS} more" if len(faults) > _NUM_NAMED_FAULTS else ""
    raise DamagedCheckpointError(
        f"the checkpoint {folder} is damaged: {'; '.join(faults[:_NUM_NAMED_FAULTS])}{more}. Resume from another one, or "
        f"restore these files"
    )


def check_checkpoint(folder: Path) -> Manifest:
    """
    Read the manifest of a checkpoint after all of its files were found to be as they were written; see [`read_manifest`] and
    [`check_contents`]. All processes call it together, and either all of them raise or none does.

    Args:
        folder (`Path`): The checkpoint.

    Raises:
        `DamagedCheckpointError`: If it is damaged, in any process.
    """
    manifest = error = None
    try:
        manifest = read_manifest(folder)
    except DamagedCheckpointError as found:
        error = found
    others = [fault for fault in processes.gathered(error and str(error)) if fault is not None]
    if error is not None:
        raise error
    if others:
        raise DamagedCheckpointError(others[0])
    check_contents(folder, manifest)
    if not manifest.has_checksums and processes.is_main():
        logger.warning(
            "%s was saved by an earlier version, which kept no checksums and no settings: only the sizes of its files were "
            "compared",
            folder,
        )
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


def complete_checkpoints(output_dir: Path) -> Iterator[Path]:
    """
    Find checkpoints that are complete by the names and sizes of their files, the one that was written last first. Their contents
    are not read. Those that are incomplete are skipped with a warning.

    Args:
        output_dir (`Path`): Folder of a run.
    """
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
    yield from (path for *_, path in sorted(complete, reverse=True))


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """
    Find the complete checkpoint that was written last. Those that are incomplete or damaged are skipped with a warning that
    says why. All processes call it together.

    It need not have the highest step: a run that starts anew in the folder of an earlier one has lower steps.

    Args:
        output_dir (`str` or `Path`): Folder of a run.
    """
    # The main process names the candidates, so that all processes compare the same ones in the same order.
    own = list(complete_checkpoints(Path(output_dir))) if processes.is_main() else []
    for path in processes.gathered(own)[0]:
        try:
            check_checkpoint(path)
        except DamagedCheckpointError as error:
            if processes.is_main():
                logger.warning("%s is not used: %s", path, error)
            continue
        return path
    return None


def asks_to_resume(resume_from_checkpoint: str | bool | None) -> bool:
    """Whether an argument, which is text on a command line, asks to resume a run."""
    return str(resume_from_checkpoint or "").lower() not in ("", "false", "none")


def asks_for_last(resume_from_checkpoint: str | bool | None) -> bool:
    """Whether an argument asks for the last checkpoint, without naming it."""
    return str(resume_from_checkpoint).lower() in ("true", "last")


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str | Path) -> Path | None:
    """
    Find the checkpoint that a run resumes from, and compare its files with what was written. All processes call it together.

    Args:
        resume_from_checkpoint (`str` or `bool`, *optional*):
            `True`, `"true"` or `"last"` for the last checkpoint in `output_dir` that is complete and not damaged, or a path.
            `None`, `False`, `"false"` or an empty string for none.
        output_dir (`str` or `Path`): Folder of the run.

    Returns:
        `Path`: `None` to start from the beginning. That is also the result if the last one is asked for and there is none, so
        that the same command starts a run and resumes it, however early it was stopped.

    Raises:
        `DamagedCheckpointError`: If the named path is not a complete checkpoint, or is damaged.
    """
    if not asks_to_resume(resume_from_checkpoint):
        return None
    if not asks_for_last(resume_from_checkpoint):
        checkpoint = Path(resume_from_checkpoint)
        check_checkpoint(checkpoint)
        return checkpoint
    checkpoint = last_checkpoint(output_dir)
    if checkpoint is None:
        logger.warning("%s holds no complete checkpoint: the run starts from the beginning", output_dir)
    else:
        logger.warning("the run goes on from %s", checkpoint)
    return checkpoint
