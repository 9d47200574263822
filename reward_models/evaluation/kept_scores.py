# SPDX-License-Identifier: Apache-2.0

"""Scores of images in a file, so that scoring that was stopped does not ask a question twice."""

from __future__ import annotations

import os
from typing import Any

from alphagrpo_ext.files import JsonLinesFile
from reward_models.dvreward import Score


class KeptScores(JsonLinesFile):
    """
    Scores by a key that identifies everything that the score depends on, e.g. a
    [`~reward_models.evaluation.settings_digest.settings_digest`]. Scores under other keys are ignored.

    Args:
        path (`str` or `PathLike`): The file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._scores: dict[str, Score] = {}

    def get(self, key: str) -> Score | None:
        """The score that was kept under a key, or `None`."""
        return self._scores.get(key)

    def keep(self, key: str, score: Score) -> None:
        """Write a score. If the judge failed, nothing is kept, so that the next run asks again."""
        if score.reward is None:
            return
        answers = {"semantic": score.semantic, "quality": score.quality}
        self.append_row({"key": key, "reward": score.reward, **answers, "strict_pass": score.strict_pass})
        self._scores[key] = score

    def read_row(self, row: Any, where: str) -> None:
        try:
            answers = {name: tuple(row[name]) for name in ("semantic", "quality")}
            self._scores[row["key"]] = Score(reward=row["reward"], **answers, strict_pass=row["strict_pass"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where} is not the score of an image ({error!r}): delete {self.path}") from error
