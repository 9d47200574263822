# SPDX-License-Identifier: Apache-2.0

"""
The guard of understanding: how many yes/no questions about held-out scenes of the shapes world a policy answers right, before and
after a run that may train something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from alphagrpo_ext.files import read_text, write_text
from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.shapes.answering import question_rows
from reward_models.evaluation.statistics import paired_difference
from reward_models.judges.yes_no import DEFAULT_MIN_ANSWER_MASS


BEFORE_NAME = "answers.json"
"""File of the answers before training, which a run that resumes reads."""
_BATCH_SIZE = 60


@torch.no_grad()
def answers_right(policy: UnifiedModel, processor: UnifiedProcessor, num_questions: int) -> list[bool]:
    """
    Whether a policy answers questions right, as it judges its own images: the likelier of yes and no counts, without a thought and
    without sampling. An answer is wrong if both hold less than half of the probability.

    Several processes share the work, and each of them returns all answers.

    Args:
        policy ([`UnifiedModel`]): The policy, unwrapped and with whole parameters.
        processor ([`UnifiedProcessor`]): Its processor.
        num_questions (`int`): Questions of the split `"evaluation"`, always the same, and yes equally often as no.
    """
    state = PartialState()
    rows = question_rows("evaluation", num_questions, seed=0)
    words = [processor.text_segment(word) for word in ("yes", "no")]
    own = []
    for start in range(state.process_index * _BATCH_SIZE, num_questions, state.num_processes * _BATCH_SIZE):
        batch = rows[start : start + _BATCH_SIZE]
        contexts = [
            [processor.looked_at(row["image"], policy), processor.text_segment(row["prompt"])] for row in batch
        ]
        scores = policy.text_log_probs(
            [context for context in contexts for _ in words], [word for _ in contexts for word in words]
        )
        chances = torch.stack([score.float().sum().exp().cpu() for score in scores]).view(-1, 2)
        for index, ((yes, no), row) in enumerate(zip(chances.tolist(), batch, strict=True), start):
            is_answer = yes + no >= DEFAULT_MIN_ANSWER_MASS
            own.append((index, is_answer and (yes >= no) == (row["solution"] == "yes")))
    return [right for _, right in sorted(gather_object(own))]


def answers_once(path: Path, digest: str, reuse: bool, answer: Callable[[], list[bool]]) -> list[bool]:
    """
    Read answers from a file, or make them and keep them there. The main process reads and writes.

    Args:
        path (`Path`): The file.
        digest (`str`): Digest of what the answers depend on.
        reuse (`bool`): Whether answers in the file may be used, because the run resumes an earlier one.
        answer (`Callable[[], list[bool]]`): Makes the answers.
    """
    state = PartialState()
    kept: list[Any] = [None]
    if reuse and state.is_main_process and path.is_file():
        found = json.loads(read_text(path))
        kept = [found["right"] if found["digest"] == digest else None]
    if state.num_processes > 1:
        # Either all processes answer, or none does.
        broadcast_object_list(kept)
    if kept[0] is not None:
        return kept[0]
    right = answer()
    if state.is_main_process:
        write_text(path, json.dumps({"digest": digest, "right": right}) + "\n")
    return right


@dataclass(frozen=True)
class AnswerChange:
    """
    Which questions were answered right before and after training.

    Args:
        before, after (`Sequence[bool]`): One for each question.
    """

    before: Sequence[bool]
    after: Sequence[bool]

    def summary(self) -> dict[str, float]:
        """For `summary.json`: both shares of right answers, and the difference with its 95% interval."""
        count = len(self.before)
        change = paired_difference(range(count), [new - old for old, new in zip(self.before, self.after, strict=True)])
        return {
            "num_questions": count,
            "before": sum(self.before) / count,
            "after": sum(self.after) / count,
            "change_low": change.difference.low,
            "change_high": change.difference.high,
            "p_value": change.p_value,
        }

    def __str__(self) -> str:
        values = self.summary()
        change = 100 * (values["after"] - values["before"])
        bounds = [values["change_low"], values["change_high"]]
        interval = "" if None in bounds else f" [{100 * bounds[0]:+.1f}, {100 * bounds[1]:+.1f}]"
        return (
            f"yes/no questions about held-out scenes answered right, of {values['num_questions']}: {values['before']:.1%} -> "
            f"{values['after']:.1%}, {change:+.1f} points{interval}, p {values['p_value']:.2f}"
        )
