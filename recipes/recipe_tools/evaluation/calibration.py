# SPDX-License-Identifier: Apache-2.0

"""
Calibration of the threshold from which a policy keeps its image.

The policy paints training prompts, reflects on every image, and repaints it. The threshold is the one with which most images pass
strictly, if those at or above it are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from alphagrpo_ext.files import write_text
from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.rollout.config import RolloutConfig
from alphagrpo_ext.rollout.generator import RolloutGenerator
from alphagrpo_ext.rollout.stopping import best_threshold, keep_probabilities, with_threshold
from alphagrpo_ext.rollout.task import PAINTING_TASK, REFLECTION_TASK, TASKS
from alphagrpo_ext.rollout.tasks.self_reflection import SelfReflection
from alphagrpo_ext.trajectory import Segment, TextSegment
from reward_models.dvreward import DVReward
from reward_models.evaluation.evaluate import evaluate, share_of_work
from reward_models.evaluation.scores import scored_pairs


class _ObservedReflection(SelfReflection):
    """Repaints every image, and notes how sure the policy was that the image is right, in the order of the samples."""

    def __init__(self) -> None:
        super().__init__(think=True, allow_stop=True)
        self.probabilities: list[float | None] = []

    def which_paint(
        self,
        contexts: Sequence[Sequence[Segment]],
        texts: Sequence[TextSegment],
        processor: UnifiedProcessor,
        model: UnifiedModel,
    ) -> list[bool]:
        self.probabilities += keep_probabilities(model, processor, contexts, texts)
        return [True] * len(texts)


@dataclass(frozen=True)
class StopCalibration:
    """
    A threshold, and what it does to the images that it was calibrated on.

    Args:
        threshold (`float`): The threshold, in [0, 1].
        num_images (`int`): Number of images.
        right_kept, wrong_kept (`float`): Shares of images that pass strictly, and that do not, which are kept.
        never, always, calibrated (`float`):
            Shares of images that pass strictly after one round if none is kept, if all are, and with the threshold.
    """

    threshold: float
    num_images: int
    right_kept: float
    wrong_kept: float
    never: float
    always: float
    calibrated: float

    def __str__(self) -> str:
        return (
            f"stop_threshold {self.threshold:.4f} from {self.num_images} images: keeps {self.right_kept:.1%} of right and "
            f"{self.wrong_kept:.1%} of wrong ones. Strict pass {self.calibrated:.1%}; all repainted {self.never:.1%}, all kept "
            f"{self.always:.1%}"
        )


def calibrate(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    rows: Sequence[Mapping[str, Any]],
    configs: Mapping[str, RolloutConfig],
    reward: DVReward,
    seeds: Sequence[int],
    batch_size: int,
) -> StopCalibration:
    """
    Paint, reflect, repaint, and choose a threshold.

    Args:
        model ([`UnifiedModel`]), processor ([`UnifiedProcessor`]): The policy.
        rows (`Sequence[Mapping[str, Any]]`): Training prompts with their questions.
        configs (`Mapping[str, RolloutConfig]`): How images are painted and refined, by the names of the two tasks.
        reward ([`DVReward`]): Judges which images pass.
        seeds (`Sequence[int]`): Noise seeds of every prompt.
        batch_size (`int`): Samples per batch.

    Raises:
        `ValueError`: If no image could be judged, or no reflection has a verdict.
    """
    paint = RolloutGenerator(model, processor, TASKS.get(PAINTING_TASK)(think=True))
    first = evaluate(paint, rows, configs[PAINTING_TASK], reward, seeds, batch_size, "painting")
    task = _ObservedReflection()
    reflect = RolloutGenerator(model, processor, task)
    repainted = evaluate(reflect, rows, configs[REFLECTION_TASK], reward, seeds, batch_size, "repainting", first)
    own = list(zip(share_of_work(len(rows), seeds), task.probabilities, strict=True))
    by_place = dict(gather_object(own) if PartialState().num_processes > 1 else own)
    pairs = scored_pairs(first.samples, repainted.samples)
    sure = [by_place[old.seed, old.index] for old, _ in pairs]
    if all(p is None for p in sure):
        raise ValueError(
            f"no reflection on a judged image says {processor.keep_verdict!r} or {processor.repaint_verdict!r}: the model has "
            f"not learned to give a verdict, or the processor's keep_verdict and repaint_verdict are not its words"
        )
    first_passes, later_passes = ([bool(sample.strict_pass) for sample in side] for side in zip(*pairs, strict=True))
    threshold = best_threshold(sure, first_passes, later_passes)
    is_kept = [p is not None and p >= threshold for p in sure]
    after = [old if kept else new for kept, old, new in zip(is_kept, first_passes, later_passes, strict=True)]

    def share(flags: Sequence[bool]) -> float:
        return sum(flags) / max(len(flags), 1)

    return StopCalibration(
        threshold=threshold,
        num_images=len(pairs),
        right_kept=share([kept for kept, right in zip(is_kept, first_passes, strict=True) if right]),
        wrong_kept=share([kept for kept, right in zip(is_kept, first_passes, strict=True) if not right]),
        never=share(later_passes),
        always=share(first_passes),
        calibrated=share(after),
    )


def save_threshold(folder: Path, model: UnifiedModel, threshold: float) -> None:
    """
    Write a threshold into the settings of sampling in a model folder's `config.json`. Everything else stays as it is, and so does
    a file that has this threshold.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    sampling = with_threshold(config.get("sampling") or dict(model.family.sampling_settings), threshold)
    if sampling != config.get("sampling"):
        write_text(path, json.dumps(config | {"sampling": sampling}, indent=2) + "\n")
