# SPDX-License-Identifier: Apache-2.0

"""Cosmos3: an understanding stream with a vision tower, a generation stream, and the autoencoder of Wan2.2.

Its networks are those of Transformers' and Diffusers' Cosmos3, run so that they can be batched, cached and packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from alphagrpo_ext.flow.guidance import GuidanceConfig, PlainGuidance
from alphagrpo_ext.models.contract import (
    PackedBatch,
    PackedOutput,
    PackedParts,
    ReadContexts,
    SampledText,
    UnifiedModel,
)
from alphagrpo_ext.models.cosmos3 import generation
from alphagrpo_ext.models.cosmos3.chat_template import read_pieces
from alphagrpo_ext.models.cosmos3.generation import TAIL_SLOTS, Cosmos3Cache
from alphagrpo_ext.models.cosmos3.layout import LatentBlock, collate_latents
from alphagrpo_ext.models.cosmos3.network import Cosmos3Network
from alphagrpo_ext.models.cosmos3.packing import pack_conversation_parts, pack_conversations
from alphagrpo_ext.models.cosmos3.transformer import StreamStates
from alphagrpo_ext.models.cosmos3.vision import smart_size
from alphagrpo_ext.models.token_scores import score_tokens
from alphagrpo_ext.trajectory import Segment, TextSegment, Trajectory


MAX_LATENT_SIZE = 128
"""No table limits the size of an image. 4096 pixels per side are more than any released checkpoint was trained on."""


class Cosmos3Model(Cosmos3Network, UnifiedModel):
    """
    Cosmos3 of either variant, with all parts that texts and images need.

    The forward scores whole trajectories, and [`Cosmos3Model.pack`] makes its inputs. `prefill`, `sample_text` and
    `predict_velocity` generate.

    Args:
        config ([`Cosmos3Config`]): Sizes of every part, and the pieces of the chat template.
    """

    # The whole context, and one with the negative prompt as its only request.
    branches = ("full", "negative")
    max_latent_size = MAX_LATENT_SIZE

    @property
    def latent_downsample(self) -> int:
        return self.config.latent_downsample

    @property
    def max_positions(self) -> int:
        # Latents stand behind the context by a margin, each image at a time of its own.
        return self.config.max_position_embeddings - self.config.latent_margin - 1

    def guidance(self, settings: GuidanceConfig) -> PlainGuidance:
        """
        The released guidance, which is never renormalised: `renorm_type` has no effect, and neither has `image_scale`.

        Raises:
            `ValueError`: If renormalisation is asked for by a `renorm_min` between 0, the default, and 1.
        """
        if 0 < settings.renorm_min < 1:
            raise ValueError(
                f"the guidance of Cosmos3 has no renormalisation, but renorm_min is {settings.renorm_min}: leave it out"
            )
        return PlainGuidance(replace(settings, renorm_min=1.0))

    def num_positions(self, segments: Sequence[Segment]) -> int:
        frame = read_pieces(self.config.chat_pieces).longest_frame
        total = frame + TAIL_SLOTS
        for segment in segments:
            # An image takes as many positions as its longer side has tokens, two for its ends, and one for its latents.
            is_text = isinstance(segment, TextSegment)
            total += frame + (len(segment.content_ids) if is_text else self._longer_side(segment.grid) + 3)
        return total

    def _longer_side(self, grid: tuple[int, int]) -> int:
        """Upper bound of the vision tower's tokens along the longer side of an image."""
        if self.vision is None:
            return 0
        sizes = smart_size(self.config, *(side * self.latent_downsample for side in grid))
        return max(sizes) // self.config.vision_stride

    def text_slots(self, max_new_tokens: int) -> int:
        return max_new_tokens + 1

    def image_slots(self, grid: tuple[int, int]) -> int:
        # Latents are in no cache.
        return TAIL_SLOTS

    def denoising_tokens(self, cache: Cosmos3Cache, grid: tuple[int, int]) -> int:
        return grid[0] * grid[1] + cache.clean["valid"].shape[1]

    def vision_size(self, height: int, width: int) -> tuple[int, int] | None:
        return None if self.vision is None else smart_size(self.config, height, width)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        return self.autoencoder.encode(images)

    def decode_latents(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return self.autoencoder.decode(latents, grid)

    def prefill(
        self,
        contexts: Sequence[Sequence[Segment]],
        group_size: int = 1,
        capacity: int = 0,
        past: Cosmos3Cache | None = None,
    ) -> Cosmos3Cache:
        return generation.read_conversations(self, contexts, group_size, capacity, past)

    def sample_text(
        self, cache: Cosmos3Cache, uniforms: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
    ) -> SampledText:
        return generation.write_replies(self, cache, uniforms, temperature, top_k, top_p)

    def predict_velocity(
        self, cache: Cosmos3Cache, latents: torch.Tensor, grid: tuple[int, int], timestep: torch.Tensor
    ) -> torch.Tensor:
        return generation.denoise_images(self, cache, latents, grid, timestep)

    def answer_logits(self, pixel_values: torch.Tensor, questions: Sequence[TextSegment]) -> torch.Tensor:
        return generation.start_answers(self, pixel_values, questions)

    def text_log_probs(
        self, contexts: Sequence[Sequence[Segment]], texts: Sequence[TextSegment]
    ) -> list[torch.Tensor]:
        return generation.score_answers(self, contexts, texts)

    def pack(
        self, trajectories: Sequence[Trajectory], guidance: GuidanceConfig | Sequence[GuidanceConfig]
    ) -> PackedBatch:
        return pack_conversations(trajectories, self._each_guidance(guidance), self.branches, self.config)

    def pack_parts(
        self,
        trajectories: Sequence[Trajectory],
        guidance: GuidanceConfig | Sequence[GuidanceConfig],
        steps_per_part: int,
    ) -> PackedParts:
        made = self._each_guidance(guidance)
        return pack_conversation_parts(trajectories, made, self.branches, self.config, steps_per_part)

    def _each_guidance(
        self, settings: GuidanceConfig | Sequence[GuidanceConfig]
    ) -> PlainGuidance | list[PlainGuidance]:
        is_shared = isinstance(settings, GuidanceConfig)
        return self.guidance(settings) if is_shared else [self.guidance(own) for own in settings]

    def with_all_parts(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inputs = dict(inputs)
        if "pixels" not in inputs and self.vision is not None:
            side = self.config.vision_stride
            inputs["pixels"] = torch.zeros(1, 3, side, side)
            inputs["pixel_sizes"] = torch.full((1, 2), side)
            inputs["feature_index"] = inputs["feature_places"] = torch.zeros(0, dtype=torch.long)
        if "latents" not in inputs:
            # A copy of one token that sees itself alone, whose velocity is not read.
            block = LatentBlock([], torch.zeros(1, self.latent_channels), (1, 1), 0)
            zero = torch.zeros(1, dtype=torch.long)
            names = ("times", "context_rows", "context_horizons", "context_forks")
            inputs |= collate_latents([block], self.config) | dict.fromkeys(names, zero)
        return inputs

    def forward(
        self,
        forks: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        horizons: torch.Tensor | None = None,
        score_index: torch.Tensor | None = None,
        score_targets: torch.Tensor | None = None,
        velocity_index: torch.Tensor | None = None,
        temperature: float | torch.Tensor = 1.0,
        context_gradient: str = "exact",
        keep_contexts: bool = False,
        contexts: ReadContexts | None = None,
        **images: torch.Tensor,
    ) -> PackedOutput:
        """
        Score whole trajectories; see [`collate_contexts`], [`collate_latents`] and [`pack_conversations`] for the inputs.
        With `contexts` there are those of the generation stream alone.

        Args:
            score_index (`torch.Tensor` of shape `(scores,)`):
                Places in the flattened `input_ids` whose next token was sampled.
            score_targets (`torch.Tensor` of shape `(scores,)`): The sampled tokens.
            velocity_index (`torch.Tensor` of shape `(copies, tokens)`, *optional*):
                Places of noised latents in each copy.
            temperature (`float`, *optional*, defaults to `1.0`): Temperature at which the tokens were sampled.
            context_gradient (`str`, *optional*, defaults to `"exact"`):
                With `"detached"`, noised copies have no gradient through their context.
            keep_contexts (`bool`, *optional*, defaults to `False`):
                Whether to return what the generation stream reads of the understanding stream.
            contexts ([`ReadContexts`], *optional*): What that returned, for a batch of noised copies alone.
        """
        rows = {"input_ids": input_ids, "positions": positions, "horizons": horizons, "forks": forks}
        if self.work is not None:
            self._count_work(rows | images)
        if contexts is not None:
            keys, values = contexts.states[::2], contexts.states[1::2]
            velocities = self._denoise_copies(images, StreamStates(keys, keys, values), forks)
            velocities = _read_velocities(velocities, velocity_index)
            return PackedOutput(contexts.log_probs, contexts.entropies, velocities)
        states, seen = self.understand_contexts(rows | images)
        velocities = None
        if "latents" in images:
            seen = seen.detach() if context_gradient == "detached" else seen
            velocities = self._denoise_copies(images, seen, forks)
        scored = states.flatten(0, 1)[score_index]
        if velocities is not None and velocity_index is None:
            # Nothing reads the copy of [`Cosmos3Model.with_all_parts`], but its backward has to run.
            scored, velocities = scored + 0 * velocities.sum(), None
        head = self.transformer.lm_head
        log_probs, entropies = score_tokens(head, scored, score_targets, self.config.vocab_size, temperature)
        if velocities is not None:
            velocities = _read_velocities(velocities, velocity_index)
        pairs = zip(seen.generation_keys, seen.values, strict=True) if keep_contexts else ()
        return PackedOutput(log_probs, entropies, velocities, [state for pair in pairs for state in pair] or None)

    def _denoise_copies(
        self, images: dict[str, torch.Tensor], seen: StreamStates, forks: torch.Tensor
    ) -> torch.Tensor:
        """Velocities `(copies, tokens, channels)` of all latents, fp32."""
        rows, valid = images["context_rows"], images["valid"]
        is_before = torch.arange(forks.shape[1], device=forks.device) < images["context_horizons"][:, None]
        own_tail = images["context_forks"][:, None]
        is_tail = (forks[rows] == own_tail) & (own_tail > 0)
        mask = torch.cat([is_before | is_tail, valid], dim=1)[:, None, None].expand(-1, -1, valid.shape[1], -1)
        positions = images["latent_positions"].transpose(0, 1)
        latents, noised, times = images["latents"], images["noised"], images["times"]
        return self.transformer.denoise(latents, noised, times, positions, seen, mask, context_rows=rows)

    def _count_work(self, inputs: dict[str, torch.Tensor]) -> None:
        masks = [] if inputs["horizons"] is None else [inputs["horizons"] > 0]
        masks += [inputs["valid"]] if "valid" in inputs else []
        num_tokens, num_places = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
        self.work.count("training" if torch.is_grad_enabled() else "scoring", num_tokens, num_places)


def _read_velocities(velocities: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Those of noised latents, `(copies, tokens, channels)`, of all latents of every copy."""
    return velocities.gather(1, index[..., None].expand(-1, -1, velocities.shape[-1]))
