# SPDX-License-Identifier: Apache-2.0

"""
Ways to compute the same loss: the packed micro-batch, and one forward per trained step as in research codebases.

The step-by-step structures get the benefit of the doubt: guidance branches and trajectories run as one batch, without padding to the
longest branch and with the same attention, and texts are scored once. They do not share contexts between branches and trajectories.
They differ in how often contexts are computed: in each step with a gradient, in each step without one, or once without one. Except for
`separate_forwards`, which uses the contract alone, they are written for BAGEL's parts and measure its sizes alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from alphagrpo_ext.models.bagel import BagelModel
from alphagrpo_ext.models.bagel.attention import PackedLayout
from alphagrpo_ext.models.bagel.layout import NOISED_BLOCK, PADDING_BLOCK
from alphagrpo_ext.models.bagel.packing import pack_trajectories
from alphagrpo_ext.models.contract import PackedBatch, PackedOutput, UnifiedModel
from alphagrpo_ext.models.work import WorkCounter
from alphagrpo_ext.trainer.scoring.windows import split_window_steps
from alphagrpo_ext.trajectory import ImageSegment, Trajectory
from benchmark_parts.updates.update import Update, packed
from benchmark_parts.workload import GUIDANCE, without_windows


def with_copied_contexts(trajectories: list[Trajectory]) -> list[Trajectory]:
    """Copy the guidance contexts of trajectories, so that no branch shares an image with another."""
    return [
        Trajectory(
            [
                replace(s, guidance_contexts=copy.deepcopy(s.guidance_contexts)) if isinstance(s, ImageSegment) else s
                for s in trajectory.segments
            ]
        )
        for trajectory in trajectories
    ]


def pack_unshared(model: BagelModel, trajectories: list[Trajectory]) -> PackedBatch:
    """Pack trajectories so that no guidance branch shares its context."""
    return pack_trajectories(trajectories, model.guidance(GUIDANCE), model.config, shares_contexts=False)


def rebuilt_with_gradient(update: Update) -> float:
    """One forward per step with its contexts, all with gradient. The first step also scores the texts."""
    return _forward_per_step(update, with_copied_contexts(update.trajectories), pack_unshared)


def separate_forwards(update: Update) -> float:
    """The same, but contexts are shared as in the packed micro-batch."""
    return _forward_per_step(update, update.trajectories, lambda model, part: model.pack(part, GUIDANCE))


def _forward_per_step(
    update: Update,
    trajectories: list[Trajectory],
    pack: Callable[[UnifiedModel, list[Trajectory]], PackedBatch],
) -> float:
    total = 0.0
    for part in split_window_steps(trajectories, 1):
        batch = pack(update.model, part)
        with update.autocast():
            output = update.model(**batch.inputs)
        loss = update.image_loss(part, batch, output)
        if len(output.log_probs):
            loss = loss + update.text_loss(output)
        loss.backward()
        total += loss.item()
    return total


def rebuilt_without_gradient(update: Update) -> float:
    """In each step, compute the contexts without gradient, and then the noised images from their keys and values."""
    return _step_by_step(update, reuses_contexts=False)


def cached_without_gradient(update: Update) -> float:
    """Compute the contexts once, without gradient, for all steps."""
    return _step_by_step(update, reuses_contexts=True)


def _step_by_step(update: Update, reuses_contexts: bool) -> float:
    model, total = update.model, _text_alone(update)
    states: list[torch.Tensor] | None = None
    for part in split_window_steps(with_copied_contexts(update.trajectories), 1):
        batch = pack_unshared(update.model, part)
        layout = PackedLayout.from_inputs(batch.inputs)
        with update.autocast():
            embeddings = model.embed_sequences(batch.inputs)
            if states is None or not reuses_contexts:
                with torch.no_grad():
                    _, states = _run(model, batch.inputs, embeddings, layout.contexts_alone())
            gen, _ = _run(model, batch.inputs, embeddings, layout.copies_alone(), states)
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
    context_states: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """
    Run the contexts, which are the first tokens of both experts, or the noised copies, which are the last ones.

    Returns:
        `tuple[torch.Tensor, list[torch.Tensor]]`: Hidden states `(1, tokens, hidden)` of the generation expert, and the keys
        and values of contexts.
    """
    positions = part.take(*inputs["positions"].tensor_split([embeddings[0].shape[1]], dim=1))
    _, gen, states = model.language_model.model(
        *part.take(*embeddings), torch.cat(positions, dim=1), part, context_states=context_states
    )
    return gen, states


def _text_alone(update: Update) -> float:
    batch = update.model.pack(without_windows(update.trajectories), GUIDANCE)
    with update.autocast():
        output = update.model(**batch.inputs)
    loss = update.text_loss(output)
    loss.backward()
    return loss.item()


PACKED = "packed, exact"
"""Name of the structure that training uses."""

CONTRACT_STRUCTURES: dict[str, Callable[[Update], float]] = {
    PACKED: lambda update: packed(update, "exact"),
    "packed, detached": lambda update: packed(update, "detached"),
    "separate forwards": separate_forwards,
}
"""Structures of every family by name: each takes an update, leaves gradients in the parameters and returns the loss."""

BAGEL_STRUCTURES: dict[str, Callable[[Update], float]] = {
    "rebuilt with gradient": rebuilt_with_gradient,
    "rebuilt without gradient": rebuilt_without_gradient,
    "cached without gradient": cached_without_gradient,
}
"""Structures that run the parts of a [`BagelModel`] themselves."""

EXACT = (PACKED, "separate forwards", "rebuilt with gradient")
"""Structures whose gradient flows through the context."""


def structures_of(model: UnifiedModel) -> dict[str, Callable[[Update], float]]:
    """The structures that a model is measured with."""
    return CONTRACT_STRUCTURES | (BAGEL_STRUCTURES if isinstance(model, BagelModel) else {})


def num_tokens(batch: PackedBatch) -> tuple[int, int]:
    """Number of tokens of contexts, and of noised copies, without padding."""
    blocks = batch.inputs["blocks"]
    contexts = (blocks < NOISED_BLOCK).sum().item()
    return contexts, (blocks < PADDING_BLOCK).sum().item() - contexts


def token_costs(update: Update) -> dict[str, float]:
    """Number of tokens that each structure passes through the network. A backward counts as two forwards."""
    costs = {name: 3.0 * trained_tokens(update, structure) for name, structure in CONTRACT_STRUCTURES.items()}
    if isinstance(update.model, BagelModel):
        contexts, copies = num_tokens(pack_unshared(update.model, update.trajectories))
        with_texts, _ = num_tokens(update.model.pack(without_windows(update.trajectories), GUIDANCE))
        steps = update.num_steps
        costs |= {
            "rebuilt with gradient": 3 * (steps * contexts + copies),
            "rebuilt without gradient": steps * contexts + 3 * (with_texts + copies),
            "cached without gradient": contexts + 3 * (with_texts + copies),
        }
    return costs


def trained_tokens(update: Update, structure: Callable[[Update], float]) -> int:
    """Number of tokens that the model itself counts in the forwards of a structure, padding aside."""
    work = WorkCounter()
    with work.of(update.model):
        structure(update)
    update.model.zero_grad()
    return work.tokens["training"]


def relative_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two gradients, relative to the norm of the second, over all parameters."""
    names = first.keys() | second.keys()
    difference = norm = 0.0
    for name in names:
        given = first.get(name, second.get(name))
        a, b = first.get(name, torch.zeros_like(given)), second.get(name, torch.zeros_like(given))
        difference += (a - b).double().square().sum().item()
        norm += b.double().square().sum().item()
    return (difference / norm) ** 0.5


def gradient_of(update: Update, structure: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Compute the loss of a structure and the gradient of every parameter that has one."""
    update.model.zero_grad()
    loss = structures_of(update.model)[structure](update)
    gradients = {name: p.grad.clone() for name, p in update.model.named_parameters() if p.grad is not None}
    update.model.zero_grad()
    return loss, gradients
