# SPDX-License-Identifier: Apache-2.0

"""Keeps evaluations in a folder, so that a run that is resumed need not repeat the one before training."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image

from alphagrpo_ext.rollout.generator import image_key
from reward_models.evaluation.samples import EvaluatedSample, Evaluation
from reward_models.files.image_files import load_image


logger = logging.getLogger(__name__)

INDEX_NAME = "evaluations.json"


def settings_digest(*settings: Any) -> str:
    """
    What an evaluation depended on, as a short text: equal in any process for settings with equal values. Images count by
    their pixels.

    Args:
        settings (`Any`):
            Dataclasses, mappings, sequences, images, and what has a `repr` that says all of it.

    Raises:
        `ValueError`: If a setting is known only by where it lies in memory.
    """
    return hashlib.sha256(repr(_comparable(settings)).encode()).hexdigest()


def _comparable(value: Any) -> Any:
    """A value whose `repr` is the same in any process."""
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


def save_evaluations(folder: Path, digest: str, evaluations: Sequence[Evaluation]) -> None:
    """
    Write evaluations with their images. The folder appears when it is complete; an older one is replaced.

    Args:
        folder (`Path`): The folder.
        digest (`str`): Of the settings; see [`settings_digest`].
        evaluations (`Sequence[Evaluation]`): What to keep.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    entries = []
    for place, evaluation in enumerate(evaluations):
        rows = []
        for sample in evaluation.samples:
            name = f"{place}-{sample.seed}-{sample.index}.png"
            sample.load_image().save(temporary / name)
            kept = [f.name for f in fields(sample) if f.name not in ("image", "image_file")]
            rows.append({field: getattr(sample, field) for field in kept} | {"file": name})
        entries.append({"round": evaluation.round, "samples": rows})
    index = {"digest": digest, "evaluations": entries}
    (temporary / INDEX_NAME).write_text(json.dumps(index) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def load_evaluations(folder: Path, digest: str) -> list[Evaluation] | None:
    """
    Read them back.

    Args:
        folder (`Path`): The folder.
        digest (`str`): Of the settings that they must have been made with.

    Returns:
        `list[Evaluation]`: `None` if there are none, or they were made with other settings.
    """
    if not (folder / INDEX_NAME).is_file():
        return None
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    if index["digest"] != digest:
        logger.warning("the evaluation in %s was made with other settings and is made anew", folder)
        return None
    evaluations = []
    for entry in index["evaluations"]:
        samples = []
        for row in entry["samples"]:
            answers = {side: tuple(row.pop(side, ())) for side in ("semantic", "quality")}
            image = load_image(folder / row.pop("file"))
            samples.append(EvaluatedSample(**row, **answers, image=image))
        evaluations.append(Evaluation(samples, entry["round"]))
    return evaluations


def evaluate_once(
    folder: Path, digest: str, reuse: bool, evaluate: Callable[[], Sequence[Evaluation]]
) -> list[Evaluation]:
    """
    Evaluations from a folder, or made and kept there. Under several processes the main one reads and writes.

    Args:
        folder (`Path`): The folder.
        digest (`str`): Of the settings; see [`settings_digest`].
        reuse (`bool`): Whether what is there may be taken: whether the run goes on with an earlier one.
        evaluate (`Callable[[], Sequence[Evaluation]]`): Makes the evaluations.
    """
    state = PartialState()
    kept = [load_evaluations(folder, digest) if reuse and state.is_main_process else None]
    if state.num_processes > 1:
        # All evaluate, or none.
        broadcast_object_list(kept)
    if kept[0] is not None:
        return kept[0]
    evaluations = list(evaluate())
    if state.is_main_process:
        save_evaluations(folder, digest, evaluations)
    return evaluations
