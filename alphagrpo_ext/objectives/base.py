# SPDX-License-Identifier: Apache-2.0

"""The contract of an image objective, and the velocities that it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from alphagrpo_ext.models.contract import PackedBatch, PackedOutput
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
"""Functions `(scores, ref_velocities, config) -> divergence` by name; divergences `(images, K)` have a gradient."""


@dataclass
class ImageScores:
    """
    The trained transitions of a batch of sampled images, with the policy's guided velocities.

    Args:
        velocities (`torch.Tensor` of shape `(images, K, tokens, channels)`): Guided, fp32, with gradient.
        latents, next_latents (`torch.Tensor` of shape `(images, K, tokens, channels)`): States before and after.
        t, t_next (`torch.Tensor` of shape `(images, K)`): Their times.
        mask (`torch.Tensor` of shape `(images, 1, tokens)`): False on padding.
        trajectory (`torch.Tensor` of shape `(images,)`): Which trajectory of the batch each image belongs to.
        clean_latents (`torch.Tensor` of shape `(images, 1, tokens, channels)`): What each path ended in.
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
        Guide the velocities of a packed forward and put them in order. `None` if there is nothing to score.

        Args:
            trajectories (`Sequence[Trajectory]`): What was packed.
            batch ([`PackedBatch`]), output ([`PackedOutput`]): Layout and result of the forward.
        """
        if batch.velocities is None:
            return None
        device = output.velocities.device
        layout = batch.velocities
        images = [image for t in trajectories for image in t.sampled_images if image.window is not None]
        windows = [image.window for image in images]
        num_steps = {window.num_steps for window in windows}
        if len(num_steps) != 1:
            raise ValueError(f"all windows of a batch must have the same number of steps, but they have {num_steps}")
        # Row of each (branch, image, step) among the copies; -1 where a branch is not needed at that time.
        rows = torch.full((len(layout.branches), len(windows), num_steps.pop()), -1)
        rows[layout.branch, layout.image, layout.step] = torch.arange(len(layout.image))
        velocities = output.velocities[rows[0].to(device)]
        mask = layout.mask[rows[0]][:, :1].to(device)
        # Images and steps that need the same branches are guided together.
        for needed in (rows >= 0).flatten(1).int().unique(dim=1).T.bool():
            branches = needed.nonzero().flatten().tolist()
            if len(branches) == 1:
                continue
            guided = ((rows >= 0) == needed[:, None, None]).all(dim=0).to(device)
            by_name = {layout.branches[i]: output.velocities[rows[i].to(device)[guided]] for i in branches}
            image_mask = mask.expand(*guided.shape, -1)[guided]
            velocities = velocities.index_put((guided,), batch.guidance.combine(by_name, mask=image_mask))
        num_tokens = velocities.shape[2]

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


@dataclass(frozen=True)
class ObjectiveConfig:
    """
    Settings that image objectives share.

    Args:
        sde_type (`str`): Transition that the window was sampled with.
        noise_level (`float`): Its noise level.
        epsilon (`float`): Clip range of the ratio.
        beta (`float`): Weight of the regulariser towards the reference model.
        kl_type (`str`): `"mean"` or `"velocity"`, what the regulariser compares.
        advantage_clip (`float`): Largest absolute advantage.
        nft_beta (`float`): How much of the implicit policies of DiffusionNFT is the current one.
    """

    sde_type: str = "flow_sde"
    noise_level: float = 0.7
    epsilon: float = 1e-5
    beta: float = 0.0
    kl_type: str = "mean"
    advantage_clip: float = 5.0
    nft_beta: float = 1.0


@dataclass
class ObjectiveOutput:
    """
    Args:
        loss (`torch.Tensor` of shape `(images,)`):
            Loss of every image, averaged over its trained steps. Each step's loss depends on that step alone, so that the
            steps can be trained in several forwards.
        metrics (`dict[str, torch.Tensor]`): Scalars, without gradient, averaged over steps.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


class ImageObjective(ABC):
    """
    What turns advantages into a loss on velocities. Register one with `@OBJECTIVES.register("name")`.

    What an objective trains on is its class attribute `trains_on`: the `"transitions"` of a window of stochastic steps, with
    guidance; or the `"forward_process"`, where images are painted deterministically and the K steps of the scores are
    noised copies of the painted image, at times that all images share. Their velocities are those given all conditions,
    without guidance, and neither `next_latents` nor `t_next` has a meaning.

    Args:
        config ([`ObjectiveConfig`]): Shared settings.

    Raises:
        `ValueError`: If a setting is unknown or out of range.
    """

    trains_on: ClassVar[Literal["transitions", "forward_process"]] = "transitions"

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
            advantages (`torch.Tensor` of shape `(images,)`): Of each image's trajectory.
            old_velocities (`torch.Tensor`, *optional*):
                Guided velocities of the policy that sampled, of the shape of `scores.velocities`. `None` means that it
                is the current one.
            ref_velocities (`torch.Tensor`, *optional*): Guided velocities of the reference model.
        """
