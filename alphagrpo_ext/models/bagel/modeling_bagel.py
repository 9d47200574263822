# SPDX-License-Identifier: Apache-2.0

"""BAGEL behind the contract of model families: packing, scoring and generation with the parts of [`BagelNetwork`]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.bagel import generation
from alphagrpo_ext.models.bagel.attention import PackedLayout, visibility_block_mask
from alphagrpo_ext.models.bagel.cache import BagelCache
from alphagrpo_ext.models.bagel.guidance import BRANCHES, BagelGuidance
from alphagrpo_ext.models.bagel.layout import PADDING_BLOCK, patchify, unpatchify, visibility_mask
from alphagrpo_ext.models.bagel.network import BagelNetwork
from alphagrpo_ext.models.bagel.packing import pack_parts, pack_trajectories
from alphagrpo_ext.models.contract import (
    PackedBatch,
    PackedOutput,
    PackedParts,
    ReadContexts,
    SampledText,
    UnifiedModel,
)
from alphagrpo_ext.models.token_scores import score_tokens
from alphagrpo_ext.trajectory import Segment, TextSegment, Trajectory


class BagelModel(BagelNetwork, UnifiedModel):
    """
    BAGEL. The forward scores whole trajectories, and [`BagelModel.pack`] makes its inputs. `prefill`, `sample_text` and
    `predict_velocity` generate.

    Args:
        config ([`BagelConfig`]): Sizes of every part.
    """

    branches = BRANCHES

    def vision_size(self, height: int, width: int) -> tuple[int, int]:
        patch_size = self.config.vision_config.patch_size
        return height // patch_size * patch_size, width // patch_size * patch_size

    def guidance(self, settings: GuidanceConfig) -> BagelGuidance:
        return BagelGuidance(settings)

    def num_positions(self, segments: Sequence[Segment]) -> int:
        # A text takes a position for each delimiter, an image one for its latents and one for its vision block.
        return sum(len(s.content_ids) + 2 if isinstance(s, TextSegment) else 2 for s in segments)

    def text_slots(self, max_new_tokens: int) -> int:
        return max_new_tokens + 2

    def image_slots(self, grid: tuple[int, int]) -> int:
        return grid[0] * grid[1] + 2

    @property
    def latent_downsample(self) -> int:
        return self.config.latent_downsample

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def max_latent_size(self) -> int:
        return self.config.max_latent_size

    @property
    def max_positions(self) -> int:
        return self.config.text_config.max_position_embeddings

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        # The mean, where the reference samples, so that a rollout and its packed forward see the same latents.
        latents = self.vae.encode(images.to(self.vae.dtype)).latent_dist.mean
        latents = self.vae.config.scaling_factor * (latents.float() - self.vae.config.shift_factor)
        return patchify(latents, self.config.latent_patch_size)

    def decode_latents(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        latents = unpatchify(latents, grid, self.config.latent_patch_size)
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()

    def prefill(
        self,
        contexts: Sequence[Sequence[Segment]],
        group_size: int = 1,
        capacity: int = 0,
        past: BagelCache | None = None,
    ) -> BagelCache:
        return generation.prefill(self, contexts, group_size, capacity, past)

    def sample_text(
        self, cache: BagelCache, uniforms: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
    ) -> SampledText:
        return generation.sample_text(self, cache, uniforms, temperature, top_k, top_p)

    def predict_velocity(
        self, cache: BagelCache, latents: torch.Tensor, grid: tuple[int, int], timestep: torch.Tensor
    ) -> torch.Tensor:
        return generation.predict_velocity(self, cache, latents, grid, timestep)

    def answer_logits(self, pixel_values: torch.Tensor, questions: Sequence[TextSegment]) -> torch.Tensor:
        return generation.answer_logits(self, pixel_values, questions)

    def pack(
        self, trajectories: Sequence[Trajectory], guidance: GuidanceConfig | Sequence[GuidanceConfig]
    ) -> PackedBatch:
        return pack_trajectories(trajectories, self._each_guidance(guidance), self.config)

    def _each_guidance(
        self, settings: GuidanceConfig | Sequence[GuidanceConfig]
    ) -> BagelGuidance | list[BagelGuidance]:
        is_shared = isinstance(settings, GuidanceConfig)
        return self.guidance(settings) if is_shared else [self.guidance(own) for own in settings]

    def pack_parts(
        self,
        trajectories: Sequence[Trajectory],
        guidance: GuidanceConfig | Sequence[GuidanceConfig],
        steps_per_part: int,
    ) -> PackedParts:
        return pack_parts(trajectories, self._each_guidance(guidance), self.config, steps_per_part)

    def with_all_parts(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if "vit_patches" in inputs:
            return inputs
        vision = self.config.vision_config
        place = torch.zeros(1, 1, dtype=torch.long)
        return {
            **inputs,
            # One patch that is padding: the vision tower runs, and its output is not used.
            "vit_patches": torch.zeros(1, 1, vision.num_channels * vision.patch_size**2),
            "vit_position_ids": place,
            "vit_mask": torch.zeros(1, 1, dtype=torch.bool),
            "vit_image": place[0],
            "vit_index": place,
        }

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        blocks: torch.Tensor,
        horizons: torch.Tensor,
        score_index: torch.Tensor,
        score_targets: torch.Tensor,
        sequence_ids: torch.Tensor | None = None,
        buckets: torch.Tensor | None = None,
        velocity_index: torch.Tensor | None = None,
        temperature: float | torch.Tensor = 1.0,
        context_gradient: str = "exact",
        keep_contexts: bool = False,
        contexts: ReadContexts | None = None,
        **images: torch.Tensor,
    ) -> PackedOutput:
        """
        Score whole trajectories; see [`collate_sequences`], [`pack_trajectories`] and [`pack_parts`] for the inputs.

        Args:
            score_index (`torch.Tensor` of shape `(scores,)`):
                Places in the flattened `input_ids` whose next token was sampled.
            score_targets (`torch.Tensor` of shape `(scores,)`): The sampled tokens.
            sequence_ids (`torch.Tensor` of shape `(1, und + gen)`, *optional*):
                The sequence of every token, if sequences are concatenated.
            buckets (`torch.Tensor` of shape `(buckets, 5)`, *optional*):
                How sequences are concatenated, one [`Bucket`] per line. Without it, attention uses a mask of all
                pairs.
            velocity_index (`torch.Tensor` of shape `(copies, tokens)`, *optional*):
                Places of noised latents in the flattened latents.
            temperature (`float`, *optional*, defaults to `1.0`): Temperature at which the tokens were sampled.
            context_gradient (`str`, *optional*, defaults to `"exact"`):
                With `"detached"`, noised copies have no gradient through their context.
            keep_contexts (`bool`, *optional*, defaults to `False`):
                Whether the batch has contexts alone, whose keys and values are returned.
            contexts ([`ReadContexts`], *optional*): What that returned, for a batch of noised copies alone.
        """
        und, gen = self.embed_sequences({"input_ids": input_ids, **images})
        attributes = {"positions": positions, "blocks": blocks, "horizons": horizons}
        is_flex = self.config.text_config._attn_implementation == "flex_attention"
        is_detached = context_gradient == "detached" and velocity_index is not None
        layout = None
        if buckets is not None and (not is_flex or is_detached or keep_contexts or contexts is not None):
            layout = PackedLayout.from_inputs({"buckets": buckets, **attributes})
        if self.work is not None:
            mask = blocks != PADDING_BLOCK if contexts is None else layout.copy_mask
            self.work.count("training" if torch.is_grad_enabled() else "scoring", int(mask.sum()), mask.numel())
        states = None
        if contexts is not None:
            _, gen, _ = self._run_part(und, gen, positions, layout, layout.copies_alone(), contexts.states)
            return PackedOutput(contexts.log_probs, contexts.entropies, self._velocities(gen, velocity_index))
        if keep_contexts:
            und, gen, states = self._run_part(und, gen, positions, layout, layout.contexts_alone())
        elif layout is not None and is_detached:
            und, gen = self._run_detached(und, gen, positions, layout, len(score_index) > 0)
        else:
            make_mask = visibility_block_mask if is_flex else visibility_mask
            mask = make_mask(**attributes, sequence_ids=sequence_ids) if layout is None else layout
            und, gen, _ = self.language_model.model(und, gen, positions, mask)
        head, scored = self.language_model.lm_head, und.flatten(0, 1)[score_index]
        if isinstance(head, BaseTunerLayer):
            # An adapter around the head returns logits alone.
            log_probs, entropies = score_tokens(head, scored, score_targets, head.out_features, temperature)
        else:
            log_probs, entropies = head(scored, score_targets, temperature)
        velocities = None if velocity_index is None else self._velocities(gen, velocity_index)
        return PackedOutput(log_probs, entropies, velocities, states)

    def _velocities(self, gen: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self.llm2vae(gen.flatten(0, 1)[index]).float()

    def _run_part(
        self,
        und: torch.Tensor,
        gen: torch.Tensor | None,
        positions: torch.Tensor,
        layout: PackedLayout,
        part: PackedLayout,
        context_states: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
        """Run embeddings of a part of a batch. `positions` are those of the whole, which has `layout`."""
        own_positions = part.take(*positions.tensor_split([layout.num_und], dim=1))
        return self.language_model.model(
            und,
            gen if part.num_gen else None,
            torch.cat(own_positions, dim=1),
            part,
            context_states=context_states,
        )

    def _run_detached(
        self, und: torch.Tensor, gen: torch.Tensor, positions: torch.Tensor, layout: PackedLayout, has_scores: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Run contexts first, with gradient if they have sampled texts, and then copies over detached keys and values of
        the contexts. Returns the states of contexts, and behind them those of copies.
        """
        contexts, copies = layout.contexts_alone(), layout.copies_alone()
        with torch.set_grad_enabled(has_scores and torch.is_grad_enabled()):
            context_und, context_gen, states = self._run_part(*contexts.take(und, gen), positions, layout, contexts)
        states = [state.detach() for state in states]
        copy_und, copy_gen, _ = self._run_part(*copies.take(und, gen), positions, layout, copies, states)
        und = torch.cat([context_und, copy_und], dim=1)
        return und, copy_gen if context_gen is None else torch.cat([context_gen, copy_gen], dim=1)
