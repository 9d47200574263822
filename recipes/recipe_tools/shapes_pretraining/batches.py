# SPDX-License-Identifier: Apache-2.0

"""
Examples as trajectories: what the policy is given in the layout of a rollout, and as its actions what it shall learn.

So every family is trained by its own packed forward. The text that is learned is a sampled text. The image that is learned is a
sampled image whose window holds noised copies of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.shapes.scene import IMAGE_SIZE, Scene, render
from alphagrpo_ext.shapes.text import UNDERSTANDING_SYSTEM_PROMPT
from alphagrpo_ext.trajectory import DenoisingWindow, ImageSegment, Segment, TextSegment, Trajectory
from recipe_tools.shapes_pretraining.examples import Example, PretrainingMixture
from recipe_tools.shapes_pretraining.paintings import Painting


SIZE = (IMAGE_SIZE, IMAGE_SIZE)


@dataclass
class PretrainingBatch:
    """
    Trajectories as tensors, with the targets of their losses.

    Args:
        inputs (`dict[str, torch.Tensor]`): Arguments of the model's forward.
        velocity_targets (`torch.Tensor` of shape `(copies, tokens, channels)`, *optional*): Noise minus image.
    """

    inputs: dict[str, torch.Tensor]
    velocity_targets: torch.Tensor | None


class PretrainingLoss(nn.Module):
    """Cross-entropy of learned texts and mean squared error of velocities, over micro-batches of similar rows."""

    def __init__(self, model: UnifiedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batches: Sequence[PretrainingBatch]) -> tuple[torch.Tensor, torch.Tensor]:
        text_loss, image_loss, num_texts, num_values = 0.0, 0.0, 0, 0
        for batch in batches:
            output = self.model(**batch.inputs)
            text_loss -= output.log_probs.sum()
            num_texts += len(output.log_probs)
            if batch.velocity_targets is not None:
                image_loss += F.mse_loss(output.velocities, batch.velocity_targets, reduction="sum")
                num_values += batch.velocity_targets.numel()
        return text_loss / max(1, num_texts), image_loss / max(1, num_values)


def given_segments(
    example: Example,
    latents: Mapping[Scene | Painting, torch.Tensor],
    processor: UnifiedProcessor,
    model: UnifiedModel,
) -> list[Segment]:
    """
    What the policy is given, as the task of the same kind builds it.

    Args:
        example ([`Example`]): The example.
        latents (`Mapping[Scene | Painting, torch.Tensor]`): Clean latents `(tokens, channels)` of the images that are read.
    """
    if example.kind == "painting":
        system = processor.system_segments(example.think, edits=False)
        return [*system, processor.request_segment(example.request, SIZE)]
    shown = example.shown
    read = latents[shown] if example.reads_latents else torch.empty(0, model.latent_channels)
    pixels = processor.look(render(shown) if isinstance(shown, Scene) else shown.image)
    image = ImageSegment(read, model.latent_grid(*SIZE), pixels)
    if example.kind == "caption":
        # The layout in which the likelihood of a prompt is scored.
        return [image]
    if example.kind == "answer":
        system = processor.text_segment(UNDERSTANDING_SYSTEM_PROMPT).token_ids
        systems = [TextSegment(system, role="system")] * example.think
        return [*systems, image, processor.text_segment(example.request)]
    request = processor.reflection_request(example.request) if example.kind == "repair" else example.request
    return [*processor.system_segments(example.think, edits=True), image, processor.request_segment(request, SIZE)]


def dropped_context(
    context: Sequence[Segment], choice: float, processor: UnifiedProcessor, model: UnifiedModel
) -> list[Segment]:
    """
    The context of a guidance branch that differs from the full one. `choice` in [0, 1) chooses among such branches.
    """
    others = [processor.branch_context(name, context, SIZE) for name in model.branches[1:]]
    others = [other for other in others if list(map(id, other)) != list(map(id, context))]
    return others[int(choice * len(others))]


def noised_window(clean: torch.Tensor, mixture: PretrainingMixture, generator: torch.Generator) -> DenoisingWindow:
    """Copies of an image `(tokens, channels)` at random times, each with noise of its own, and then the image."""
    states, times = [], []
    for _ in range(mixture.noise_copies):
        time = float(torch.sigmoid(torch.randn((), generator=generator)))
        time = mixture.timestep_shift * time / (1 + (mixture.timestep_shift - 1) * time)
        noise = torch.randn(clean.shape, generator=generator)
        states.append((1 - time) * clean + time * noise)
        times.append(time)
    return DenoisingWindow(
        torch.stack([*states, clean]), torch.tensor([*times, 0.0]), 0, torch.zeros(mixture.noise_copies)
    )


def build_trajectory(
    example: Example,
    latents: Mapping[Scene | Painting, torch.Tensor],
    processor: UnifiedProcessor,
    model: UnifiedModel,
    mixture: PretrainingMixture,
    generator: torch.Generator,
) -> Trajectory:
    """
    Make the trajectory of an example.

    Args:
        example ([`Example`]): The example.
        latents (`Mapping[Scene | Painting, torch.Tensor]`): Clean latents `(tokens, channels)` of what is read or painted.
        processor ([`UnifiedProcessor`]), model ([`UnifiedModel`]): Turn texts and images into segments.
        mixture ([`PretrainingMixture`]): Number and times of noised copies.
        generator (`torch.Generator`): Draws times (logit-normal) and noise.
    """
    segments = given_segments(example, latents, processor, model)
    if example.dropped is not None:
        segments = dropped_context(segments, example.dropped, processor, model)
    if example.learned is not None:
        ids = processor.text_segment(example.learned).token_ids
        segments.append(TextSegment([*ids, processor.tokenizer.eos_token_id], sampled=True))
    if example.target is not None and mixture.noise_copies:
        clean = latents[example.target]
        window = noised_window(clean, mixture, generator)
        segments.append(ImageSegment(clean, model.latent_grid(*SIZE), sampled=True, window=window))
    return Trajectory(segments)


def build_batch(trajectories: Sequence[Trajectory], model: UnifiedModel) -> PretrainingBatch:
    """Pack trajectories, and collect the velocities that their noised copies should have."""
    # Without guidance, copies are painted from the whole context alone.
    packed = model.pack(trajectories, GuidanceConfig(text_scale=1.0))
    if packed.velocities is None:
        return PretrainingBatch(packed.inputs, None)
    windows = [image.window for trajectory in trajectories for image in trajectory.sampled_images]
    # x_t = x_0 + t (eps - x_0)
    velocities = torch.stack([(w.latents[:-1] - w.latents[-1]) / w.timesteps[:-1, None, None] for w in windows])
    return PretrainingBatch(packed.inputs, velocities[packed.velocities.image, packed.velocities.step])
