# SPDX-License-Identifier: Apache-2.0

"""The policy as its own judge: its understanding side answers questions about the images that it has painted."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.ranges import check_number
from reward_models.judges.arguments import JudgeArguments
from reward_models.judges.base import JUDGES, Judge
from reward_models.judges.yes_no import yes_no_token_ids, yes_probability_of_logits


@JUDGES.register("policy")
class PolicyJudge(Judge):
    """
    Asks a unified model about its own images, without a second model or a server. Questions are asked without an
    instruction around them, as unified models are taught. An image is read once for all its questions.

    The judge changes as the policy learns. It needs whole weights in this process, so it works with one process, DDP
    and ZeRO up to stage 2, but not with sharded parameters.

    Args:
        model ([`UnifiedModel`]): The policy, unwrapped.
        processor ([`UnifiedProcessor`]): Its processor.
        batch_size (`int`, *optional*, defaults to `32`): Number of questions per forward.
    """

    def __init__(self, model: UnifiedModel, processor: UnifiedProcessor, batch_size: int = 32) -> None:
        check_number("batch_size", batch_size, "[1, inf)")
        self.model = model
        self.processor = processor
        self.batch_size = batch_size
        self.yes_ids, self.no_ids = yes_no_token_ids(processor.tokenizer)

    @classmethod
    def from_arguments(cls, args: JudgeArguments, policy: Any = None) -> PolicyJudge:
        if policy is not None:
            return cls(*policy, batch_size=args.judge_batch_size)
        if args.judge_model is None:
            raise ValueError("judge 'policy' needs judge_model, a unified model, where none is trained")
        model, processor = load_model(args.judge_model)
        model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu").eval()
        return cls(model, processor, batch_size=args.judge_batch_size)

    async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
        return await asyncio.to_thread(self.probabilities, image, list(questions))

    def probabilities(self, image: Image.Image, questions: Sequence[str]) -> list[float]:
        """P(yes) of each question, computed in this thread."""
        pixel_values = self.processor.question_pixels(image)
        segments = [self.processor.text_segment(question) for question in questions]
        result: list[float] = []
        for start in range(0, len(segments), self.batch_size):
            logits = self.model.answer_logits(pixel_values, segments[start : start + self.batch_size])
            result += yes_probability_of_logits(logits, self.yes_ids, self.no_ids)
        return result
