# SPDX-License-Identifier: Apache-2.0

"""
The policy as it was before training finds prompts likely.

It is frozen, so that the policy cannot raise its reward by learning to write captions. A policy that is trained by an adapter
needs no copy: its adapter is switched off while it scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch.distributed.tensor import DTensor

from alphagrpo_ext.models.adapters import adapters_switched_off, base_name
from alphagrpo_ext.models.fingerprint import frozen_model_settings
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.trajectory import Segment, TextSegment
from reward_models.likelihood.arguments import LikelihoodArguments
from reward_models.likelihood.base import LIKELIHOOD_SCORERS, LikelihoodScorer, PolicyLoader


@LIKELIHOOD_SCORERS.register("policy")
class PolicyScorer(LikelihoodScorer):
    """
    A unified model, with its adapters switched off. The image, the instruction if there is one, and the answer are laid out as
    for a question about an image.

    It needs whole weights in this process, so it works with one process, DDP and ZeRO up to stage 2. An adapter must not be in
    use while it scores, e.g. by a judge that asks the same model in another thread.

    Args:
        model ([`UnifiedModel`]): The model, unwrapped. Nothing else may train it, except its adapters.
        processor ([`UnifiedProcessor`]): Its processor.
        context (`str`, *optional*, defaults to `"vit"`):
            `"vit"` shows the image through the vision tower alone, as for a question. `"vae_vit"` shows it as a refinement
            does, with its latents, where texts of the family read them.
        prefix, instruction, batch_size: As in [`LikelihoodScorer`].

    Raises:
        `ValueError`: If a model without vision tower is to look through it.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        context: str = "vit",
        prefix: str = "",
        instruction: str | None = None,
        batch_size: int = 16,
    ) -> None:
        super().__init__(processor.tokenizer, prefix, instruction, batch_size)
        if context == "vit" and processor.look(Image.new("RGB", (64, 64))) is None:
            raise ValueError(
                f"likelihood_context='vit' needs a vision tower, which {type(model).__name__} does not have: set it to 'vae_vit'"
            )
        self.model = model
        self.processor = processor
        self.context = context

    @classmethod
    def from_arguments(cls, args: LikelihoodArguments, policy: PolicyLoader | None = None) -> PolicyScorer:
        if args.likelihood_model is not None:
            model, processor = load_model(args.likelihood_model)
            model.requires_grad_(False).to(
                torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
            ).eval()
        elif policy is not None:
            model, processor = policy()
        else:
            raise ValueError(
                "likelihood_scorer 'policy' needs likelihood_model, a unified model, where none is trained"
            )
        settings = (args.likelihood_prefix, args.likelihood_instruction, args.likelihood_batch_size)
        return cls(model, processor, args.likelihood_context, *settings)

    @property
    def run_settings(self) -> dict[str, Any]:
        reward_model = frozen_model_settings(self.model, self.processor)
        own = {"model": base_name(self.model)[0], "context": self.context, "reward_model": reward_model}
        return {**super().run_settings, **own}

    def encode(self, text: str) -> list[int]:
        return self.processor.text_segment(text).token_ids

    @torch.no_grad()
    def answer_log_probs(self, images: Sequence[Image.Image], answers: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in self.model.parameters()):
            raise ValueError(
                "likelihood_scorer 'policy' needs whole weights, but those of the policy are sharded: use an Accelerate "
                "configuration that does not shard parameters, e.g. recipes/accelerate_configs/zero2.yaml"
            )
        request: list[Segment] = [self.processor.text_segment(self.instruction)] if self.instruction else []
        show = self.processor.looked_at if self.context == "vit" else self.processor.image_segment
        contexts = [[show(image, self.model), *request] for image in images]
        with adapters_switched_off(self.model):
            return self.model.text_log_probs(contexts, [TextSegment(list(ids)) for ids in answers])
