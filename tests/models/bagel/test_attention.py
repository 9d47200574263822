# SPDX-License-Identifier: Apache-2.0

"""Attention of packed sequences against the mask of all pairs, and the gradient that copies send to their context."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.bagel import BagelModel
from alphagrpo_ext.models.bagel import attention as attention_module
from alphagrpo_ext.models.bagel.attention import (
    BucketMasks,
    CopyStates,
    block_mask_attention,
    visibility_block_mask,
)
from alphagrpo_ext.models.bagel.guidance import BRANCHES
from alphagrpo_ext.models.bagel.layout import NOISED_BLOCK, PADDING_BLOCK, visibility_mask
from alphagrpo_ext.models.bagel.packing import Bucket, pack_trajectories
from alphagrpo_ext.models.contract import PackedBatch, PackedOutput
from alphagrpo_ext.rollout.denoising import DenoisingConfig
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


def weighted_loss(output: PackedOutput, batch: PackedBatch) -> torch.Tensor:
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
    """The packed sequence as a plain one, who sees whom decided pair by pair."""
    return model(**{name: tensor for name, tensor in batch.inputs.items() if name != "buckets"})


@pytest.mark.invariant
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_losses_and_gradients_are_those_under_the_mask_of_all_pairs(
    tiny_bagel: BagelModel, trajectories: list[Trajectory], attn_implementation: str
) -> None:
    tiny_bagel.set_attn_implementation(attn_implementation)
    batch = tiny_bagel.pack(trajectories, CONFIG.guidance)
    expected = forward_under_mask_of_all_pairs(tiny_bagel, batch)
    expected_gradients = gradients(tiny_bagel, weighted_loss(expected, batch))
    actual = tiny_bagel(**batch.inputs)
    torch.testing.assert_close(actual.log_probs, expected.log_probs, rtol=0, atol=5e-6)
    mask = batch.velocities.mask
    torch.testing.assert_close(actual.velocities[mask], expected.velocities[mask], rtol=0, atol=1e-5)
    assert_equal_gradients(gradients(tiny_bagel, weighted_loss(actual, batch)), expected_gradients)


def num_context_tokens(batch: PackedBatch) -> int:
    return int((batch.inputs["blocks"] < NOISED_BLOCK).sum())


class TestSharedContexts:
    """Copies of several branches and trajectories hang on one context; without sharing, each has its own."""

    def test_losses_and_gradients_are_those_without_sharing(
        self, tiny_bagel: BagelModel, trajectories: list[Trajectory]
    ) -> None:
        shared = tiny_bagel.pack(trajectories, CONFIG.guidance)
        own = pack_trajectories(
            trajectories, tiny_bagel.guidance(CONFIG.guidance), tiny_bagel.config, shares_contexts=False
        )
        assert num_context_tokens(shared) < 0.8 * num_context_tokens(own)
        for name in ("image", "step", "branch", "mask"):
            assert torch.equal(getattr(shared.velocities, name), getattr(own.velocities, name))
        expected, actual = tiny_bagel(**own.inputs), tiny_bagel(**shared.inputs)
        torch.testing.assert_close(actual.log_probs, expected.log_probs, rtol=0, atol=5e-6)
        mask = shared.velocities.mask
        torch.testing.assert_close(actual.velocities[mask], expected.velocities[mask], rtol=0, atol=1e-5)
        assert_equal_gradients(
            gradients(tiny_bagel, weighted_loss(actual, shared)), gradients(tiny_bagel, weighted_loss(expected, own))
        )

    def test_no_context_is_packed_twice(self, tiny_bagel: BagelModel, rollout: Callable) -> None:
        """A group: every trajectory once, and once for all of them the one context that none of them begins with."""
        config = replace(CONFIG, guidance=replace(CONFIG.guidance, interval=(0.0, 1.0)))
        members = rollout(tiny_bagel, "edit", config)[:2]
        (first, second), (request,) = members, members[0].sampled_images[0].guidance_contexts["image_dropped"]
        assert second.sampled_images[0].guidance_contexts["image_dropped"] == [request]
        batch = tiny_bagel.pack(members, config.guidance)
        own_bucket, shared_bucket = batch.inputs["buckets"].tolist()
        num_steps, branches = CONFIG.window_size, len(BRANCHES)
        assert own_bucket[0] == len(members)
        assert own_bucket[3] == num_steps * (branches - 1)
        assert shared_bucket[:4] == [
            1,
            len(request.content_ids) + 2,
            0,
            len(members) * num_steps,
        ]
        # The picture that both look at goes through the vision tower once.
        assert len(batch.inputs["vit_patches"]) == 1
        assert len(batch.inputs["vit_index"]) == len(members)
        assert second.segments[0] is first.segments[0]

    def test_contexts_of_a_window_in_parts_are_shared(self, tiny_bagel: BagelModel, rollout: Callable) -> None:
        """A copy of a segment that holds the same tensors is the same context."""
        trajectories = rollout(tiny_bagel, "two_rounds", CONFIG)[:1]
        copied = [Trajectory([replace(segment) for segment in t.segments]) for t in trajectories]
        expected, actual = (tiny_bagel.pack(t, CONFIG.guidance).inputs for t in (trajectories, copied))
        assert torch.equal(actual["buckets"], expected["buckets"])
        assert torch.equal(actual["horizons"], expected["horizons"])

    def test_equal_texts_are_one_context(self, tiny_bagel: BagelModel, rollout: Callable) -> None:
        """Whoever encoded them: rollouts that a checkpoint kept are other objects than those they were."""
        members = rollout(tiny_bagel, "edit", CONFIG)[:2]
        expected = tiny_bagel.pack(members, CONFIG.guidance).inputs["buckets"]
        for member in members:
            (image,) = member.sampled_images
            image.guidance_contexts["image_dropped"] = copy.deepcopy(image.guidance_contexts["image_dropped"])
        assert torch.equal(tiny_bagel.pack(members, CONFIG.guidance).inputs["buckets"], expected)

    def test_sequences_of_unequal_shape_are_not_padded_to_each_other(
        self, tiny_bagel: BagelModel, trajectories: list[Trajectory]
    ) -> None:
        inputs = tiny_bagel.pack(trajectories, CONFIG.guidance).inputs
        assert len(inputs["buckets"]) > 3
        # What is left pads texts of unequal length.
        assert (inputs["blocks"] == PADDING_BLOCK).float().mean() < 0.05


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kernel", ["eager", "sdpa", "sdpa of other devices"])
def test_kernels_agree_with_masked_attention(kernel: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel against SDPA under the mask of all pairs, padding of contexts and of copies included."""
    attention = attention_module.copy_attention(kernel)
    if kernel == "sdpa of other devices":
        monkeypatch.setattr(attention_module, "flash_copy_attention", attention_module.concatenated_copy_attention)
    bucket, heads, head_dim = Bucket(sequences=2, context_und=6, context_gen=4, copies=3, copy_latents=5), 4, 8
    context_blocks = torch.tensor(
        [[0, 0, 0, 0, 2, 2, 1, 1, 1, 1], [0, 0, 0, 0, 0, PADDING_BLOCK, 1, 1, *[PADDING_BLOCK] * 2]]
    )
    # A copy that sees all, one that sees the beginning, and one that sees nothing but itself.
    horizons = torch.tensor([[3, 1, 0], [2, 1, 2]])[:, :, None].expand(-1, -1, bucket.copy_tokens)
    blocks = (NOISED_BLOCK + torch.arange(bucket.copies))[:, None].repeat(bucket.sequences, 1, bucket.copy_tokens)
    blocks[1, :, 5:] = PADDING_BLOCK
    horizons = torch.where(blocks == PADDING_BLOCK, 0, horizons)
    contexts = (
        torch.zeros_like(context_blocks),
        context_blocks,
        torch.where(context_blocks == PADDING_BLOCK, 0, context_blocks),
    )
    copies = (torch.zeros_like(blocks), blocks, horizons)
    masks = BucketMasks.from_attributes(bucket, contexts, copies).additive(torch.float32)
    generator = torch.Generator().manual_seed(0)
    num_context = context_blocks.shape[1]
    shape = (bucket.sequences, num_context + bucket.copies * bucket.copy_tokens)
    states = [
        torch.randn(*shape, n, head_dim, generator=generator, requires_grad=True) for n in (heads, kv_heads, kv_heads)
    ]
    mask = visibility_mask(
        *(torch.cat([context, copy.flatten(1)], dim=1) for context, copy in zip(contexts, copies, strict=True))
    )
    query, key, value = (x.transpose(1, 2) for x in states)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask[:, None], scale=0.3, enable_gqa=True
    )
    seen = (blocks != PADDING_BLOCK).flatten(1)
    expected = dense.transpose(1, 2)[:, num_context:][seen]
    weights = torch.randn(expected.shape, generator=generator)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), states)
    own_query, own_key, own_value = (x[:, :, num_context:] for x in (query, key, value))
    copy_states = CopyStates(own_query, key[:, :, :num_context], value[:, :, :num_context], own_key, own_value)
    actual = attention(copy_states, masks, 0.3).transpose(1, 2)[seen]
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-6)
    actual_gradients = torch.autograd.grad((actual * weights).sum(), states)
    for gradient, other in zip(actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=5e-6)


def detached_reference(model: BagelModel, batch: PackedBatch) -> dict[str, torch.Tensor]:
    """
    Gradients of the texts of the exact forward, and of velocities with the contexts' keys and values cut off: the context
    of each copy is run once more without gradient, as a sequence of what it sees, and the copy predicted from it alone.
    """
    inputs, layout = batch.inputs, batch.velocities
    num_und, sequence_ids = inputs["input_ids"].shape[1], inputs["sequence_ids"][0]
    positions, blocks, horizons = (inputs[name][0] for name in ("positions", "blocks", "horizons"))
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(len(layout.image), *layout.mask.shape[1:], model.config.latent_channels, generator=generator)
    token_weights = torch.randn(len(inputs["score_targets"]), generator=generator)
    text_loss = (model(**inputs).log_probs * token_weights).sum()
    und, gen = model.embed_sequences(inputs)
    decoder, image_loss = model.language_model.model, torch.zeros(())
    for i, places in enumerate(inputs["velocity_index"]):
        place = num_und + int(places[0])
        visible = ((sequence_ids == sequence_ids[place]) & (blocks < horizons[place])).nonzero().flatten()
        visible_und, visible_gen = visible[visible < num_und], visible[visible >= num_und]
        own = ((sequence_ids == sequence_ids[place]) & (blocks == blocks[place])).nonzero().flatten()
        delimiters, latents = own[own < num_und], own[own >= num_und]
        assert len(latents) == int(layout.mask[i].sum())
        layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        if len(visible):
            with torch.no_grad():
                decoder(
                    und[:, visible_und],
                    gen[:, visible_gen - num_und] if len(visible_gen) else None,
                    positions[None, visible],
                    visibility_mask(*(x[None, visible] for x in (positions, blocks, horizons))),
                    CachedContext(layers),
                    prefill=True,
                )
        _, output, _ = decoder(
            und[:, delimiters],
            gen[:, latents - num_und],
            positions[None, own],
            torch.zeros(1, 1, 1, dtype=torch.bool),
            CachedContext(layers),
        )
        image_loss = image_loss + (model.llm2vae(output)[0] * weights[i, : len(latents)]).sum()
    return gradients(model, text_loss + image_loss)


class CachedContext:
    """Keys and values of what a copy sees, attended to by concatenation: the plainest cache there is."""

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.layers = layers

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.layers.append((keys, values))

    def layer(self, index: int) -> "CachedContext":
        return CachedContext(self.layers[index : index + 1])

    def attend(self, query, key, value, bias, scaling) -> torch.Tensor:
        if self.layers:
            ((keys, values),) = self.layers
            key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)


@pytest.mark.invariant
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager", "flex_attention"])
def test_detached_context(tiny_bagel: BagelModel, trajectories: list[Trajectory], attn_implementation: str) -> None:
    batch = tiny_bagel.pack(trajectories, CONFIG.guidance)
    assert {BRANCHES[b] for b in batch.velocities.branch} == set(BRANCHES)
    expected = tiny_bagel(**batch.inputs)
    expected_gradients = detached_reference(tiny_bagel, batch)
    exact_gradients = gradients(tiny_bagel, weighted_loss(tiny_bagel(**batch.inputs), batch))
    tiny_bagel.set_attn_implementation(attn_implementation)
    actual = tiny_bagel(**batch.inputs, context_gradient="detached")
    torch.testing.assert_close(actual.log_probs, expected.log_probs, rtol=0, atol=5e-6)
    mask = batch.velocities.mask
    torch.testing.assert_close(actual.velocities[mask], expected.velocities[mask], rtol=0, atol=1e-5)
    actual_gradients = gradients(tiny_bagel, weighted_loss(actual, batch))
    assert_equal_gradients(actual_gradients, expected_gradients)
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    assert not torch.allclose(actual_gradients[name], exact_gradients[name], rtol=0.05)


def test_detached_context_under_gradient_checkpointing(tiny_bagel: BagelModel, trajectories: list[Trajectory]) -> None:
    batch = tiny_bagel.pack(trajectories, CONFIG.guidance)
    expected = gradients(tiny_bagel, weighted_loss(tiny_bagel(**batch.inputs, context_gradient="detached"), batch))
    tiny_bagel.train()
    tiny_bagel.gradient_checkpointing_enable({"use_reentrant": False})
    actual = gradients(tiny_bagel, weighted_loss(tiny_bagel(**batch.inputs, context_gradient="detached"), batch))
    assert_equal_gradients(actual, expected)


def test_detached_context_without_texts_or_guidance(tiny_bagel: BagelModel, rollout: Callable) -> None:
    config = replace(CONFIG, guidance=GuidanceConfig(text_scale=1.0))
    for task in ("t2i", "think"):
        batch = tiny_bagel.pack(rollout(tiny_bagel, task, config), config.guidance)
        expected = tiny_bagel(**batch.inputs)
        actual = tiny_bagel(**batch.inputs, context_gradient="detached")
        torch.testing.assert_close(actual.velocities, expected.velocities, rtol=0, atol=1e-5)
        torch.testing.assert_close(actual.log_probs, expected.log_probs, rtol=0, atol=5e-6)


def mixed_trajectories(model: BagelModel, rollout: Callable, seed: int) -> list[Trajectory]:
    """Trajectories of two tasks and image sizes, so that sequences are padded."""
    tasks, grids = ("t2i", "think", "edit", "two_rounds"), ((2, 3), (4, 2), (3, 3), (1, 2))
    return [
        trajectory
        for i in (seed, seed + 1)
        for trajectory in rollout(model, tasks[i % 4], CONFIG, grid=grids[i % 3], seed=i, max_new_tokens=3 + i)
    ]


def long_attributes(seed: int) -> tuple[torch.Tensor, ...]:
    """Positions, blocks, horizons and sequences of random tokens, over several of flex attention's blocks of 128."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(-1, 12, (2, 5), generator=generator).repeat_interleave(61, dim=1)
    positions = torch.randint(0, 40, blocks.shape, generator=generator)
    is_noised, is_padding = blocks % 3 == 1, blocks == -1
    horizons = torch.where(is_padding, 0, torch.where(is_noised, blocks // 2, blocks))
    blocks = torch.where(is_padding, PADDING_BLOCK, torch.where(is_noised, NOISED_BLOCK + blocks, blocks))
    sequence_ids = torch.arange(2).repeat_interleave(torch.tensor([200, 105])).expand(2, -1)
    return positions, blocks, horizons, sequence_ids


def dense_mask(mask: BlockMask, batch: int, length: int) -> torch.Tensor:
    return create_mask(mask.mask_mod, batch, 1, length, length, device="cpu")[:, 0]


@pytest.mark.parametrize("seed", range(4))
def test_block_mask_is_the_mask_of_all_pairs(tiny_bagel: BagelModel, rollout: Callable, seed: int) -> None:
    inputs = tiny_bagel.pack(mixed_trajectories(tiny_bagel, rollout, seed), CONFIG.guidance).inputs
    for attributes in (
        [inputs[name] for name in ("positions", "blocks", "horizons", "sequence_ids")],
        long_attributes(seed),
    ):
        expected = visibility_mask(*attributes)
        assert 0.02 < expected.float().mean() < 0.98
        mask = visibility_block_mask(*attributes)
        assert torch.equal(dense_mask(mask, *attributes[0].shape), expected)


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
    # A block at the edge is not full, because it reaches beyond the last token.
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
def test_flex_attention_in_packed_forward_and_rollout(
    tiny_bagel: BagelModel, rollout: Callable, checkpointed: bool
) -> None:
    trajectories = mixed_trajectories(tiny_bagel, rollout, 2)
    batch = tiny_bagel.pack(trajectories, CONFIG.guidance)
    expected = tiny_bagel(**batch.inputs)
    (expected.log_probs.sum() + expected.velocities.square().sum()).backward()
    gradients = {name: p.grad.clone() for name, p in tiny_bagel.named_parameters() if p.grad is not None}
    tiny_bagel.zero_grad()

    tiny_bagel.set_attn_implementation("flex_attention")
    assert tiny_bagel.config.vision_config._attn_implementation == "sdpa"
    with torch.no_grad():
        sampled = mixed_trajectories(tiny_bagel, rollout, 2)
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
        # A bias of all keys has no effect under a softmax. Its gradient is rounding, of a size that its weight's tells.
        is_rounding = name.startswith("vit_model.") and name.endswith("k_proj.bias")
        scale = gradients[name.replace(".bias", ".weight")] if is_rounding else gradient
        torch.testing.assert_close(actual, gradient, rtol=1e-3, atol=1e-4 * float(scale.abs().max() + 1e-3), msg=name)


def test_loaded_with_flex_attention(tiny_bagel: BagelModel, tmp_path: Path) -> None:
    tiny_bagel.save_pretrained(tmp_path)
    model = BagelModel.from_pretrained(tmp_path, attn_implementation="flex_attention")
    assert model.config.text_config._attn_implementation == "flex_attention"
    assert model.config.vision_config._attn_implementation == "sdpa"
