# SPDX-License-Identifier: Apache-2.0

"""
A judge in this process: a vision-language model of Transformers.

Whether the questions about an image can share its prefix is tested, not configured. The judge answers the first image in
both ways. If P(yes) differs, or if the model cannot continue from a cache, it uses padded batches.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from alphagrpo_ext.images import to_rgb
from reward_models.judges.arguments import JudgeArguments
from reward_models.judges.base import JUDGES
from reward_models.judges.local import LocalJudge
from reward_models.judges.yes_no import DEFAULT_MIN_ANSWER_MASS, QUESTION_PROMPT, YesNo, answer_start


logger = logging.getLogger(__name__)

SHARING_TOLERANCE, LOW_PRECISION_TOLERANCE = 1e-3, 0.05
"""Largest difference of P(yes) at which sharing a prefix counts as exact, in fp32 and in lower precision."""

MAX_LEAD_TOKENS = 8
"""Number of tokens that may precede the yes or no."""


@JUDGES.register("transformers")
class TransformersJudge(LocalJudge):
    """
    Asks a vision-language model in this process. P(yes) comes from the next-token distribution over the whole vocabulary,
    summed over all spellings of yes and of no, at the first word of the answer.

    All questions about an image are answered in one forward pass that encodes the image once: the common prefix of the
    questions is computed alone, and its cache is shared. A model that does not support this gets padded batches.

    Images are processed one after the other in a thread of the judge, so that the event loop is never blocked.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            An image-text-to-text model.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        batch_size (`int`, *optional*, defaults to `32`):
            Questions per batch.
        min_answer_mass (`float`, *optional*, defaults to `0.5`):
            As in [`LocalJudge`].

    Raises:
        `ValueError`: If an argument is out of range, or the vocabulary has no single token for yes or for no.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        batch_size: int = 32,
        min_answer_mass: float = DEFAULT_MIN_ANSWER_MASS,
    ) -> None:
        super().__init__(model.requires_grad_(False).eval(), processor, batch_size, min_answer_mass)
        # None until two questions about an image have been answered in both ways.
        self._shares_prefix: bool | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge")

    @classmethod
    def from_arguments(cls, args: JudgeArguments, policy: Any = None) -> TransformersJudge:
        if args.judge_model is None:
            raise ValueError("judge 'transformers' needs judge_model: the name or folder of a vision-language model")
        processor = AutoProcessor.from_pretrained(args.judge_model)
        model = AutoModelForImageTextToText.from_pretrained(args.judge_model, dtype="auto")
        model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
        return cls(model, processor, args.judge_batch_size, args.judge_min_answer_mass)

    @property
    def run_settings(self) -> dict[str, Any]:
        return {**super().run_settings, "prompt": QUESTION_PROMPT}

    async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
        loop = asyncio.get_running_loop()
        readings = await loop.run_in_executor(self._thread, self.readings, image, list(questions))
        return self.accept(questions, readings)

    @torch.inference_mode()
    def readings(self, image: Image.Image, questions: Sequence[str]) -> list[YesNo]:
        result: list[YesNo] = []
        for start in range(0, len(questions), self.batch_size):
            result += self._read_batch(image, questions[start : start + self.batch_size])
        return result

    def _read_batch(self, image: Image.Image, questions: Sequence[str]) -> list[YesNo]:
        """Read the first word of each answer. Where a tag, a box or a line break comes first, the model continues from it."""
        leads = [""] * len(questions)
        result = self._answer_batch(self._inputs(image, questions, leads))
        for _ in range(MAX_LEAD_TOKENS):
            rows = [row for row, reading in enumerate(result) if self._precedes_answer(leads[row], reading)]
            if not rows:
                break
            for row in rows:
                leads[row] += result[row].token
            inputs = self._inputs(image, [questions[row] for row in rows], [leads[row] for row in rows])
            for row, reading in zip(rows, self._answer_batch(inputs), strict=True):
                result[row] = reading
        return result

    def _precedes_answer(self, lead: str, reading: YesNo) -> bool:
        if reading.answer(self.min_answer_mass) is not None or reading.token == self.processor.tokenizer.eos_token:
            return False
        text = lead + reading.token
        return bool(reading.token) and answer_start(text) == len(text)

    def _inputs(self, image: Image.Image, questions: Sequence[str], leads: Sequence[str]) -> dict[str, torch.Tensor]:
        """
        Model inputs with one row per question, padded on the left: `input_ids` of shape `(questions, tokens)` etc. A lead is
        what the model has begun to answer.
        """
        texts = []
        for question, lead in zip(questions, leads, strict=True):
            content = [{"type": "image"}, {"type": "text", "text": QUESTION_PROMPT.format(question=question)}]
            message = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            texts.append(text + lead)
        batch = self.processor(
            images=[[to_rgb(image)]] * len(texts),
            text=texts,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        return dict(batch.to(self.model.device, dtype=self.model.dtype))

    def _answer_batch(self, inputs: dict[str, torch.Tensor]) -> list[YesNo]:
        if len(inputs["input_ids"]) == 1 or self._shares_prefix is False:
            return self._padded(inputs)
        if self._shares_prefix:
            return self._shared(inputs)
        expected = self._padded(inputs)
        try:
            actual = self._shared(inputs)
            error = max(abs(a.p_yes - b.p_yes) for a, b in zip(actual, expected, strict=True))
            is_exact = self.model.dtype == torch.float32
            self._shares_prefix = error <= (SHARING_TOLERANCE if is_exact else LOW_PRECISION_TOLERANCE)
            reason = f"its answers would change by {error:.3g}"
        except Exception as cause:
            # Padded batches work with every model, so no error here is fatal.
            self._shares_prefix, reason = False, f"{type(cause).__name__}: {cause}"
        if not self._shares_prefix:
            logger.info("%s encodes the image once per question (%s)", type(self.model).__name__, reason)
        return expected

    def _padded(self, inputs: dict[str, torch.Tensor]) -> list[YesNo]:
        logits = self.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        return self.read_logits(logits)

    def _shared(self, inputs: dict[str, torch.Tensor]) -> list[YesNo]:
        rows = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        num_rows, width = inputs["input_ids"].shape
        # The second forward pass needs at least one token of every question.
        shortest = min(len(row) for row in rows) - 1
        equal = torch.stack([row[:shortest] for row in rows]).eq(rows[0][:shortest]).all(dim=0)
        length = int(equal.long().cumprod(dim=0).sum())
        pads = width - len(rows[0])
        prefix = {
            # All rows have the same image, so the first row's share of the image inputs is enough.
            name: value[:1, pads : pads + length]
            if value.shape[:2] == (num_rows, width)
            else value[: len(value) // num_rows]
            for name, value in inputs.items()
        }
        cache = self.model(**prefix, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(num_rows)
        suffixes = [row[length:] for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(suffixes, batch_first=True)
        last = torch.tensor([len(suffix) - 1 for suffix in suffixes], device=ids.device)
        # Causal attention hides the padding, which comes last, and the model computes the positions itself.
        logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        return self.read_logits(logits[torch.arange(num_rows), last])

    async def aclose(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge")
