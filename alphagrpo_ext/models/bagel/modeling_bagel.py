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
from alphagrpo_ext.models.bagel.packing import pack_trajectories
from alphagrpo_ext.models.contract import PackedBatch, PackedOutput, SampledText, UnifiedModel
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
        one = isinstance(guidance, GuidanceConfig)
        made = self.guidance(guidance) if one else [self.guidance(settings) for settings in guidance]
        return pack_trajectories(trajectories, made, self.config)

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
        **images: torch.Tensor,
    ) -> PackedOutput:
        """
        Score whole trajectories; see [`collate_sequences`] and [`pack_trajectories`] for the inputs.

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
        """
        if self.work is not None:
            kind = "training" if torch.is_grad_enabled() else "scoring"
            self.work.count(kind, int((blocks != PADDING_BLOCK).sum()), blocks.numel())
        und, gen = self.embed_sequences({"input_ids": input_ids, **images})
        attributes = {"positions": positions, "blocks": blocks, "horizons": horizons}
        is_flex = self.config.text_config._attn_implementation == "flex_attention"
        if buckets is not None and velocity_index is not None and context_gradient == "detached":
            layout = PackedLayout.from_inputs({"buckets": buckets, **attributes})
            und, gen = self._run_detached(und, gen, positions, layout, len(score_index) > 0)
        else:
            if buckets is not None and not is_flex:
                mask = PackedLayout.from_inputs({"buckets": buckets, **attributes})
            else:
                mask = (visibility_block_mask if is_flex else visibility_mask)(**attributes, sequence_ids=sequence_ids)
            und, gen = self.language_model.model(und, gen, positions, mask)
        head, scored = self.language_model.lm_head, und.flatten(0, 1)[score_index]
        if isinstance(head, BaseTunerLayer):
            # An adapter around the head returns logits alone.
            log_probs, entropies = score_tokens(head, scored, score_targets, head.out_features, temperature)
        else:
            log_probs, entropies = head(scored, score_targets, temperature)
        velocities = None
        if velocity_index is not None:
            velocities = self.llm2vae(gen.flatten(0, 1)[velocity_index]).float()
        return PackedOutput(log_probs, entropies, velocities)

    def _run_detached(
        self, und: torch.Tensor, gen: torch.Tensor, positions: torch.Tensor, layout: PackedLayout, has_scores: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Run contexts first, with gradient if they have sampled texts, and then copies over detached keys and values of
        the contexts.
        """
        contexts = layout.contexts_alone()
        parts = (contexts, layout.copies_alone(contexts.states))
        und_sizes, gen_sizes = [part.num_und for part in parts], [part.num_gen for part in parts]
        und_positions, gen_positions = positions.split([und.shape[1], gen.shape[1]], dim=1)
        split = [
            *(x.split(und_sizes, dim=1) for x in (und, und_positions)),
            *(x.split(gen_sizes, dim=1) for x in (gen, gen_positions)),
        ]
        outputs = []
        for part, has_gradient, *tensors in zip(parts, (has_scores, True), *split, strict=True):
            und_part, und_positions_part, gen_part, gen_positions_part = tensors
            with torch.set_grad_enabled(has_gradient and torch.is_grad_enabled()):
                outputs.append(
                    self.language_model.model(
                        und_part,
                        gen_part if part.num_gen else None,
                        torch.cat([und_positions_part, gen_positions_part], dim=1),
                        part,
                    )
                )
        und_outputs, gen_outputs = zip(*outputs, strict=True)
        return torch.cat(und_outputs, dim=1), torch.cat([x for x in gen_outputs if x is not None], dim=1)
