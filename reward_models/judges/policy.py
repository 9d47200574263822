# SPDX-License-Identifier: Apache-2.0

"""The policy as its own judge: its understanding side answers questions about the images that it has painted."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from alphagrpo_ext.models.loading import load_model
from reward_models.judges.arguments import JudgeArguments
from reward_models.judges.base import JUDGES
from reward_models.judges.local import LocalJudge
from reward_models.judges.yes_no import YesNo


@JUDGES.register("policy")
class PolicyJudge(LocalJudge):
    """
    Asks a unified model about its own images, without a second model or a server. Questions are asked without an
    instruction around them, as unified models are taught. An image is read once for all its questions.

    The judge changes as the policy learns, unless `judge_model` names a model: that one is loaded beside the policy and stays as
    it is. The judge needs whole weights in this process, so it works with one process, DDP
    and ZeRO up to stage 2, but not with sharded parameters.

    Args:
        model ([`UnifiedModel`]): The policy, unwrapped.
        processor ([`UnifiedProcessor`]): Its processor.
        batch_size (`int`, *optional*, defaults to `32`): Number of questions per forward.
        min_answer_mass (`float`, *optional*, defaults to `0.5`): As in [`LocalJudge`].
    """

    @classmethod
    def from_arguments(cls, args: JudgeArguments, policy: Any = None) -> PolicyJudge:
        if args.judge_model is not None:
            model, processor = load_model(args.judge_model)
            model.requires_grad_(False).to(
                torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
            ).eval()
        elif policy is not None:
            model, processor = policy
        else:
            raise ValueError("judge 'policy' needs judge_model, a unified model, where none is trained")
        return cls(model, processor, args.judge_batch_size, args.judge_min_answer_mass)

    async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
        return self.accept(questions, await asyncio.to_thread(self.readings, image, list(questions)))

    def readings(self, image: Image.Image, questions: Sequence[str]) -> list[YesNo]:
        pixel_values = self.processor.question_pixels(image)
        segments = [self.processor.text_segment(question) for question in questions]
        result: list[YesNo] = []
        for start in range(0, len(segments), self.batch_size):
            logits = self.model.answer_logits(pixel_values, segments[start : start + self.batch_size])
            result += self.read_logits(logits)
        return result
