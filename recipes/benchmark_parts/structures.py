# SPDX-License-Identifier: Apache-2.0

"""
Ways to compute the same loss: the packed micro-batch, and what research codes do, one forward a trained step.

The step-by-step structures are given what they could have: guidance branches and trajectories run as one batch without
padding to the longest branch, and with the same attention. They differ in what becomes of the contexts, which they do not
share between branches and trajectories: each is built anew in each step, with or without a gradient, or once, without.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from alphagrpo_ext.models.bagel import BagelModel
from alphagrpo_ext.models.bagel.attention import ContextStates, PackedLayout
from alphagrpo_ext.models.bagel.layout import NOISED_BLOCK, PADDING_BLOCK
from alphagrpo_ext.models.bagel.packing import pack_trajectories
from alphagrpo_ext.models.contract import PackedBatch, PackedOutput
from alphagrpo_ext.objectives.base import OBJECTIVES, ImageScores, ObjectiveConfig
from alphagrpo_ext.trainer.scoring import split_window_steps
from alphagrpo_ext.trajectory import ImageSegment, Trajectory
from benchmark_parts.workload import GUIDANCE, without_windows


@dataclass(frozen=True)
class Update:
    """
    What all structures compute: Flow-GRPO with a penalty on the images, and the mean log-probability of the texts.

    Args:
        model ([`BagelModel`]): In training mode.
        trajectories (`list[Trajectory]`): One window each.
        precision (`torch.dtype`): bf16 by autocast, or fp32.
    """

    model: BagelModel
    trajectories: list[Trajectory]
    precision: torch.dtype = torch.float32

    def autocast(self) -> AbstractContextManager:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16)

    @property
    def num_steps(self) -> int:
        return self.trajectories[0].sampled_images[0].window.num_steps

    def image_loss(self, trajectories: list[Trajectory], batch: PackedBatch, output: PackedOutput) -> torch.Tensor:
        """The share of an average over all trained steps that those of `trajectories` have."""
        scores = ImageScores.from_packed(trajectories, batch, output)
        # At a ratio of 1 a loss does not show what its velocities are, and a penalty does.
        objective = OBJECTIVES.get("flow_grpo")(ObjectiveConfig(beta=0.1, kl_type="velocity"))
        advantages = torch.linspace(-1, 2, len(trajectories))
        output = objective(scores, advantages, ref_velocities=torch.zeros_like(scores.velocities))
        return output.loss.mean() * scores.t.shape[1] / self.num_steps

    def text_loss(self, output: PackedOutput) -> torch.Tensor:
        return -output.log_probs.mean()


def packed(update: Update, context_gradient: str) -> float:
    """Everything in one forward: the library's way."""
    batch = update.model.pack(update.trajectories, GUIDANCE)
    with update.autocast():
        output = update.model(**batch.inputs, context_gradient=context_gradient)
    loss = update.image_loss(update.trajectories, batch, output) + update.text_loss(output)
    loss.backward()
    return loss.item()


def with_own_pictures(trajectories: list[Trajectory]) -> list[Trajectory]:
    """The same trajectories, every guidance branch of which reads pictures that nothing else shares."""
    return [
        Trajectory(
            [
                replace(s, guidance_contexts=copy.deepcopy(s.guidance_contexts)) if isinstance(s, ImageSegment) else s
                for s in trajectory.segments
            ]
        )
        for trajectory in trajectories
    ]


def pack_alone(model: BagelModel, trajectories: list[Trajectory]) -> PackedBatch:
    """Packed so that no guidance branch shares its context."""
    return pack_trajectories(trajectories, model.guidance(GUIDANCE), model.config, shares_contexts=False)


def rebuilt_with_gradient(update: Update) -> float:
    """Each step with its contexts, all of it with gradient; the first step scores the texts as well."""
    total = 0.0
    for part in split_window_steps(with_own_pictures(update.trajectories), 1):
        batch = pack_alone(update.model, part)
        with update.autocast():
            output = update.model(**batch.inputs)
        loss = update.image_loss(part, batch, output)
        if len(output.log_probs):
            loss = loss + update.text_loss(output)
        loss.backward()
        total += loss.item()
    return total


def rebuilt_without_gradient(update: Update) -> float:
    """The contexts of each step anew, without gradient, and then the noised images over their keys and values."""
    return _step_by_step(update, reuses_contexts=False)


def cached_without_gradient(update: Update) -> float:
    """The contexts once, without gradient, for all steps."""
    return _step_by_step(update, reuses_contexts=True)


def _step_by_step(update: Update, reuses_contexts: bool) -> float:
    model, total = update.model, _text_alone(update)
    states: tuple[ContextStates, ...] | None = None
    for part in split_window_steps(with_own_pictures(update.trajectories), 1):
        batch = pack_alone(update.model, part)
        layout = PackedLayout.from_inputs(batch.inputs)
        with update.autocast():
            embeddings = model.embed_sequences(batch.inputs)
            if states is None or not reuses_contexts:
                contexts = layout.contexts_alone()
                with torch.no_grad():
                    _run(model, batch.inputs, embeddings, contexts)
                states = contexts.states
            gen = _run(model, batch.inputs, embeddings, layout.copies_alone(states))
            places = batch.inputs["velocity_index"] - layout.contexts_alone().num_gen
            velocities = model.llm2vae(gen[0, places]).float()
        nothing = velocities.new_zeros(0)
        loss = update.image_loss(part, batch, PackedOutput(nothing, nothing, velocities))
        loss.backward()
        total += loss.item()
    return total


def _run(
    model: BagelModel,
    inputs: dict[str, torch.Tensor],
    embeddings: tuple[torch.Tensor, torch.Tensor],
    part: PackedLayout,
) -> torch.Tensor:
    """Contexts, the first tokens of either expert, or copies, the last; the hidden states of their latents."""
    und, gen = embeddings
    positions = inputs["positions"].split([und.shape[1], gen.shape[1]], dim=1)
    tokens = []
    for x, count in (
        (und, part.num_und),
        (gen, part.num_gen),
        (positions[0], part.num_und),
        (positions[1], part.num_gen),
    ):
        tokens.append(x[:, :count] if part.has_contexts else x[:, x.shape[1] - count :])
    _, gen = model.language_model.model(*tokens[:2], torch.cat(tokens[2:], dim=1), part)
    return gen


def _text_alone(update: Update) -> float:
    batch = update.model.pack(without_windows(update.trajectories), GUIDANCE)
    with update.autocast():
        output = update.model(**batch.inputs)
    loss = update.text_loss(output)
    loss.backward()
    return loss.item()


STRUCTURES: dict[str, Callable[[Update], float]] = {
    "packed, exact": lambda update: packed(update, "exact"),
    "packed, detached": lambda update: packed(update, "detached"),
    "rebuilt with gradient": rebuilt_with_gradient,
    "rebuilt without gradient": rebuilt_without_gradient,
    "cached without gradient": cached_without_gradient,
}
"""Each takes an update, leaves gradients in the parameters and returns the loss."""

EXACT = ("packed, exact", "rebuilt with gradient")
"""Structures the gradient of which goes through the context; that of the others does not."""


def num_tokens(batch: PackedBatch) -> tuple[int, int]:
    """Tokens of contexts, and of all noised copies; what pads a batch does not count."""
    blocks = batch.inputs["blocks"]
    contexts = (blocks < NOISED_BLOCK).sum().item()
    return contexts, (blocks < PADDING_BLOCK).sum().item() - contexts


def token_costs(update: Update) -> dict[str, float]:
    """Tokens that each structure pushes through the network, in forwards: a backward counts twice."""
    pack = update.model.pack
    shared, copies = num_tokens(pack(update.trajectories, GUIDANCE))
    contexts, _ = num_tokens(pack_alone(update.model, update.trajectories))
    with_texts, _ = num_tokens(pack(without_windows(update.trajectories), GUIDANCE))
    steps = update.num_steps
    return {
        "packed, exact": 3 * (shared + copies),
        "packed, detached": 3 * (shared + copies),
        "rebuilt with gradient": 3 * (steps * contexts + copies),
        "rebuilt without gradient": steps * contexts + 3 * (with_texts + copies),
        "cached without gradient": contexts + 3 * (with_texts + copies),
    }


def relative_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two gradients over the norm of the second, all parameters taken together."""
    names = first.keys() | second.keys()
    difference = norm = 0.0
    for name in names:
        given = first.get(name, second.get(name))
        a, b = first.get(name, torch.zeros_like(given)), second.get(name, torch.zeros_like(given))
        difference += (a - b).double().square().sum().item()
        norm += b.double().square().sum().item()
    return (difference / norm) ** 0.5


def gradient_of(update: Update, structure: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of every parameter that has one."""
    update.model.zero_grad()
    loss = STRUCTURES[structure](update)
    gradients = {name: p.grad.clone() for name, p in update.model.named_parameters() if p.grad is not None}
    update.model.zero_grad()
    return loss, gradients
