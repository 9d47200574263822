# SPDX-License-Identifier: Apache-2.0

import random
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from alphagrpo_ext.report import Answer, ReportTurn, TrajectoryGroup, TrajectoryRecord
from alphagrpo_ext.report.thumbnails import data_url


TAGS = ("Count", "Attribute", "Spatial")


def photograph(seed: int, size: int = 256) -> Image.Image:
    """An image with edges, gradients and grain, which compresses about as badly as a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    return Image.fromarray((np.asarray(coarse) + rng.normal(0, 14, (size, size, 3))).clip(0, 255).astype(np.uint8))


@pytest.fixture
def make_group() -> Callable[..., TrajectoryGroup]:
    """Builds a group of refinements: the first member is the best, and the last one is worse than the image it was given."""

    def make(
        step: int = 1,
        index: int = 0,
        size: int = 4,
        prompt: str = "two red circles",
        image_size: int = 24,
        rewards: list[float | None] | None = None,
        **fields,
    ) -> TrajectoryGroup:
        rng = random.Random(1000 * step + index)
        if rewards is None:
            rewards = [0.9 - 0.6 * place / size for place in range(size)]
        given = data_url(photograph(rng.randrange(10**6), image_size))
        trajectories = [
            TrajectoryRecord(
                turns=[
                    ReportTurn(
                        f"<think> draft {place} </think>", data_url(photograph(rng.randrange(10**6), image_size))
                    )
                ],
                given_image=given,
                reward=reward,
                rewards={"dvreward": reward},
                advantage=1.0 - place,
                image_advantage=1.0 - place,
                given_reward=0.5,
                answers=[
                    Answer(
                        f"is the {tag} right ?", tag, "semantic", 0.1 if place == size - 1 and tag == "Count" else 0.9
                    )
                    for tag in TAGS
                ],
            )
            for place, reward in enumerate(rewards)
        ]
        return TrajectoryGroup(step, index, "self_reflection", prompt, trajectories, **fields)

    return make
