# SPDX-License-Identifier: Apache-2.0

"""A vision-language model of Transformers, in this process, finds prompts likely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from alphagrpo_ext.models.fingerprint import frozen_model_settings
from reward_models.likelihood.arguments import LikelihoodArguments
from reward_models.likelihood.base import LIKELIHOOD_SCORERS, LikelihoodScorer, PolicyLoader


@LIKELIHOOD_SCORERS.register("transformers")
class TransformersScorer(LikelihoodScorer):
    """
    An image-text-to-text model. The image and the instruction are the user's turn in its chat template, and the answer is the
    reply. The template's generation prompt and the answer are encoded apart, so that the tokens of a prompt do not depend on
    what precedes it.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        processor ([`~transformers.ProcessorMixin`]): Its processor.
        prefix, instruction, batch_size: As in [`LikelihoodScorer`].
    """

    default_instruction = "Describe the image."

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        prefix: str = "",
        instruction: str | None = None,
        batch_size: int = 16,
    ) -> None:
        super().__init__(processor.tokenizer, prefix, instruction, batch_size)
        self.model = model.requires_grad_(False).eval()
        self.processor = processor

    @classmethod
    def from_arguments(cls, args: LikelihoodArguments, policy: PolicyLoader | None = None) -> TransformersScorer:
        if args.likelihood_model is None:
            raise ValueError(
                "likelihood_scorer 'transformers' needs likelihood_model: the name or folder of a vision-language model"
            )
        if args.likelihood_context != "vit":
            raise ValueError(
                f"likelihood_context={args.likelihood_context!r} is for unified models: leave it out with the scorer "
                "'transformers'"
            )
        processor = AutoProcessor.from_pretrained(args.likelihood_model)
        model = AutoModelForImageTextToText.from_pretrained(args.likelihood_model, dtype="auto")
        model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
        settings = (args.likelihood_prefix, args.likelihood_instruction, args.likelihood_batch_size)
        return cls(model, processor, *settings)

    @property
    def run_settings(self) -> dict[str, Any]:
        reward_model = frozen_model_settings(self.model, self.processor)
        return {**super().run_settings, "model": self.model.config._name_or_path, "reward_model": reward_model}

    @torch.inference_mode()
    def answer_log_probs(self, images: Sequence[Image.Image], answers: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        inputs, ids = self._inputs(images, answers)
        width = ids.shape[1]
        logits = self.model(**inputs, use_cache=False, logits_to_keep=width + 1).logits[:, :-1]
        # One row at a time, because a whole batch of logits in fp32 would double their memory.
        return [
            row[: len(own)].float().log_softmax(dim=-1).gather(1, target[: len(own), None])[:, 0]
            for row, target, own in zip(logits, ids, answers, strict=True)
        ]

    def _inputs(
        self, images: Sequence[Image.Image], answers: Sequence[Sequence[int]]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """
        Inputs of the model with one row per image, and the ids of the answers `(images, longest answer)`. Rows are padded on the
        left before the image, and on the right after the answer.
        """
        content: list[dict[str, str]] = [{"type": "image"}]
        if self.instruction:
            content.append({"type": "text", "text": self.instruction})
        message = [{"role": "user", "content": content}]
        head = self.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        batch = self.processor(
            images=[[image] for image in images],
            text=[head] * len(images),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        rows = [torch.tensor(own, dtype=torch.long) for own in answers]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        shape = batch["input_ids"].shape
        added = {"input_ids": ids, "attention_mask": mask}
        for name, value in batch.items():
            if value.shape == shape:
                # Other values per token are types, of which 0 is that of a text.
                batch[name] = torch.cat([value, added.get(name, torch.zeros_like(ids)).to(value.dtype)], dim=1)
        batch = batch.to(self.model.device, dtype=self.model.dtype)
        return dict(batch), ids.to(self.model.device)
