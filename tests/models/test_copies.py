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

"""Attention of noised copies, and the gradient that they send to their context, or do not."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from alphagrpo_ext.flow import GuidanceConfig
from alphagrpo_ext.models.bagel import BagelModel, copies_bagel
from alphagrpo_ext.models.bagel.copies_bagel import CopyStates, PackedLayout
from alphagrpo_ext.models.bagel.packing_bagel import visibility_mask
from alphagrpo_ext.models.denoising import DenoisingConfig
from alphagrpo_ext.models.unified import BRANCHES, PackedBatch, PackedOutput
from alphagrpo_ext.trajectory import Trajectory


CONFIG = DenoisingConfig(
    num_timesteps=7,
    guidance=GuidanceConfig(text_scale=3.0, image_scale=1.5, interval=(0.8, 0.95)),
    window_start=1,
    window_size=3,
)


@pytest.fixture
def trajectories(tiny_bagel: BagelModel, rollout: Callable) -> list[Trajectory]:
    """Several tasks, image sizes and numbers of rounds, and guidance in a part of the window."""
    tasks = (("think", (2, 3)), ("edit", (4, 2)), ("two_rounds", (3, 3)))
    return [
        trajectory
        for i, (task, grid) in enumerate(tasks)
        for trajectory in rollout(tiny_bagel, task, CONFIG, grid=grid, seed=i)[:2]
    ]


def loss_of(output: PackedOutput, batch: PackedBatch) -> torch.Tensor:
    """A loss that every velocity and every sampled token enters with a weight of its own."""
    generator = torch.Generator().manual_seed(1)
    velocities = output.velocities * batch.velocities.mask[:, :, None]
    return (velocities * torch.randn(velocities.shape, generator=generator)).sum() + (
        output.log_probs * torch.randn(output.log_probs.shape, generator=generator)
    ).sum()


def gradients(model: BagelModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=2e-5 * gradient.abs().max().clamp(min=1))


def forward_under_mask_of_all_pairs(model: BagelModel, batch: PackedBatch) -> PackedOutput:
    """The packed rows as plain sequences, who sees whom decided pair by pair."""
    return model(**{name: tensor for name, tensor in batch.inputs.items() if name != "copy_mask"})


@pytest.mark.invariant
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_losses_and_gradients_are_those_under_the_mask_of_all_pairs(
    tiny_bagel: BagelModel, trajectories: list[Trajectory], attn_implementation: str
) -> None:
    tiny_bagel.set_attn_implementation(attn_implementation)
    batch = tiny_bagel.pack(trajectories, CONFIG.guidance)
    expected = forward_under_mask_of_all_pairs(tiny_bagel, batch)
    expected_gradients = gradients(tiny_bagel, loss_of(expected, batch))
    actual = tiny_bagel(**batch.inputs)
    torch.testing.assert_close(actual.log_probs, expected.log_probs, rtol=0, atol=2e-6)
    mask = batch.velocities.mask
    torch.testing.assert_close(actual.velocities[mask], expected.velocities[mask], rtol=0, atol=1e-5)
    assert_equal_gradients(gradients(tiny_bagel, loss_of(actual, batch)), expected_gradients)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kernel", ["eager", "sdpa", "sdpa of other devices"])
def test_kernels_agree_with_masked_attention(kernel: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel against SDPA under the mask of all pairs, padding of contexts and of copies included."""
    attention = copies_bagel.copy_attention(kernel)
    if kernel == "sdpa of other devices":
        monkeypatch.setattr(copies_bagel, "flash_on_cpu", copies_bagel.concatenated)
    rows, heads, copies, latents, head_dim = 2, 4, 3, 5, 8
    context_und = 6
    generator = torch.Generator().manual_seed(0)
    copy_mask = torch.ones(rows, copies, latents, dtype=torch.bool)
    copy_mask[1, :, 3:] = False
    copy_mask[1, 2] = False
    blocks_of_copies = torch.tensor([[1, 3, 5], [3, 5, -1]])
    blocks = torch.cat(
        [
            torch.tensor([[0, 0, 0, 0, 4, 4], [0, 0, 0, 0, 0, -1]]),
            blocks_of_copies.repeat_interleave(2, dim=1),
            torch.tensor([[2, 2, 2, 2], [2, 2, -1, -1]]),
            torch.where(copy_mask, blocks_of_copies[:, :, None], -1).flatten(1),
        ],
        dim=1,
    )
    positions = torch.zeros_like(blocks)
    noised = torch.zeros_like(blocks, dtype=torch.bool)
    noised[:, context_und : context_und + 2 * copies] = True
    noised[:, -copies * latents :] = True
    num_und = context_und + 2 * copies
    layout = PackedLayout.of(positions, blocks, num_und, copy_mask).additive(torch.float32)
    shape = (rows, blocks.shape[1])
    states = [
        torch.randn(*shape, n, head_dim, generator=generator, requires_grad=True) for n in (heads, kv_heads, kv_heads)
    ]
    mask = visibility_mask(positions, blocks, noised)[:, None]
    query, key, value = (x.transpose(1, 2) for x in states)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
    _, expected = layout.split(*dense.transpose(1, 2).split([num_und, shape[1] - num_und], dim=1))
    seen = torch.nn.functional.pad(copy_mask, (2, 0), value=True).flatten(1) & (
        blocks_of_copies.repeat_interleave(latents + 2, dim=1) >= 0
    )
    weights = torch.randn(expected[seen].shape, generator=generator)
    expected_gradients = torch.autograd.grad((expected[seen] * weights).sum(), states)
    split = [layout.split(*x.split([num_und, shape[1] - num_und], dim=1)) for x in states]
    (_, q), (context_key, k), (context_value, v) = ([x.transpose(1, 2) for x in pair] for pair in split)
    actual = attention(CopyStates(q, context_key, context_value, k, v), layout, 0.3).transpose(1, 2)[seen]
    torch.testing.assert_close(actual, expected[seen], rtol=0, atol=2e-6)
    actual_gradients = torch.autograd.grad((actual * weights).sum(), states)
    for gradient, other in zip(actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=5e-6)


def detached_reference(model: BagelModel, batch: PackedBatch) -> dict[str, torch.Tensor]:
    """
    Gradients of the texts of the exact forward, and of velocities with the contexts' keys and values cut off: every
    context is prefilled once more without gradient, and each copy predicted from it alone.
    """
    inputs, layout = batch.inputs, batch.velocities
    copy_mask = inputs["copy_mask"]
    num_und = inputs["input_ids"].shape[1]
    packed = PackedLayout.of(inputs["positions"], inputs["blocks"], num_und, copy_mask)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(len(layout.image), *layout.mask.shape[1:], model.config.latent_channels, generator=generator)
    token_weights = torch.randn(len(inputs["score_targets"]), generator=generator)
    text_loss = (model(**inputs).log_probs * token_weights).sum()
    first_latent = inputs["latents"].shape[1] - copy_mask.shape[1] * copy_mask.shape[2]
    und, gen = model.embed_rows(inputs)
    context_und = num_und - 2 * copy_mask.shape[1]
    image_loss = torch.zeros(())
    for i, places in enumerate(inputs["velocity_index"]):
        row, place = divmod(int(places[0]), inputs["latents"].shape[1])
        copy = (place - first_latent) // copy_mask.shape[2]
        tokens = int(layout.mask[i].sum())
        visible = packed.copy_context_mask[row, copy]
        keys: list[tuple[torch.Tensor, torch.Tensor]] = []
        decoder = model.language_model.model
        with torch.no_grad():
            cache = CachedContext(keys)
            decoder(
                und[row : row + 1, :context_und],
                gen[row : row + 1, :first_latent] if first_latent else None,
                packed.context_positions[row : row + 1],
                packed.context_mask[row : row + 1],
                cache,
                prefill=True,
            )
        delimiters = und[row : row + 1, context_und + 2 * copy :][:, :2]
        latents = gen[row : row + 1, place : place + tokens]
        positions = packed.copy_positions[row : row + 1, copy, : tokens + 2]
        reading = CachedContext(keys, visible)
        _, output = decoder(delimiters, latents, positions, torch.zeros(1, 1, 1, dtype=torch.bool), reading)
        image_loss = image_loss + (model.llm2vae(output)[0] * weights[i, :tokens]).sum()
    return gradients(model, text_loss + image_loss)


class CachedContext:
    """Keys and values of one context, attended to by concatenation: the plainest cache there is."""

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]], visible: torch.Tensor | None = None) -> None:
        self.layers, self.visible = layers, visible

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        assert layer == len(self.layers)
        self.layers.append((keys, values))

    def attend(self, layer, query, key, value, bias, scaling) -> torch.Tensor:
        keys, values = self.layers[layer]
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            torch.cat([keys[:, :, self.visible], key], dim=2),
            torch.cat([values[:, :, self.visible], value], dim=2),
            scale=scaling,
            enable_gqa=True,
        )


@pytest.mark.invariant
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager", "flex_attention"])
def test_detached_context(tiny_bagel: BagelModel, trajectories: list[Trajectory], attn_implementation: str) -> None:
    batch = tiny_bagel.pack(trajectories, CONFIG.guidance)
    assert {BRANCHES[b] for b in batch.velocities.branch} == set(BRANCHES)
    expected = tiny_bagel(**batch.inputs)
    expected_gradients = detached_reference(tiny_bagel, batch)
    exact_gradients = gradients(tiny_bagel, loss_of(tiny_bagel(**batch.inputs), batch))
    tiny_bagel.set_attn_implementation(attn_implementation)
    actual = tiny_bagel(**batch.inputs, context_gradient="detached")
    torch.testing.assert_close(actual.log_probs, expected.log_probs, rtol=0, atol=2e-6)
    mask = batch.velocities.mask
    torch.testing.assert_close(actual.velocities[mask], expected.velocities[mask], rtol=0, atol=1e-5)
    actual_gradients = gradients(tiny_bagel, loss_of(actual, batch))
    assert_equal_gradients(actual_gradients, expected_gradients)
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    assert not torch.allclose(actual_gradients[name], exact_gradients[name], rtol=0.05)


def test_detached_context_under_gradient_checkpointing(tiny_bagel: BagelModel, trajectories: list[Trajectory]) -> None:
    batch = tiny_bagel.pack(trajectories, CONFIG.guidance)
    expected = gradients(tiny_bagel, loss_of(tiny_bagel(**batch.inputs, context_gradient="detached"), batch))
    tiny_bagel.train()
    tiny_bagel.gradient_checkpointing_enable({"use_reentrant": False})
    actual = gradients(tiny_bagel, loss_of(tiny_bagel(**batch.inputs, context_gradient="detached"), batch))
    assert_equal_gradients(actual, expected)


def test_detached_context_without_texts_or_guidance(tiny_bagel: BagelModel, rollout: Callable) -> None:
    config = replace(CONFIG, guidance=GuidanceConfig(text_scale=1.0))
    for task in ("t2i", "think"):
        batch = tiny_bagel.pack(rollout(tiny_bagel, task, config), config.guidance)
        expected = tiny_bagel(**batch.inputs)
        actual = tiny_bagel(**batch.inputs, context_gradient="detached")
        torch.testing.assert_close(actual.velocities, expected.velocities, rtol=0, atol=1e-5)
        torch.testing.assert_close(actual.log_probs, expected.log_probs, rtol=0, atol=2e-6)
