# SPDX-License-Identifier: Apache-2.0

"""
Keys and values of contexts that BAGEL has read, for the samples that continue them.

- A *sample* is one entry of the batch that is sampled. The contract calls their number `num_rows`.
- A *prefix* is what the samples of a group share. It is computed once and read in place, by a reshape of the queries.
- *Slots* hold what follows the prefix, sample by sample. They are allocated once, and every block is written into
  them, so that a turn copies no cache. A denoising step writes behind the slots in use and does not claim them.

Each prefix slot and each slot stores its block number, so selecting the beginning of a context is a mask over slots.
Keys and values are copied only where a turn ends, layer by layer, so that no two caches are in memory at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from alphagrpo_ext.models.bagel.layout import PADDING_BLOCK, Extent
from alphagrpo_ext.trajectory import Segment


@dataclass
class BagelCache:
    """
    Cache of `samples` samples that share `prefixes` prefixes: sample `i` has the prefix `i // (samples // prefixes)`.

    Args:
        prefix_blocks (`torch.Tensor` of shape `(prefixes, prefix_slots)`):
            Number of the block that each slot belongs to; `PADDING_BLOCK` where nothing can be seen.
        blocks (`torch.Tensor` of shape `(samples, capacity)`): The same of the slots after the prefix.
        positions (`torch.Tensor` of shape `(samples,)`): Rotary position of the next token.
        num_blocks (`torch.Tensor` of shape `(samples,)`): Number of the next block.
        length (`int`): Slots in use.
        prefix_keys, prefix_values (`list[torch.Tensor]`):
            `(prefixes, kv_heads, prefix_slots, head_dim)` for every layer.
        keys, values (`list[torch.Tensor]`): `(samples, kv_heads, capacity, head_dim)` for every layer.
        segments (`list[list[Segment]]`, *optional*): What every sample has read. `None` if that is not known.
    """

    prefix_blocks: torch.Tensor
    blocks: torch.Tensor
    positions: torch.Tensor
    num_blocks: torch.Tensor
    length: int = 0
    prefix_keys: list[torch.Tensor] = field(default_factory=list)
    prefix_values: list[torch.Tensor] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    segments: list[list[Segment]] | None = None

    @classmethod
    def without_slots(
        cls, prefix_blocks: torch.Tensor, positions: torch.Tensor, num_blocks: torch.Tensor
    ) -> BagelCache:
        """A cache with one sample per prefix and no slots yet."""
        return cls(prefix_blocks, prefix_blocks[:, :0], positions, num_blocks)

    @property
    def num_rows(self) -> int:
        """Number of samples."""
        return len(self.positions)

    @property
    def group_size(self) -> int:
        """Samples per prefix."""
        return self.num_rows // len(self.prefix_blocks)

    @property
    def prefix_mask(self) -> torch.Tensor:
        """Prefix slots that can be seen, `(prefixes, prefix_slots)`."""
        return self.prefix_blocks != PADDING_BLOCK

    @property
    def mask(self) -> torch.Tensor:
        """Slots in use that can be seen, `(samples, length)`."""
        return self.blocks[:, : self.length] != PADDING_BLOCK

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """
        Keep the prefix's keys and values `(prefixes, kv_heads, prefix_slots, head_dim)` of a layer. Layers come in
        order.
        """
        self.prefix_keys.append(keys)
        self.prefix_values.append(values)

    def layer(self, index: int) -> BagelCache:
        """The keys and values of one layer, as views. [`attend`] needs a cache of one layer."""
        return BagelCache(
            self.prefix_blocks,
            self.blocks,
            self.positions,
            self.num_blocks,
            self.length,
            *([states[index]] for states in (self.prefix_keys, self.prefix_values, self.keys, self.values)),
        )

    def head(self, num_rows: int) -> BagelCache:
        """The first `num_rows` samples as views. They must be whole groups."""
        num_prefixes, rest = divmod(num_rows, self.group_size)
        if rest:
            raise ValueError(f"{num_rows} rows are no whole number of groups of {self.group_size}")
        return replace(
            self,
            prefix_blocks=self.prefix_blocks[:num_prefixes],
            blocks=self.blocks[:num_rows],
            positions=self.positions[:num_rows],
            num_blocks=self.num_blocks[:num_rows],
            prefix_keys=[t[:num_prefixes] for t in self.prefix_keys],
            prefix_values=[t[:num_prefixes] for t in self.prefix_values],
            keys=[t[:num_rows] for t in self.keys],
            values=[t[:num_rows] for t in self.values],
            segments=None if self.segments is None else self.segments[:num_rows],
        )

    def with_slots(self, group_size: int, capacity: int) -> BagelCache:
        """From a cache without slots, one with `group_size` samples per prefix that have `capacity` slots each."""
        num_rows = self.num_rows * group_size
        keys, values = (
            [t.new_zeros(num_rows, t.shape[1], capacity, t.shape[3]) for t in states]
            for states in (self.prefix_keys, self.prefix_values)
        )
        return replace(
            self,
            blocks=self.blocks.new_full((num_rows, capacity), PADDING_BLOCK),
            positions=self.positions.repeat_interleave(group_size),
            num_blocks=self.num_blocks.repeat_interleave(group_size),
            keys=keys,
            values=values,
        )

    def select_prefixes(self, indices: Sequence[int], extents: Sequence[Extent]) -> BagelCache:
        """
        Beginnings of the prefixes of a cache without slots, which is used up.

        Args:
            indices (`Sequence[int]`): The prefix that each beginning is taken from, in any order.
            extents (`Sequence[Extent]`): Where each beginning ends.
        """
        device = self.positions.device
        positions, num_blocks = torch.tensor(list(extents), device=device).reshape(-1, 2).T
        # Prefixes that stay where they are need no copy. Others are copied layer by layer.
        if list(indices) != list(range(self.num_rows)):
            index = torch.tensor(indices, device=device)
            self.prefix_blocks = self.prefix_blocks[index]
            for states in (self.prefix_keys, self.prefix_values):
                for layer, tensor in enumerate(states):
                    states[layer] = tensor[index]
        blocks = self.prefix_blocks.masked_fill(self.prefix_blocks >= num_blocks[:, None], PADDING_BLOCK)
        return replace(self, prefix_blocks=blocks, blocks=blocks[:, :0], positions=positions, num_blocks=num_blocks)

    def continue_samples(self, indices: Sequence[int], num_blocks: Sequence[int], capacity: int) -> BagelCache:
        """
        Beginnings of what samples have read, as slots that can be continued. The cache is used up layer by layer.

        Args:
            indices (`Sequence[int]`): The sample that each beginning is taken from, in any order.
            num_blocks (`Sequence[int]`): Number of blocks of each beginning.
            capacity (`int`): Slots for what follows.

        Returns:
            [`BagelCache`]: Its prefix is empty, and its slots hold prefix and slots of this cache.
        """
        device = self.positions.device
        samples, ends = (torch.tensor(list(values), device=device) for values in (indices, num_blocks))
        groups = samples // self.group_size
        blocks = torch.cat([self.prefix_blocks[groups], self.blocks[samples, : self.length]], dim=1)
        blocks = blocks.masked_fill(blocks >= ends[:, None], PADDING_BLOCK)
        num_slots = blocks.shape[1]

        def join(prefixes: list[torch.Tensor], slots: list[torch.Tensor]) -> list[torch.Tensor]:
            layers = []
            while prefixes:
                prefix, own = prefixes.pop(0), slots.pop(0)
                layer = prefix.new_zeros(len(samples), prefix.shape[1], num_slots + capacity, prefix.shape[3])
                layer[:, :, : prefix.shape[2]] = prefix[groups]
                layer[:, :, prefix.shape[2] : num_slots] = own[samples, :, : self.length]
                layers.append(layer)
            return layers

        keys, values = join(self.prefix_keys, self.keys), join(self.prefix_values, self.values)
        return BagelCache(
            prefix_blocks=blocks[:, :0],
            blocks=F.pad(blocks, (0, capacity), value=PADDING_BLOCK),
            positions=self.positions[samples],
            num_blocks=ends,
            length=num_slots,
            prefix_keys=[layer[:, :, :0] for layer in keys],
            prefix_values=[layer[:, :, :0] for layer in values],
            keys=keys,
            values=values,
        )

    def as_prefix(self) -> BagelCache:
        """From a cache with an empty prefix, one without slots whose prefix is the slots in use, as views."""
        cache = BagelCache.without_slots(self.blocks[:, : self.length], self.positions, self.num_blocks)
        cache.prefix_keys, cache.prefix_values = (
            [t[:, :, : self.length] for t in states] for states in (self.keys, self.values)
        )
        return cache

    def visibility(self, block_mask: torch.Tensor) -> torch.Tensor:
        """
        Mask of `n` new tokens of every sample. They see all visible prefix slots and slots in use.

        Args:
            block_mask (`torch.Tensor` of shape `(samples or 1, n, n)`, bool): Which new tokens see which.

        Returns:
            `torch.Tensor` of shape `(samples, n, prefix_slots + length + n)`, bool.
        """
        num_samples, num_tokens = self.num_rows, block_mask.shape[1]
        past = torch.cat([self.prefix_mask.repeat_interleave(self.group_size, dim=0), self.mask], dim=1)
        return torch.cat(
            [past[:, None].expand(num_samples, num_tokens, -1), block_mask.expand(num_samples, -1, -1)], dim=2
        )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """
        Attention of new tokens over prefix, slots in use and themselves. Their keys and values are written into the
        slots behind those in use, where they stay only if [`commit`] follows.

        Args:
            query (`torch.Tensor` of shape `(samples, heads, n, head_dim)`): Rotated queries.
            key, value (`torch.Tensor` of shape `(samples, kv_heads, n, head_dim)`): Rotated keys, and values.
            bias (`torch.Tensor` of shape `(samples, 1, n, prefix_slots + length + n)`):
                0 where visible, else very low.
            scaling (`float`): Factor of the scores.

        Returns:
            `torch.Tensor` of shape `(samples, heads, n, head_dim)`.
        """
        end = self.length + key.shape[2]
        (own_keys,), (own_values,) = self.keys, self.values
        own_keys[:, :, self.length : end] = key
        own_values[:, :, self.length : end] = value
        return attend_in_parts(
            query * scaling,
            [
                (*self.prefix_keys, *self.prefix_values),
                (own_keys[:, :, :end], own_values[:, :, :end]),
            ],
            bias,
        )

    def commit(self, blocks: torch.Tensor, positions: torch.Tensor, num_blocks: torch.Tensor) -> None:
        """
        Keep the slots that the last forward wrote.

        Args:
            blocks (`torch.Tensor` of shape `(samples, num_tokens)`):
                Block of each slot; `PADDING_BLOCK` where nothing can be seen.
            positions (`torch.Tensor` of shape `(samples,)`): Rotary position of the next token.
            num_blocks (`torch.Tensor` of shape `(samples,)`): Number of the next block.
        """
        end = self.length + blocks.shape[1]
        self.blocks[:, self.length : end] = blocks
        self.length = end
        self.positions, self.num_blocks = positions, num_blocks


@dataclass(frozen=True)
class ForkedCache:
    """
    A view of a cache for several images per sample, which are painted after one thought. Each image reads the sample's
    keys and values in place, by a reshape of the queries, and writes none.

    Args:
        cache ([`BagelCache`]): The cache.
        forks (`int`): Consecutive images per sample.
    """

    cache: BagelCache
    forks: int

    def layer(self, index: int) -> ForkedCache:
        """As [`BagelCache.layer`], for every image."""
        return ForkedCache(self.cache.layer(index), self.forks)

    @property
    def positions(self) -> torch.Tensor:
        """Rotary position of the next token, `(images,)`."""
        return self.cache.positions.repeat_interleave(self.forks)

    def visibility(self, block_mask: torch.Tensor) -> torch.Tensor:
        """As [`BagelCache.visibility`], for every image. `block_mask` `(1, n, n)` is the same for all."""
        return self.cache.visibility(block_mask).repeat_interleave(self.forks, dim=0)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """As [`BagelCache.attend`], for every image. The images' keys and values are not written."""
        cache = self.cache
        return attend_in_parts(
            query * scaling,
            [
                (*cache.prefix_keys, *cache.prefix_values),
                tuple(states[0][:, :, : cache.length] for states in (cache.keys, cache.values)),
                (key, value),
            ],
            bias,
        )


def attend_in_parts(
    query: torch.Tensor, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], bias: torch.Tensor
) -> torch.Tensor:
    """
    Attention over keys and values in several tensors. Consecutive samples may share a part of them, which is read in
    place by a reshape of the queries.

    Args:
        query (`torch.Tensor` of shape `(samples, heads, n, head_dim)`): Rotated and scaled queries.
        parts (`Sequence[tuple[torch.Tensor, torch.Tensor]]`):
            Keys and values, each `(sharers, kv_heads, slots, head_dim)`, where `sharers` divides `samples`.
        bias (`torch.Tensor` of shape `(samples, 1, n, slots of all parts)`): 0 where visible, else very low.

    Returns:
        `torch.Tensor` of shape `(samples, heads, n, head_dim)`.
    """
    num_samples, heads, num_tokens, head_dim = query.shape
    kv_heads = parts[0][0].shape[1]
    repeats = heads // kv_heads
    query = query.reshape(num_samples, kv_heads, repeats * num_tokens, head_dim)

    def to_shared(x: torch.Tensor, shared: int) -> torch.Tensor:
        x = x.reshape(shared, num_samples // shared, kv_heads, repeats * num_tokens, x.shape[-1]).transpose(1, 2)
        return x.reshape(shared, kv_heads, (num_samples // shared) * repeats * num_tokens, x.shape[-1])

    def from_shared(x: torch.Tensor, shared: int) -> torch.Tensor:
        x = x.reshape(shared, kv_heads, num_samples // shared, repeats * num_tokens, x.shape[-1]).transpose(1, 2)
        return x.reshape(num_samples, heads, num_tokens, x.shape[-1])

    parts = [(keys, values) for keys, values in parts if keys.shape[2]]
    scores = torch.cat(
        [from_shared(to_shared(query, len(keys)) @ keys.transpose(-1, -2), len(keys)) for keys, _ in parts], dim=-1
    )
    weights = torch.softmax(scores.float() + bias, dim=-1).to(parts[0][1].dtype)
    weights = weights.split([keys.shape[2] for keys, _ in parts], dim=-1)
    first, *others = (
        from_shared(to_shared(part_weights, len(values)) @ values, len(values))
        for part_weights, (_, values) in zip(weights, parts, strict=True)
    )
    return sum(others, first)
