# SPDX-License-Identifier: Apache-2.0

"""
Images that the model paints during its pretraining, with what the pixel judge reads in them.

A painting fails in ways that no rendered scene shows: a shape is half drawn, a color is mixed. Questions about quality, and
reflections that keep a right image, are therefore learned from paintings. Prompts are those of the training split.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from alphagrpo_ext.files import atomic_path
from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.rollout.config import RolloutConfig
from alphagrpo_ext.rollout.generator import RolloutGenerator, sample_generator
from alphagrpo_ext.rollout.settings import TaskSettings
from alphagrpo_ext.rollout.task import PAINTING_TASK, TASKS
from alphagrpo_ext.shapes.judge import SceneBelief, analyze, answer, read_scene, strict_pass
from alphagrpo_ext.shapes.prompts import (
    PromptSpec,
    quality_questions,
    sample_prompt,
    sample_spec,
    satisfies,
    semantic_questions,
)
from alphagrpo_ext.shapes.scene import Scene
from alphagrpo_ext.shapes.text import FLAWS


@dataclass(frozen=True, eq=False)
class Painting:
    """
    An image of the model. It is equal to no other one.

    Args:
        spec (`PromptSpec`): What it was painted for.
        array (`np.ndarray` of shape `(height, width, 3)`): Its pixels, `uint8`.
        scene (`Scene`): The scene that it shows most likely.
        answers (`tuple[tuple[str, bool], ...]`): All questions of the prompt, and whether the answer is yes.
        flaws (`tuple[str, ...]`): How it is badly painted, in the words of a reflection.
    """

    spec: PromptSpec
    array: np.ndarray
    scene: Scene
    answers: tuple[tuple[str, bool], ...]
    flaws: tuple[str, ...]

    @property
    def is_right(self) -> bool:
        """Whether every answer is yes."""
        return all(yes for _, yes in self.answers)

    @cached_property
    def image(self) -> Image.Image:
        """The image for the vision tower."""
        return Image.fromarray(self.array)


def load_paintings(
    path: Path,
    num_paintings: int,
    key: str,
    model: UnifiedModel,
    processor: UnifiedProcessor,
    sampling: TaskSettings,
    show_progress: bool,
) -> list[Painting]:
    """
    Paint training prompts, three quarters of them with thoughts that are sampled at a temperature of 1, or load what was
    painted before.

    Args:
        path (`Path`): The file of pixels, which is written if it is missing.
        num_paintings (`int`): How many there are.
        key (`str`): Seed of prompts and noise.
        model ([`UnifiedModel`]), processor ([`UnifiedProcessor`]): The painter.
        sampling ([`TaskSettings`]): Its schedule, guidance and sizes.
        show_progress (`bool`): Whether to show a progress bar.

    Raises:
        `ValueError`: If the file has another number of paintings.
    """
    rng = random.Random(f"paintings-{key}")
    specs = [sample_spec(rng, "train") for _ in range(num_paintings)]
    prompts = [sample_prompt(spec, rng) for spec in specs]
    if not path.exists():
        pixels = _paint(prompts, key, model, processor, sampling, show_progress)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, pixels)
    pixels = np.load(path)
    if len(pixels) != num_paintings:
        raise ValueError(
            f"{path} has {len(pixels)} paintings, not num_paintings={num_paintings}: remove it to paint anew"
        )
    belief = analyze(pixels)
    return [_read(spec, pixels[index], belief, index) for index, spec in enumerate(specs)]


@torch.no_grad()
def _paint(
    prompts: Sequence[str],
    key: str,
    model: UnifiedModel,
    processor: UnifiedProcessor,
    sampling: TaskSettings,
    show_progress: bool,
) -> np.ndarray:
    """Pixels `(prompts, height, width, 3)` of images."""
    config = RolloutConfig.from_settings(replace(sampling, temperature=1.0), batch_size=64)
    rows = [{"prompt": prompt} for prompt in prompts]
    generators = [sample_generator(f"paintings-{key}", 0, index) for index in range(len(rows))]
    num_thoughts = 3 * len(rows) // 4
    images: list[np.ndarray] = []
    with tqdm(total=len(rows), desc="own paintings", disable=not show_progress) as progress:
        for think, part in ((True, slice(num_thoughts)), (False, slice(num_thoughts, None))):
            generate = RolloutGenerator(model, processor, TASKS.get(PAINTING_TASK)(think=think))
            for trajectories in generate.parts(rows[part], generators[part], config):
                images += [np.asarray(trajectory.final_image) for trajectory in trajectories]
                progress.update(len(trajectories))
    return np.stack(images)


def _read(spec: PromptSpec, array: np.ndarray, belief: SceneBelief, index: int) -> Painting:
    """What the judge finds in a painting."""
    scene = read_scene(belief, index)
    semantic = {row["question"]: answer(belief, index, row["question"]) for row in semantic_questions(spec)}
    quality = {row["tag"]: (row["question"], answer(belief, index, row["question"])) for row in quality_questions()}
    flaws = [FLAWS[tag] for tag, (_, value) in quality.items() if value < 0.5]
    if not flaws and satisfies(scene, spec) and not strict_pass(list(semantic.values())):
        # What is there can barely be told, though it is most likely what was asked for.
        flaws.append(FLAWS["Geometry"])
    answers = [*semantic.items(), *quality.values()]
    return Painting(spec, array, scene, tuple((question, value >= 0.5) for question, value in answers), tuple(flaws))
