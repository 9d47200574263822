# SPDX-License-Identifier: Apache-2.0

"""The contract that a unified multimodal model fulfils, so that rollout and trainer know no model family by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.work import WorkCounter
from alphagrpo_ext.registry import Registry
from alphagrpo_ext.trajectory import Segment, TextSegment, Trajectory


BRANCHES = ("full", "text_dropped", "image_dropped")
"""Guidance branches: the whole context; the context without the last text; the context without images."""

CONTEXT_GRADIENTS = ("exact", "detached")
"""Whether the loss of an image has a gradient through the context that the image is painted from."""

LORA_TARGETS = ("both", "generation", "understanding")
"""Which expert an adapter is put on."""

MODELS: Registry = Registry(
    "model family", "alphagrpo_ext.models", {"bagel": "alphagrpo_ext.models.bagel.modeling_bagel:BagelModel"}
)


@dataclass
class VelocityLayout:
    """
    Where the velocities of a packed forward belong: row `i` of `PackedOutput.velocities` is the velocity of
    transition `step[i]` of the window of sampled image `image[i]`, predicted in guidance branch `branch[i]`.

    Args:
        image (`torch.Tensor` of shape `(copies,)`): Index into the sampled images with a window, in packing order.
        step (`torch.Tensor` of shape `(copies,)`): Index of the transition in that image's window.
        branch (`torch.Tensor` of shape `(copies,)`): Index into [`BRANCHES`].
        mask (`torch.Tensor` of shape `(copies, max_tokens)`): False on padding.
    """

    image: torch.Tensor
    step: torch.Tensor
    branch: torch.Tensor
    mask: torch.Tensor


@dataclass
class PackedBatch:
    """
    Whole trajectories as tensors.

    Args:
        inputs (`dict[str, torch.Tensor]`):
            Keyword arguments of the model's forward.
        score_trajectory, score_column (`torch.Tensor` of shape `(scores,)`):
            Trajectory and position among its sampled tokens of every row of `PackedOutput.log_probs`.
        velocities (`VelocityLayout`, *optional*):
            `None` if no image of the batch has a window.
        image_trajectory (`torch.Tensor` of shape `(images,)`):
            Trajectory of every sampled image with a window.
    """

    inputs: dict[str, torch.Tensor]
    score_trajectory: torch.Tensor
    score_column: torch.Tensor
    velocities: VelocityLayout | None
    image_trajectory: torch.Tensor


@dataclass
class PackedOutput:
    """
    Args:
        log_probs, entropies (`torch.Tensor` of shape `(scores,)`): Of every sampled token, fp32.
        velocities (`torch.Tensor` of shape `(copies, max_tokens, channels)`): Of every noised latent, fp32.
    """

    log_probs: torch.Tensor
    entropies: torch.Tensor
    velocities: torch.Tensor | None


@dataclass(frozen=True)
class SampledText:
    """
    Args:
        token_ids (`list[list[int]]`): Sampled ids, the end token included where it was sampled.
        log_probs (`list[list[float]]`): Of each id, under the temperature alone (before top-p and top-k).
        ended (`list[bool]`): Whether each text ended by itself.
    """

    token_ids: list[list[int]]
    log_probs: list[list[float]]
    ended: list[bool]


class UnifiedModel(ABC):
    """
    An AR-diffusion unified multimodal model as rollout and trainer see it.

    `pack` and `forward` score whole trajectories with gradient; the other methods sample with a cache. Both must
    give the same log-probabilities for the same weights.
    """

    latent_downsample: int
    """Pixels per latent token, along one side."""
    latent_channels: int
    """Values of one latent token."""
    max_latent_size: int
    """Largest number of latent tokens along one side of an image."""
    max_positions: int
    """Largest number of positions in a sequence."""
    work: WorkCounter | None = None
    """Where the model counts what it computes, if anybody wants to know."""
    lora_targets: ClassVar[Mapping[str, str]] = {}
    """For each of [`LORA_TARGETS`], PEFT's `target_modules`: a regular expression that matches whole names."""

    @staticmethod
    def is_generation_parameter(name: str) -> bool:
        """Whether only the generation of images uses a parameter, by its name, which a wrapper may have prefixed."""
        raise NotImplementedError("this model does not tell which of its parameters only generate images")

    def vision_tokens(self, height: int, width: int) -> int:
        """Tokens that the vision tower makes of an image, in pixels; 0 without a vision tower."""
        return 0

    def keeps_fp32(self, name: str) -> bool:
        """Whether a parameter is fp32 whatever type the model is loaded in."""
        return False

    def sharded_layers(self) -> Sequence[torch.nn.Module]:
        """Modules the weights of which are gathered one at a time when they are sharded."""
        return ()

    @abstractmethod
    def pack(self, trajectories: Sequence[Trajectory], guidance: GuidanceConfig) -> PackedBatch:
        """Tensors for one forward over whole trajectories, in every guidance branch that `guidance` needs."""

    def with_all_parts(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Inputs of `forward` that make it run every part of the model and change none of its outputs. Processes that share
        out the parameters among themselves wait for each other at every part.
        """
        return inputs

    @abstractmethod
    def forward(self, context_gradient: str = "exact", **inputs: torch.Tensor) -> PackedOutput:
        """
        Log-probabilities and entropies of sampled tokens and velocities of noised latents, in one call. Where
        `context_gradient` is `"detached"`, velocities have the same values and no gradient through their context.
        """

    @abstractmethod
    def prefill(
        self, contexts: Sequence[Sequence[Segment]], group_size: int, capacity: int, past: Any | None = None
    ) -> Any:
        """
        A cache that holds every context once and gives `group_size` samples `capacity` slots of their own. `past` is the cache
        of the turn before, in which much of the contexts may stand already; it is used up.
        """

    @abstractmethod
    def sample_text(self, cache: Any, uniforms: torch.Tensor, **sampling: Any) -> SampledText:
        """Sample one text a row and leave it in the cache."""

    @abstractmethod
    def predict_velocity(
        self, cache: Any, latents: torch.Tensor, grid: tuple[int, int], timestep: torch.Tensor
    ) -> torch.Tensor:
        """
        Velocity of `latents` `(rows, tokens, channels)` given each row's cache, which is read and not changed. The cache may
        have fewer rows: each then serves the same number of consecutive latents.
        """

    @abstractmethod
    def answer_logits(self, pixel_values: torch.Tensor, questions: Sequence[TextSegment]) -> torch.Tensor:
        """
        Logits `(questions, vocabulary)` of the first token of an answer to each question about one image, which is given
        as the vision tower's input `(3, height, width)` and read once.
        """

    @abstractmethod
    def image_slots(self, grid: tuple[int, int]) -> int:
        """Cache slots that one image of latents takes."""

    @abstractmethod
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels `(batch, 3, height, width)` in [-1, 1] to clean latents `(batch, tokens, channels)`."""

    @abstractmethod
    def decode_latents(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Latents `(batch, tokens, channels)` to pixels `(batch, 3, height, width)` in [-1, 1]."""
