# SPDX-License-Identifier: Apache-2.0

"""Keys and values of contexts: a prefix that a whole group shares, and slots that one thought's images may share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from alphagrpo_ext.models.bagel.layout import PADDING_BLOCK
from alphagrpo_ext.trajectory import Segment


@dataclass
class BagelCache:
    """
    Cache of `rows` samples that share `prefixes` contexts, sample `i` the prefix `i // (rows // prefixes)`.

    Prefixes are computed once and read in place by every sample of their group. The slots after a prefix are
    allocated once; a block is written into them and attention reads a view, so that a turn copies nothing.

    Args:
        prefix_blocks (`torch.Tensor` of shape `(prefixes, prefix_slots)`):
            Number of the block that each slot belongs to; `PADDING_BLOCK` where nothing can be seen.
        blocks (`torch.Tensor` of shape `(rows, capacity)`): The same of the slots after the prefix.
        positions (`torch.Tensor` of shape `(rows,)`): Rotary position of the next token.
        num_blocks (`torch.Tensor` of shape `(rows,)`): Number of the next block.
        length (`int`): Slots in use.
        prefix_keys, prefix_values (`list[torch.Tensor]`): A layer each, `(prefixes, kv_heads, prefix_slots, head_dim)`.
        keys, values (`list[torch.Tensor]`): A layer each, `(rows, kv_heads, capacity, head_dim)`.
        segments (`list[list[Segment]]`, *optional*): What every row holds. `None` if that is not known.
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
        """A cache with one row a prefix and no slots yet."""
        return cls(prefix_blocks, prefix_blocks[:, :0], positions, num_blocks)

    @property
    def num_rows(self) -> int:
        return len(self.positions)

    @property
    def group_size(self) -> int:
        return self.num_rows // len(self.prefix_blocks)

    @property
    def prefix_mask(self) -> torch.Tensor:
        """Prefix slots that can be seen, `(prefixes, prefix_slots)`."""
        return self.prefix_blocks != PADDING_BLOCK

    @property
    def mask(self) -> torch.Tensor:
        """The same of the slots in use after them, `(rows, length)`."""
        return self.blocks[:, : self.length] != PADDING_BLOCK

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep the keys and values of the prefix that the layer after the last one computed."""
        self.prefix_keys.append(keys)
        self.prefix_values.append(values)

    def head(self, num_rows: int) -> BagelCache:
        """The first `num_rows` samples, as views; they must be whole groups."""
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
        """`group_size` samples for every row of a cache without slots, each with `capacity` slots of its own."""
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

    def select(self, index: Sequence[int], ends: Sequence[tuple[int, int]]) -> BagelCache:
        """
        A row for every beginning of a row, of a cache without slots, which is used up.

        Args:
            index (`Sequence[int]`): Rows, once, several times or never.
            ends (`Sequence[tuple[int, int]]`): Rotary position and number of blocks where each beginning ends.
        """
        positions, num_blocks = torch.tensor(list(ends), device=self.positions.device).reshape(-1, 2).T
        # Rows that stay where they are, are not copied; the others layer by layer, so that no two caches are held.
        if list(index) != list(range(self.num_rows)):
            of_rows = torch.tensor(index, device=self.positions.device)
            self.prefix_blocks = self.prefix_blocks[of_rows]
            for states in (self.prefix_keys, self.prefix_values):
                for layer, tensor in enumerate(states):
                    states[layer] = tensor[of_rows]
        blocks = self.prefix_blocks.masked_fill(self.prefix_blocks >= num_blocks[:, None], PADDING_BLOCK)
        return replace(self, prefix_blocks=blocks, blocks=blocks[:, :0], positions=positions, num_blocks=num_blocks)

    def continued(self, rows: Sequence[int], num_blocks: Sequence[int], capacity: int) -> BagelCache:
        """
        Beginnings of rows, to go on from. The cache is used up, layer by layer, so that no two are held.

        Args:
            rows (`Sequence[int]`): Rows, once, several times or never.
            num_blocks (`Sequence[int]`): Blocks that are kept of each.
            capacity (`int`): Slots for what follows.

        Returns:
            [`BagelCache`] with an empty prefix, the slots of which hold prefix and slots of this one.
        """
        device = self.positions.device
        of_rows, ends = (torch.tensor(list(values), device=device) for values in (rows, num_blocks))
        of_prefixes = of_rows // self.group_size
        blocks = torch.cat([self.prefix_blocks[of_prefixes], self.blocks[of_rows, : self.length]], dim=1)
        blocks = blocks.masked_fill(blocks >= ends[:, None], PADDING_BLOCK)
        num_slots = blocks.shape[1]

        def joined(prefixes: list[torch.Tensor], own: list[torch.Tensor]) -> list[torch.Tensor]:
            layers = []
            while prefixes:
                prefix, slots = prefixes.pop(0), own.pop(0)
                layer = prefix.new_zeros(len(of_rows), prefix.shape[1], num_slots + capacity, prefix.shape[3])
                layer[:, :, : prefix.shape[2]] = prefix[of_prefixes]
                layer[:, :, prefix.shape[2] : num_slots] = slots[of_rows, :, : self.length]
                layers.append(layer)
            return layers

        keys, values = joined(self.prefix_keys, self.keys), joined(self.prefix_values, self.values)
        spare = blocks.new_full((len(blocks), capacity), PADDING_BLOCK)
        return BagelCache(
            prefix_blocks=blocks[:, :0],
            blocks=torch.cat([blocks, spare], dim=1),
            positions=self.positions[of_rows],
            num_blocks=ends,
            length=num_slots,
            prefix_keys=[layer[:, :, :0] for layer in keys],
            prefix_values=[layer[:, :, :0] for layer in values],
            keys=keys,
            values=values,
        )

    def as_prefix(self) -> BagelCache:
        """A cache without slots, the prefix of which are the slots in use of this one, which has an empty prefix."""
        cache = BagelCache.without_slots(self.blocks[:, : self.length], self.positions, self.num_blocks)
        cache.prefix_keys, cache.prefix_values = (
            [t[:, :, : self.length] for t in states] for states in (self.keys, self.values)
        )
        return cache

    def visibility(self, block_mask: torch.Tensor) -> torch.Tensor:
        """
        What `n` new tokens see: the prefix, the slots in use, and of each other what `block_mask` says.

        Args:
            block_mask (`torch.Tensor` of shape `(rows or 1, n, n)`): Visibility among the new tokens.

        Returns:
            `torch.Tensor` of shape `(rows, n, prefix_slots + length + n)`.
        """
        rows, num_tokens = self.num_rows, block_mask.shape[1]
        past = torch.cat([self.prefix_mask.repeat_interleave(self.group_size, dim=0), self.mask], dim=1)
        return torch.cat(
            [past[:, None].expand(rows, num_tokens, -1), block_mask.expand(rows, num_tokens, num_tokens)], dim=2
        )

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """
        Attention of new tokens over prefix, slots in use and themselves. Writes their keys and values into the slots
        after those in use; they stay only if [`commit`] follows.

        Args:
            layer (`int`): Decoder layer.
            query (`torch.Tensor` of shape `(rows, heads, n, head_dim)`): Rotated queries.
            key, value (`torch.Tensor` of shape `(rows, kv_heads, n, head_dim)`): Rotated keys, and values.
            bias (`torch.Tensor` of shape `(rows, 1, n, prefix_slots + length + n)`): 0 where visible, else -inf.
            scaling (`float`): Factor of the scores.

        Returns:
            `torch.Tensor` of shape `(rows, heads, n, head_dim)`.
        """
        end = self.length + key.shape[2]
        own_keys, own_values = self.keys[layer], self.values[layer]
        own_keys[:, :, self.length : end] = key
        own_values[:, :, self.length : end] = value
        return attend_in_parts(
            query * scaling,
            [
                (self.prefix_keys[layer], self.prefix_values[layer]),
                (own_keys[:, :, :end], own_values[:, :, :end]),
            ],
            bias,
        )

    def commit(self, blocks: torch.Tensor, positions: torch.Tensor, num_blocks: torch.Tensor) -> None:
        """
        Keep the slots that the last forward wrote.

        Args:
            blocks (`torch.Tensor` of shape `(rows, num_tokens)`): Block of each; `PADDING_BLOCK` where nobody may look.
            positions (`torch.Tensor` of shape `(rows,)`): Rotary position of the next token.
            num_blocks (`torch.Tensor` of shape `(rows,)`): Number of the next block.
        """
        end = self.length + blocks.shape[1]
        self.blocks[:, self.length : end] = blocks
        self.length = end
        self.positions, self.num_blocks = positions, num_blocks


@dataclass(frozen=True)
class ForkedCache:
    """
    A cache each row of which is read, in place, by several samples: their images fork after one thought. Denoising them
    leaves nothing behind.

    Args:
        cache ([`BagelCache`]): What they share.
        forks (`int`): Samples a row, one after the other.
    """

    cache: BagelCache
    forks: int

    @property
    def positions(self) -> torch.Tensor:
        """Rotary position of the next token, `(samples,)`."""
        return self.cache.positions.repeat_interleave(self.forks)

    def visibility(self, block_mask: torch.Tensor) -> torch.Tensor:
        """As [`BagelCache.visibility`], for every sample; `block_mask` is the same for all, `(1, n, n)`."""
        return self.cache.visibility(block_mask).repeat_interleave(self.forks, dim=0)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """As [`BagelCache.attend`]; a sample's keys and values are used, and not written."""
        cache = self.cache
        return attend_in_parts(
            query * scaling,
            [
                (cache.prefix_keys[layer], cache.prefix_values[layer]),
                (cache.keys[layer][:, :, : cache.length], cache.values[layer][:, :, : cache.length]),
                (key, value),
            ],
            bias,
        )


def attend_in_parts(
    query: torch.Tensor, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], bias: torch.Tensor
) -> torch.Tensor:
    """
    Attention over keys and values in several tensors, some of which several consecutive rows share: these are read in
    place, by a reshape of the queries.

    Args:
        query (`torch.Tensor` of shape `(rows, heads, n, head_dim)`): Rotated and scaled queries.
        parts (`Sequence[tuple[torch.Tensor, torch.Tensor]]`):
            Keys and values, each `(sharers, kv_heads, slots, head_dim)`, with `sharers` a divisor of `rows`.
        bias (`torch.Tensor` of shape `(rows, 1, n, slots of all parts)`): 0 where visible, else -inf.

    Returns:
        `torch.Tensor` of shape `(rows, heads, n, head_dim)`.
    """
    rows, heads, num_tokens, head_dim = query.shape
    kv_heads = parts[0][0].shape[1]
    repeats = heads // kv_heads
    query = query.reshape(rows, kv_heads, repeats * num_tokens, head_dim)

    def to_shared(x: torch.Tensor, shared: int) -> torch.Tensor:
        x = x.reshape(shared, rows // shared, kv_heads, repeats * num_tokens, x.shape[-1]).transpose(1, 2)
        return x.reshape(shared, kv_heads, (rows // shared) * repeats * num_tokens, x.shape[-1])

    def from_shared(x: torch.Tensor, shared: int) -> torch.Tensor:
        x = x.reshape(shared, kv_heads, rows // shared, repeats * num_tokens, x.shape[-1]).transpose(1, 2)
        return x.reshape(rows, heads, num_tokens, x.shape[-1])

    parts = [(keys, values) for keys, values in parts if keys.shape[2]]
    scores = torch.cat(
        [from_shared(to_shared(query, len(keys)) @ keys.transpose(-1, -2), len(keys)) for keys, _ in parts], dim=-1
    )
    weights = torch.softmax(scores.float() + bias, dim=-1).to(parts[0][1].dtype)
    weights = weights.split([keys.shape[2] for keys, _ in parts], dim=-1)
    first, *others = (
        from_shared(to_shared(of_part, len(values)) @ values, len(values))
        for of_part, (_, values) in zip(weights, parts, strict=True)
    )
    return sum(others, first)
