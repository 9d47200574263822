# Copyright 2026 The AlphaGRPO-Ext Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Ways to compute the same loss: the packed micro-batch, and what research codes do, one forward a trained step.

The step-by-step structures are given what they could have: guidance branches run as one batch, and the attention is
Transformers'. They differ in what becomes of the context: it is built anew in each step, with or without a gradient, or
once, without.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

from alphagrpo_ext.benchmark.workload import GUIDANCE, without_windows
from alphagrpo_ext.models.bagel import BagelModel
from alphagrpo_ext.models.bagel.copies_bagel import PackedLayout
from alphagrpo_ext.models.unified import PackedBatch, PackedOutput
from alphagrpo_ext.objectives.base import OBJECTIVES, ImageScores, ObjectiveConfig
from alphagrpo_ext.trainer.window_parts import window_parts
from alphagrpo_ext.trajectory import Trajectory


@dataclass
class ConcatenatedCache:
    """Keys and values of contexts, put before those of a noised image in every layer: the usual cache."""

    context_mask: torch.Tensor
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    is_eager: bool = False

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys.append(keys)
        self.values.append(values)

    def visibility(self, num_tokens: int) -> torch.Tensor:
        """What the tokens of one copy a row see, bool `(rows, num_tokens, context + num_tokens)`."""
        mask = torch.nn.functional.pad(self.context_mask, (0, num_tokens), value=True)
        return mask[:, None].expand(-1, num_tokens, -1)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        key, value = torch.cat([self.keys[layer], key], dim=2), torch.cat([self.values[layer], value], dim=2)
        if self.is_eager:
            weights = (query @ key.transpose(-1, -2) * scaling + bias).softmax(dim=-1, dtype=torch.float32)
            return weights.to(value.dtype) @ value
        query, key, bias = (x.to(value.dtype) for x in (query, key, bias))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, bias, scale=scaling)


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
        scores = ImageScores.from_packed(trajectories, batch, output, GUIDANCE)
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


def rebuilt_with_gradient(update: Update) -> float:
    """Each step with its contexts, all of it with gradient; the first step scores the texts as well."""
    total = 0.0
    for part in window_parts(update.trajectories, 1):
        batch = update.model.pack(part, GUIDANCE)
        # Without it, a row is a plain sequence under a mask of all pairs.
        inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "copy_mask"}
        with update.autocast():
            output = update.model(**inputs)
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
    contexts: ConcatenatedCache | None = None
    for part in window_parts(update.trajectories, 1):
        batch = model.pack(part, GUIDANCE)
        inputs = batch.inputs
        copy_mask, num_und = inputs["copy_mask"], inputs["input_ids"].shape[1]
        layout = PackedLayout.of(inputs["positions"], inputs["blocks"], num_und, copy_mask)
        with update.autocast():
            if contexts is None or not reuses_contexts:
                contexts = _prefilled(model, inputs, layout)
            velocities = _velocities(model, inputs, layout, contexts)
        nothing = velocities.new_zeros(0)
        loss = update.image_loss(part, batch, PackedOutput(nothing, nothing, velocities))
        loss.backward()
        total += loss.item()
    return total


def _text_alone(update: Update) -> float:
    batch = update.model.pack(without_windows(update.trajectories), GUIDANCE)
    with update.autocast():
        output = update.model(**batch.inputs)
    loss = update.text_loss(output)
    loss.backward()
    return loss.item()


@torch.no_grad()
def _prefilled(model: BagelModel, inputs: dict[str, torch.Tensor], layout: PackedLayout) -> ConcatenatedCache:
    num_und, num_latents = inputs["input_ids"].shape[1] - 2, inputs["latents"].shape[1] - layout.copy_tokens + 2
    und, gen = model.embed_rows(inputs)
    is_eager = model.config.text_config._attn_implementation == "eager"
    cache = ConcatenatedCache(layout.copy_context_mask[:, 0], is_eager=is_eager)
    model.language_model.model(
        und[:, :num_und], gen[:, :num_latents], layout.context_positions, layout.context_mask, cache, prefill=True
    )
    return cache


def _velocities(
    model: BagelModel, inputs: dict[str, torch.Tensor], layout: PackedLayout, cache: ConcatenatedCache
) -> torch.Tensor:
    num_noised = layout.copy_tokens - 2
    und = model.language_model.model.embed_tokens(inputs["input_ids"][:, -2:])
    times = model.time_embedder(inputs["timesteps"][:, -1:])
    latents, position_ids = (inputs[name][:, -num_noised:] for name in ("latents", "latent_position_ids"))
    gen = model.embed_latents(latents, position_ids, times)
    mask = cache.visibility(layout.copy_tokens)
    _, gen = model.language_model.model(und, gen, layout.copy_positions[:, 0], mask, cache)
    rows = inputs["velocity_index"][:, 0] // inputs["latents"].shape[1]
    return model.llm2vae(gen)[rows].float()


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


def token_costs(update: Update) -> dict[str, float]:
    """
    Tokens that each structure pushes through the network, in forwards: a backward counts twice. What pads a batch does
    not count.
    """
    batch = update.model.pack(update.trajectories, GUIDANCE)
    blocks, noised = batch.inputs["blocks"], batch.inputs["noised"]
    per_row = ((blocks >= 0) & ~noised).sum(dim=1)
    contexts, with_texts = per_row.sum().item(), per_row[batch.inputs["branches"] == 0].sum().item()
    copies, steps = noised.sum().item(), update.num_steps
    return {
        "packed, exact": 3 * (contexts + copies),
        "packed, detached": 3 * (with_texts + copies) + contexts - with_texts,
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
