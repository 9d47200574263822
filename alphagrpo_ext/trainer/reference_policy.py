# SPDX-License-Identifier: Apache-2.0

"""What a trainer asks of its reference model: to score rollouts, and to sample them where it is the one that does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from trl.trainer.utils import use_adapter

from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.objectives.base import ImageScores
from alphagrpo_ext.trainer.distributed import gathered_policy
from alphagrpo_ext.trainer.reference import REFERENCE_ADAPTER, visiting


class ReferencePolicyMixin:
    """Has a trainer's reference score its rollouts and, with `rollout_policy="reference"`, sample them."""

    @property
    def _reference_samples(self) -> bool:
        """Whether the reference samples the rollout; in evaluation the policy does."""
        return self.args.rollout_policy == "reference" and self.model.training

    @contextmanager
    def _reference(self) -> Iterator[torch.nn.Module]:
        """A model of its own or, for the time of the block, the policy with the reference's adapter or with none."""
        if self.ref_model is not None:
            with self._at_hand(self.ref_model):
                yield self.ref_model
            return
        policy = self.accelerator.unwrap_model(self.model)
        name = REFERENCE_ADAPTER if REFERENCE_ADAPTER in policy.peft_config else None
        with use_adapter(policy, adapter_name=name):
            yield self.model

    @contextmanager
    def _sampling_policy(self) -> Iterator[UnifiedModel]:
        """Who samples a rollout, unwrapped and with whole parameters; see [`gathered_policy`]."""
        with self._reference() if self._reference_samples else nullcontext(self.model) as model:
            wrapped = self.model_wrapped if model is self.model else model
            with gathered_policy(wrapped, self.accelerator, self.args.gradient_checkpointing_kwargs) as policy:
                yield policy

    @torch.no_grad()
    def _score_reference(self, length: int) -> tuple[torch.Tensor, list[ImageScores | None]]:
        """
        A rollout as the reference sees it, where TRL does not ask for that: log-probabilities `(trajectories, length)`, and
        what is scored of images.
        """
        with self._reference() as model:
            log_probs, _, _ = self._get_per_token_logps_and_entropies(
                model, None, None, length, self._scoring_chunk_size()
            )
        scored, self._scored_images = self._scored_images, []
        return log_probs, scored

    def _at_hand(self, model: torch.nn.Module | None) -> AbstractContextManager[None]:
        """For the time of its use, a reference model that lives in the host's memory is on the accelerator."""
        if self.args.offload_ref_model and model is not None and model is self.ref_model:
            return visiting(model, self.accelerator.device)
        return nullcontext()
