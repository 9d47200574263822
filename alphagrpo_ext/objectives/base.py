# SPDX-License-Identifier: Apache-2.0

"""
The contract of image objectives, and the scores that they are given.

Scores hold velocities and not log-probabilities, and so do those of the old and the reference policy, so that
objectives other than Flow-GRPO find what they need.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from alphagrpo_ext.models.contract import Guidance, PackedBatch, PackedOutput
from alphagrpo_ext.ranges import NonNegativeFloat, PositiveFloat, PositiveUnitFloat, check_ranges
from alphagrpo_ext.registry import Registry
from alphagrpo_ext.trajectory import Trajectory


OBJECTIVES: Registry = Registry(
    "image objective",
    "alphagrpo_ext.objectives",
    {
        "flow_grpo": "alphagrpo_ext.objectives.flow_grpo:FlowGRPO",
        "grpo_guard": "alphagrpo_ext.objectives.grpo_guard:GRPOGuard",
        "diffusion_nft": "alphagrpo_ext.objectives.diffusion_nft:DiffusionNFT",
        "awm": "alphagrpo_ext.objectives.awm:AWM",
    },
)

REGULARIZERS: Registry = Registry(
    "image_kl_type",
    "alphagrpo_ext.regularizers",
    {
        "mean": "alphagrpo_ext.objectives.regularizers:transition_mean",
        "velocity": "alphagrpo_ext.objectives.regularizers:velocity",
    },
)
"""Functions `(scores, ref_velocities, config) -> divergence` by name. Divergences are `(images, K)`, with gradient."""


@dataclass
class ImageScores:
    """
    The trained steps of a batch of sampled images, with the guided velocities of a policy.

    Args:
        velocities (`torch.Tensor` of shape `(images, K, tokens, channels)`): Guided velocities, fp32, with gradient.
        latents, next_latents (`torch.Tensor` of shape `(images, K, tokens, channels)`):
            States before and after a step.
        t, t_next (`torch.Tensor` of shape `(images, K)`): Times of these states, falling from 1 towards 0.
        mask (`torch.Tensor` of shape `(images, 1, tokens)`, bool): False on padding.
        trajectory (`torch.Tensor` of shape `(images,)`): Index of each image's trajectory in the batch.
        clean_latents (`torch.Tensor` of shape `(images, 1, tokens, channels)`): The sampled images.
    """

    velocities: torch.Tensor
    latents: torch.Tensor
    next_latents: torch.Tensor
    t: torch.Tensor
    t_next: torch.Tensor
    mask: torch.Tensor
    trajectory: torch.Tensor
    clean_latents: torch.Tensor

    @classmethod
    def from_packed(
        cls,
        trajectories: Sequence[Trajectory],
        batch: PackedBatch,
        output: PackedOutput,
    ) -> ImageScores | None:
        """
        Scores from a packed forward: its velocities guided and in order. `None` if no image has a window.

        Args:
            trajectories (`Sequence[Trajectory]`): What was packed.
            batch ([`PackedBatch`]): The packed trajectories.
            output ([`PackedOutput`]): Result of the forward.

        Raises:
            `ValueError`: If windows have different numbers of steps.
        """
        if batch.velocities is None:
            return None
        images = [image for t in trajectories for image in t.sampled_images if image.window is not None]
        windows = [image.window for image in images]
        num_steps = {window.num_steps for window in windows}
        if len(num_steps) != 1:
            raise ValueError(f"all windows of a batch must have the same number of steps, but they have {num_steps}")
        velocities, mask = _guide(batch, output.velocities, len(windows), num_steps.pop())
        device, num_tokens = velocities.device, velocities.shape[2]

        def stack(states: Sequence[torch.Tensor]) -> torch.Tensor:
            padded = [torch.nn.functional.pad(s, (0, 0, 0, num_tokens - s.shape[1])) for s in states]
            return torch.stack(padded).to(device)

        times = torch.stack([window.timesteps for window in windows]).to(device)
        return cls(
            velocities=velocities,
            latents=stack([window.latents[:-1] for window in windows]),
            next_latents=stack([window.latents[1:] for window in windows]),
            t=times[:, :-1],
            t_next=times[:, 1:],
            mask=mask,
            trajectory=batch.image_trajectory.to(device),
            clean_latents=stack([image.latents[None] for image in images]),
        )


def _guide(
    batch: PackedBatch, velocities: torch.Tensor, num_images: int, num_steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Guided velocities `(images, steps, tokens, channels)` and mask `(images, 1, tokens)`, from the velocities
    `(copies, tokens, channels)` of all branches.
    """
    layout, device = batch.velocities, velocities.device
    # Copy of each (branch, image, step); -1 where a branch is not needed at that time.
    copies = torch.full((len(layout.branches), num_images, num_steps), -1)
    copies[layout.branch, layout.image, layout.step] = torch.arange(len(layout.image))
    result = velocities[copies[0].to(device)]
    mask = layout.mask[copies[0]][:, :1].to(device)
    # Images and steps that need the same branches are guided together, if one guidance is that of all.
    for guidance, own_images in _images_by_guidance(batch.guidance, num_images):
        for needed in (copies[:, own_images] >= 0).flatten(1).int().unique(dim=1).T.bool():
            branches = needed.nonzero().flatten().tolist()
            if len(branches) == 1:
                continue
            guided = ((copies >= 0) == needed[:, None, None]).all(dim=0) & own_images[:, None]
            guided = guided.to(device)
            by_name = {layout.branches[i]: velocities[copies[i].to(device)[guided]] for i in branches}
            image_mask = mask.expand(*guided.shape, -1)[guided]
            result = result.index_put((guided,), guidance.combine(by_name, mask=image_mask))
    return result, mask


def _images_by_guidance(
    guidance: Guidance | tuple[Guidance, ...], num_images: int
) -> list[tuple[Guidance, torch.Tensor]]:
    """Each guidance, with a mask `(images,)` of the images that have it."""
    if not isinstance(guidance, tuple):
        return [(guidance, torch.ones(num_images, dtype=torch.bool))]
    different = [own for i, own in enumerate(guidance) if own not in guidance[:i]]
    return [(own, torch.tensor([other == own for other in guidance])) for own in different]


@dataclass(frozen=True)
class ObjectiveConfig:
    """
    Settings that image objectives share.

    Args:
        sde_type (`str`): Kind of the transitions that the window was sampled with.
        noise_level (`float`): Noise level of these transitions.
        epsilon (`float`): Clip range of the ratio.
        beta (`float`): Weight of the regulariser.
        base_beta (`float`): Weight of the second penalty, towards the model before training.
        kl_type (`str`): What the regulariser compares with the reference model: `"mean"` or `"velocity"`.
        advantage_clip (`float`): Largest absolute advantage.
        nft_beta (`float`): Share of the current policy in the implicit policies of DiffusionNFT.
        awm_power (`float`): Power of the flow-matching error in AWM's log-likelihood.
        awm_time_power (`float`): Power of the time in AWM's log-likelihood.
    """

    sde_type: str = "flow_sde"
    noise_level: PositiveFloat = 0.7
    epsilon: PositiveFloat = 1e-5
    beta: NonNegativeFloat = 0.0
    base_beta: NonNegativeFloat = 0.0
    kl_type: str = "mean"
    advantage_clip: PositiveFloat = 5.0
    nft_beta: PositiveFloat = 1.0
    awm_power: PositiveUnitFloat = 0.25
    awm_time_power: NonNegativeFloat = 1.0

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass
class ObjectiveOutput:
    """
    Result of an image objective.

    Args:
        loss (`torch.Tensor` of shape `(images,)`):
            Loss of every image, averaged over its trained steps. The loss of a step depends on that step alone, so the
            steps can be trained in several forwards.
        metrics (`dict[str, torch.Tensor]`): Scalars without gradient, averaged over images and steps.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


class ImageObjective(ABC):
    """
    A loss on velocities, given advantages. Register one with `@OBJECTIVES.register("name")`.

    The class attribute `trains_on` says what an objective trains on:

    - `"transitions"`: the stochastic steps of a window, with guidance.
    - `"forward_process"`: images are sampled deterministically, and the K steps of the scores are noised copies of the
      sampled image, at times that all images share. `next_latents` and `t_next` have no meaning. Velocities are
      without guidance, because flow matching has no guided target; if rollouts use guidance, training distils it.

    The rollout fills the window of each image accordingly. Packing, windows that are trained in parts, old and
    reference velocities, buffers and checkpoints treat both alike.

    The class attributes `default_epsilon` and `default_time_interval` are the clip range of the ratio, and the interval
    of the times of noised copies before the shift, of a run that does not set them.

    Args:
        config ([`ObjectiveConfig`]): Shared settings.

    Raises:
        `ValueError`: If a setting is unknown or out of range.
    """

    trains_on: ClassVar[Literal["transitions", "forward_process"]] = "transitions"
    default_epsilon: ClassVar[float] = 1e-5
    default_time_interval: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __init__(self, config: ObjectiveConfig) -> None:
        REGULARIZERS.get(config.kl_type)
        self.config = config

    @abstractmethod
    def __call__(
        self,
        scores: ImageScores,
        advantages: torch.Tensor,
        old_velocities: torch.Tensor | None = None,
        ref_velocities: torch.Tensor | None = None,
    ) -> ObjectiveOutput:
        """
        Args:
            scores ([`ImageScores`]): The current policy on the batch.
            advantages (`torch.Tensor` of shape `(images,)`): Advantage of each image.
            old_velocities (`torch.Tensor` of shape `(images, K, tokens, channels)`, *optional*):
                Guided velocities of the policy that sampled. `None` means that it is the current one.
            ref_velocities (`torch.Tensor` of shape `(images, K, tokens, channels)`, *optional*):
                Guided velocities of the reference model.
        """
