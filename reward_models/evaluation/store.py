# SPDX-License-Identifier: Apache-2.0

"""
Evaluations on disk, so that a stopped evaluation resumes, and a resumed run does not repeat the one before training.

A batch that has been scored is final, and a resumed evaluation divides its samples into the same batches as the first run.
The reason is numerical: the number of samples in a batch can change a pixel by one level, so a sample that is painted again on
its own could differ.

Each stage of an evaluation has a folder and a digest of everything that it depends on, the checkpoint's files included. So a
second model or a further round of refinement does not repeat the stages before it.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from alphagrpo_ext.files import JsonLinesFile, read_json_lines, write_text
from reward_models.evaluation.samples import EvaluatedSample, Evaluation, gather_samples
from reward_models.files.image_files import is_whole_image, save_image


logger = logging.getLogger(__name__)

INDEX_NAME = "evaluations.json"
_OTHER_SETTINGS = "the evaluation in %s was made with other settings and is repeated"


class EvaluationStore(JsonLinesFile):
    """
    The scored batches of one evaluation, to be used in a `with` statement.

    `<folder>/batches-<process>.jsonl` has a header and then one line per batch. The images are beside it. If the folder holds an
    evaluation with other settings, that is deleted.

    Args:
        folder (`Path`): A folder for this evaluation alone.
        digest (`str`):
            Digest of everything that the evaluation depends on; see
            [`~reward_models.evaluation.settings_digest.settings_digest`].
    """

    def __init__(self, folder: Path, digest: str) -> None:
        state = PartialState()
        super().__init__(folder / f"batches-{state.process_index}.jsonl")
        self.folder = folder
        # The share of a process depends on the number of processes.
        self.header = {"digest": digest, "num_processes": state.num_processes}
        self._batches: dict[int, list[EvaluatedSample]] = {}
        self._has_header = False

    def __enter__(self) -> EvaluationStore:
        state = PartialState()
        # Every process takes its lock before anything is deleted, so that no file of a running evaluation is lost.
        with self.locked():
            state.wait_for_everyone()
            if state.is_main_process and self._has_other_settings():
                logger.warning(_OTHER_SETTINGS, self.folder)
                for path in self.folder.iterdir():
                    if path.suffix != ".lock":
                        path.unlink()
            state.wait_for_everyone()
            super().__enter__()
        if not self._has_header:
            self.append_row(self.header)
        return self

    def samples(self, start: int) -> list[EvaluatedSample] | None:
        """The samples of the batch that starts at position `start` of this process's share, or `None` if it is not kept."""
        return self._batches.get(start)

    def evaluation(self, work: Sequence[tuple[int, int]], round: int) -> Evaluation | None:
        """
        The evaluation, if all of it is kept.

        Args:
            work (`Sequence[tuple[int, int]]`):
                The share of this process; see [`~reward_models.evaluation.evaluate.share_of_work`].
            round (`int`): Number of times that the images have been refined.

        Returns:
            `Evaluation`: `None` if a process has samples left to paint.
        """
        samples = [sample for start in sorted(self._batches) for sample in self._batches[start]]
        complete = [(sample.seed, sample.index) for sample in samples] == list(work)
        if PartialState().num_processes > 1:
            complete = all(gather_object([complete]))
        return gather_samples(samples, round) if complete else None

    def keep(self, start: int, samples: Sequence[EvaluatedSample]) -> list[EvaluatedSample]:
        """
        Write a batch.

        Args:
            start (`int`): Position of the batch in this process's share.
            samples (`Sequence[EvaluatedSample]`): The samples, with their images.

        Returns:
            `list[EvaluatedSample]`: The same samples with `image_file` instead of `image`.
        """
        names = [f"{sample.seed}-{sample.index}.png" for sample in samples]
        for sample, name in zip(samples, names, strict=True):
            save_image(sample.image, self.folder / name)
        rows = [sample.to_row(name) for sample, name in zip(samples, names, strict=True)]
        # The line follows the images, so that every image that it names exists.
        self.append_row({"start": start, "samples": rows})
        self._batches[start] = [
            replace(sample, image=None, image_file=str(self.folder / name))
            for sample, name in zip(samples, names, strict=True)
        ]
        return self._batches[start]

    def read_row(self, row: Any, where: str) -> None:
        if not self._has_header:
            if row != self.header:
                raise ValueError(f"{where} is not the header of this evaluation: delete the folder {self.folder}")
            self._has_header = True
            return
        try:
            samples = [EvaluatedSample.from_row(entry, self.folder) for entry in row["samples"]]
            start = row["start"]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{where} is not a batch of an evaluation ({error!r}): delete {self.folder}") from error
        # If an image has been deleted or damaged, its batch is painted again.
        if _have_images(samples):
            self._batches[start] = samples

    def _has_other_settings(self) -> bool:
        for path in self.folder.glob("batches-*.jsonl"):
            try:
                _, header = next(read_json_lines(path), (None, None))
            except ValueError:
                # The header is incomplete, so there are no batches.
                header = None
            if header is not None and header != self.header:
                return True
        return False


def save_evaluations(folder: Path, digest: str, evaluations: Sequence[Evaluation]) -> None:
    """
    Write finished evaluations with their images. An older folder is replaced, and one without an index is not read.

    Args:
        folder (`Path`): The folder.
        digest (`str`): Digest of the settings.
        evaluations (`Sequence[Evaluation]`): The evaluations.
    """
    shutil.rmtree(folder, ignore_errors=True)
    entries = []
    for position, evaluation in enumerate(evaluations):
        rows = []
        for sample in evaluation.samples:
            name = f"{position}-{sample.seed}-{sample.index}.png"
            save_image(sample.load_image(), folder / name)
            rows.append(sample.to_row(name))
        entries.append({"round": evaluation.round, "samples": rows})
    write_text(folder / INDEX_NAME, json.dumps({"digest": digest, "evaluations": entries}) + "\n")


def load_evaluations(folder: Path, digest: str) -> list[Evaluation] | None:
    """
    Read evaluations that [`save_evaluations`] wrote.

    Args:
        folder (`Path`): The folder.
        digest (`str`): Digest of the settings that the evaluations must have been made with.

    Returns:
        `list[Evaluation]`: `None` if there are none, if they were made with other settings, or if an image is missing or damaged.
    """
    if not (folder / INDEX_NAME).is_file():
        return None
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    if index["digest"] != digest:
        logger.warning(_OTHER_SETTINGS, folder)
        return None
    evaluations = []
    for entry in index["evaluations"]:
        samples = [EvaluatedSample.from_row(row, folder) for row in entry["samples"]]
        if not _have_images(samples):
            return None
        samples = [replace(sample, image=sample.load_image(), image_file=None) for sample in samples]
        evaluations.append(Evaluation(samples, entry["round"]))
    return evaluations


def _have_images(samples: Sequence[EvaluatedSample]) -> bool:
    """Whether the files of all images are there and whole. Every damaged one is named in a warning."""
    return sum(is_whole_image(Path(sample.image_file)) for sample in samples) == len(samples)


def evaluate_once(
    folder: Path, digest: str, reuse: bool, evaluate: Callable[[], Sequence[Evaluation]]
) -> list[Evaluation]:
    """
    Read evaluations from a folder, or make them and keep them there. The main process reads and writes.

    Args:
        folder (`Path`): The folder.
        digest (`str`): Digest of the settings.
        reuse (`bool`): Whether evaluations in the folder may be used, because the run resumes an earlier one.
        evaluate (`Callable[[], Sequence[Evaluation]]`): Makes the evaluations.
    """
    state = PartialState()
    kept = [load_evaluations(folder, digest) if reuse and state.is_main_process else None]
    if state.num_processes > 1:
        # Either all processes evaluate, or none does.
        broadcast_object_list(kept)
    if kept[0] is not None:
        return kept[0]
    evaluations = list(evaluate())
    if state.is_main_process:
        save_evaluations(folder, digest, evaluations)
    return evaluations
