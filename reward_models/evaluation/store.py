# SPDX-License-Identifier: Apache-2.0

"""Scored batches of an evaluation in a folder, so that one that was killed goes on where it stopped."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from reward_models.evaluation.samples import EvaluatedSample, Evaluation, gather_samples
from reward_models.files.image_files import save_image
from reward_models.files.json_lines_file import JsonLinesFile
from reward_models.prompts.questions import read_json_lines


logger = logging.getLogger(__name__)

_NOT_STORED = ("image", "image_file")


class EvaluationStore(JsonLinesFile):
    """
    The batches of one evaluation, opened by `with`: a line a batch in `<folder>/batches-<process>.jsonl`, and an image a
    sample beside it. What is kept of an evaluation with other settings is deleted.

    A batch is kept whole or not at all, and one that is kept is never painted again: how many samples are painted at once can
    move a pixel by a level, so an evaluation that goes on must cut its batches where the first run did. Under several
    processes each has a file.

    Args:
        folder (`Path`): The folder. It holds nothing else.
        digest (`str`): Of all that the evaluation depends on; see [`~reward_models.evaluation.files.settings_digest`].
    """

    def __init__(self, folder: Path, digest: str) -> None:
        state = PartialState()
        super().__init__(folder / f"batches-{state.process_index}.jsonl")
        self.folder = folder
        # The share of a process depends on how many there are.
        self.header = {"digest": digest, "num_processes": state.num_processes}
        self._batches: dict[int, list[EvaluatedSample]] = {}
        self._has_header = False

    def __enter__(self) -> EvaluationStore:
        state = PartialState()
        # Of every process before anything is deleted: what another run still writes stays.
        with self.locked():
            state.wait_for_everyone()
            if state.is_main_process and self._made_with_other_settings():
                logger.warning("the evaluation in %s was made with other settings and is made anew", self.folder)
                for path in self.folder.iterdir():
                    if path.suffix != ".lock":
                        path.unlink()
            state.wait_for_everyone()
            super().__enter__()
        if not self._has_header:
            self.append_row(self.header)
        return self

    def samples(self, start: int) -> list[EvaluatedSample] | None:
        """The samples of the batch that begins at this place of the process' work, or `None` if it is not kept."""
        return self._batches.get(start)

    def evaluation(self, work: Sequence[tuple[int, int]], round: int) -> Evaluation | None:
        """
        All that was kept, if that is all there is to do.

        Args:
            work (`Sequence[tuple[int, int]]`): The share of this process, see [`~reward_models.evaluation.evaluate.share_of_work`].
            round (`int`): How often the images have been refined.

        Returns:
            `Evaluation`: `None` if any process has something left to do.
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
            start (`int`): Place in the process' work at which it begins.
            samples (`Sequence[EvaluatedSample]`): The samples, with their images.

        Returns:
            `list[EvaluatedSample]`: The same with `image_file` in place of `image`.
        """
        rows = []
        for sample in samples:
            name = f"{sample.seed}-{sample.index}.png"
            save_image(sample.image, self.folder / name)
            rows.append({f.name: getattr(sample, f.name) for f in fields(sample) if f.name not in _NOT_STORED})
            rows[-1]["file"] = name
        # After the images, so that no line names one that is not there.
        self.append_row({"start": start, "samples": rows})
        self._batches[start] = [
            replace(sample, image=None, image_file=str(self.folder / row["file"]))
            for sample, row in zip(samples, rows, strict=True)
        ]
        return self._batches[start]

    def read_row(self, row: Any, where: str) -> None:
        if not self._has_header:
            if row != self.header:
                raise ValueError(f"{where} is not the head of this evaluation: delete the folder {self.folder}")
            self._has_header = True
            return
        try:
            samples = [self._sample(entry) for entry in row["samples"]]
            start = row["start"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where} is not a batch of an evaluation ({error!r}): delete {self.folder}") from error
        # An image that somebody deleted is painted again, with its batch.
        if all(os.path.exists(sample.image_file) for sample in samples):
            self._batches[start] = samples

    def _sample(self, entry: dict[str, Any]) -> EvaluatedSample:
        values = dict(entry)
        image_file = str(self.folder / values.pop("file"))
        for name in ("semantic", "quality"):
            values[name] = tuple(values[name])
        return EvaluatedSample(**values, image=None, image_file=image_file)

    def _made_with_other_settings(self) -> bool:
        for path in self.folder.glob("batches-*.jsonl"):
            try:
                _, header = next(read_json_lines(path), (None, None))
            except ValueError:
                # Torn while it was written, so nothing follows it.
                header = None
            if header is not None and header != self.header:
                return True
        return False
