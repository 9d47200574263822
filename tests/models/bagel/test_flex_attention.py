# SPDX-License-Identifier: Apache-2.0

"""Flex attention's block mask against the mask of all pairs, and what comes out under either."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask

from alphagrpo_ext.flow import GuidanceConfig
from alphagrpo_ext.models.bagel import BagelModel
from alphagrpo_ext.models.bagel.flex_attention import block_mask_attention, visibility_block_mask
from alphagrpo_ext.models.bagel.layout import NOISED_BLOCK, PADDING_BLOCK, visibility_mask
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.trajectory import Trajectory


GUIDANCE = GuidanceConfig(text_scale=3.0, image_scale=1.5, interval=(0.8, 0.95))
CONFIG = DenoisingConfig(num_timesteps=7, guidance=GUIDANCE, window_start=1, window_size=3)


def random_trajectories(model: BagelModel, rollout: Callable, seed: int) -> list[Trajectory]:
    """Of two tasks and image sizes, so that rows are padded."""
    tasks, grids = ("t2i", "think", "edit", "two_rounds"), ((2, 3), (4, 2), (3, 3), (1, 2))
    return [
        trajectory
        for i in (seed, seed + 1)
        for trajectory in rollout(model, tasks[i % 4], CONFIG, grid=grids[i % 3], seed=i, max_new_tokens=3 + i)
    ]


def long_attributes(seed: int) -> tuple[torch.Tensor, ...]:
    """Random rows over several of flex attention's blocks of 128 tokens, in the order of no particular expert."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(-1, 12, (2, 5), generator=generator).repeat_interleave(61, dim=1)
    positions = torch.randint(0, 40, blocks.shape, generator=generator)
    is_noised, is_padding = blocks % 3 == 1, blocks == -1
    horizons = torch.where(is_padding, 0, torch.where(is_noised, blocks // 2, blocks))
    blocks = torch.where(is_padding, PADDING_BLOCK, torch.where(is_noised, NOISED_BLOCK + blocks, blocks))
    rows = torch.arange(2).repeat_interleave(torch.tensor([200, 105])).expand(2, -1)
    return positions, blocks, horizons, rows


def dense(mask: BlockMask, batch: int, length: int) -> torch.Tensor:
    return create_mask(mask.mask_mod, batch, 1, length, length, device="cpu")[:, 0]


@pytest.mark.parametrize("seed", range(4))
def test_block_mask_is_the_mask_of_all_pairs(tiny_bagel: BagelModel, rollout: Callable, seed: int) -> None:
    inputs = tiny_bagel.pack(random_trajectories(tiny_bagel, rollout, seed), GUIDANCE).inputs
    for attributes in ([inputs[name] for name in ("positions", "blocks", "horizons", "rows")], long_attributes(seed)):
        expected = visibility_mask(*attributes)
        assert 0.02 < expected.float().mean() < 0.98
        mask = visibility_block_mask(*attributes)
        assert torch.equal(dense(mask, *attributes[0].shape), expected)


@pytest.mark.parametrize("seed", range(4))
def test_blocks_that_are_skipped_are_empty(seed: int) -> None:
    """What the kernel reads: which blocks it looks into, and which it takes without a mask."""
    attributes = long_attributes(seed)
    mask = visibility_block_mask(*attributes)
    pairs = torch.nn.functional.pad(visibility_mask(*attributes), (0, 384 - 305, 0, 384 - 305))
    counts = pairs.view(2, 3, 128, 3, 128).sum(dim=(2, 4))
    assert torch.equal(mask.to_dense()[:, 0].bool(), counts > 0)
    padded = torch.zeros(2, 3, 3)
    for row in range(2):
        for block in range(3):
            full = mask.full_kv_indices[row, 0, block, : mask.full_kv_num_blocks[row, 0, block]]
            padded[row, block, full.long()] = 1
    # A block at the edge is not full, as it reaches beyond the row.
    assert torch.equal(padded.bool(), counts == 128 * 128)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_attention_is_that_under_the_mask_of_all_pairs(with_gradient: bool) -> None:
    attributes = long_attributes(0)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 4, 305, 16, generator=generator)
    key, value = torch.randn(2, 2, 2, 305, 16, generator=generator)
    tensors = [tensor.requires_grad_(with_gradient) for tensor in (query, key.contiguous(), value.contiguous())]
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, False
    output, _ = block_mask_attention(module, *tensors, visibility_block_mask(*attributes), scaling=0.3, dropout=0.0)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *tensors, visibility_mask(*attributes)[:, None], scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    if with_gradient:
        weights = torch.randn(output.shape, generator=generator)
        actual = torch.autograd.grad((weights * output).sum(), tensors)
        for a, b in zip(actual, torch.autograd.grad((weights * expected).sum(), tensors), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_packed_forward_and_rollout(tiny_bagel: BagelModel, rollout: Callable, checkpointed: bool) -> None:
    trajectories = random_trajectories(tiny_bagel, rollout, 2)
    batch = tiny_bagel.pack(trajectories, GUIDANCE)
    expected = tiny_bagel(**batch.inputs)
    (expected.log_probs.sum() + expected.velocities.square().sum()).backward()
    gradients = {name: p.grad.clone() for name, p in tiny_bagel.named_parameters() if p.grad is not None}
    tiny_bagel.zero_grad()

    tiny_bagel.set_attn_implementation("flex_attention")
    assert tiny_bagel.config.vision_config._attn_implementation == "sdpa"
    with torch.no_grad():
        sampled = random_trajectories(tiny_bagel, rollout, 2)
        without_gradient = tiny_bagel(**batch.inputs)
    for old, new in zip(trajectories, sampled, strict=True):
        torch.testing.assert_close(new.sampled_images[-1].latents, old.sampled_images[-1].latents, rtol=0, atol=1e-5)
    if checkpointed:
        tiny_bagel.gradient_checkpointing_enable()
        tiny_bagel.train()
    output = tiny_bagel(**batch.inputs)
    (output.log_probs.sum() + output.velocities.square().sum()).backward()
    for actual in (without_gradient, output):
        torch.testing.assert_close(actual.log_probs, expected.log_probs, rtol=0, atol=1e-5)
        valid = batch.velocities.mask
        torch.testing.assert_close(actual.velocities[valid], expected.velocities[valid], rtol=0, atol=2e-5)
    assert {name for name, p in tiny_bagel.named_parameters() if p.grad is not None} == gradients.keys()
    for name, gradient in gradients.items():
        actual = tiny_bagel.get_parameter(name).grad
        torch.testing.assert_close(
            actual, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max() + 1e-3), msg=name
        )


def test_loaded_with_flex_attention(tiny_bagel: BagelModel, tmp_path: Path) -> None:
    tiny_bagel.save_pretrained(tmp_path)
    model = BagelModel.from_pretrained(tmp_path, attn_implementation="flex_attention")
    assert model.config.text_config._attn_implementation == "flex_attention"
    assert model.config.vision_config._attn_implementation == "sdpa"
