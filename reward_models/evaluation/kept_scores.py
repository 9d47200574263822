# SPDX-License-Identifier: Apache-2.0

"""Scores of images in a file, so that a scoring that was killed asks no question twice."""

from __future__ import annotations

import os
from typing import Any

from reward_models.dvreward import Score
from reward_models.files.json_lines_file import JsonLinesFile


class KeptScores(JsonLinesFile):
    """
    A line an image, by a key that says all that its score depends on; see
    [`~reward_models.evaluation.files.settings_digest`]. Lines with keys that nobody asks for any more do no harm.

    Args:
        path (`str` or `PathLike`): The file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._scores: dict[str, Score] = {}

    def get(self, key: str) -> Score | None:
        """The score that was kept."""
        return self._scores.get(key)

    def keep(self, key: str, score: Score) -> None:
        """Write a score, unless the judge failed: then it is to be asked again."""
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
