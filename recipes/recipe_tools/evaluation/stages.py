# SPDX-License-Identifier: Apache-2.0

"""The stages of an evaluation: first images, and rounds of reflection that refine them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


PAINTING, EDITING, ANSWERING = "reasoning_t2i", "image_editing", "visual_question_answering"
"""Tasks that can be evaluated."""

DIRECT, THOUGHT, REFINE = "direct", "thought", "refine"
"""Modes: an image without a thought, after a thought, and after a thought and rounds of reflection."""


@dataclass(frozen=True)
class EvaluationStage:
    """
    One way of painting, in which all prompts are painted once.

    Args:
        mode (`str`): Name of the stage in files and tables.
        task (`str`): Name in `TASKS`.
        think (`bool`): Whether the policy writes a thought before it paints.
        source ([`EvaluationStage`], *optional*): The stage whose images are refined.
    """

    mode: str
    task: str
    think: bool
    source: EvaluationStage | None = None

    @property
    def lineage(self) -> list[EvaluationStage]:
        """The stages that led to this one, which is the last."""
        return [*(self.source.lineage if self.source else []), self]


def make_stages(task: str, modes: Collection[str], num_rounds: int) -> list[EvaluationStage]:
    """List the stages of an evaluation, each after the one whose images it refines."""
    stages = [EvaluationStage(DIRECT, task, think=False)] if DIRECT in modes else []
    if THOUGHT in modes or REFINE in modes:
        stages.append(EvaluationStage(THOUGHT, task, think=True))
    for turn in range(1, num_rounds + 1):
        stages.append(EvaluationStage(f"round {turn}", "self_reflection", think=True, source=stages[-1]))
    return stages
