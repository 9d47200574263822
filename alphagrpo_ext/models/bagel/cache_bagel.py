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

"""Keys and values of contexts: a prefix that a whole group shares, and slots that one thought's images may share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch


@dataclass
class BagelCache:
    """
    Cache of `rows` samples that share `prefixes` contexts, sample `i` the prefix `i // (rows // prefixes)`.

    Prefixes are computed once and read in place by every sample of their group. The slots after a prefix are
    allocated once; a block is written into them and attention reads a view, so that nothing is ever copied.

    Args:
        prefix_keys, prefix_values (`list[torch.Tensor]`): A layer each, `(prefixes, kv_heads, prefix_slots, head_dim)`.
        prefix_mask (`torch.Tensor` of shape `(prefixes, prefix_slots)`): False on padding.
        keys, values (`list[torch.Tensor]`): A layer each, `(rows, kv_heads, capacity, head_dim)`.
        mask (`torch.Tensor` of shape `(rows, capacity)`): Slots that later blocks may see.
        positions (`torch.Tensor` of shape `(rows,)`): Rotary position of the next token.
        length (`int`): Slots in use.
    """

    prefix_mask: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    length: int = 0
    prefix_keys: list[torch.Tensor] = field(default_factory=list)
    prefix_values: list[torch.Tensor] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return len(self.positions)

    @property
    def group_size(self) -> int:
        return self.num_rows // len(self.prefix_mask)

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
            prefix_mask=self.prefix_mask[:num_prefixes],
            mask=self.mask[:num_rows],
            positions=self.positions[:num_rows],
            prefix_keys=[t[:num_prefixes] for t in self.prefix_keys],
            prefix_values=[t[:num_prefixes] for t in self.prefix_values],
            keys=[t[:num_rows] for t in self.keys],
            values=[t[:num_rows] for t in self.values],
        )

    def select_prefixes(self, index: Sequence[int]) -> BagelCache:
        """A cache without slots yet, with a group for every prefix that `index` names, once or several times."""
        group_size, index = self.group_size, torch.tensor(index, device=self.prefix_mask.device)
        return replace(
            self,
            prefix_mask=self.prefix_mask[index],
            mask=self.mask.new_zeros(len(index) * group_size, self.mask.shape[1]),
            positions=self.positions[::group_size][index].repeat_interleave(group_size),
            prefix_keys=[t[index] for t in self.prefix_keys],
            prefix_values=[t[index] for t in self.prefix_values],
        )

    def visibility(self, block_mask: torch.Tensor) -> torch.Tensor:
        """
        What `n` new tokens see: the prefix, the slots in use, and of each other what `block_mask` says.

        Args:
            block_mask (`torch.Tensor` of shape `(rows or 1, n, n)`): Visibility among the new tokens.

        Returns:
            `torch.Tensor` of shape `(rows, n, prefix_slots + length + n)`.
        """
        rows, num_tokens = self.num_rows, block_mask.shape[1]
        prefix = self.prefix_mask.repeat_interleave(self.group_size, dim=0)
        past = torch.cat([prefix, self.mask[:, : self.length]], dim=1)
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

    def commit(self, num_tokens: int, valid: torch.Tensor, positions: torch.Tensor) -> None:
        """
        Keep the `num_tokens` slots that the last forward wrote.

        Args:
            num_tokens (`int`): Slots written.
            valid (`torch.Tensor` of shape `(rows, num_tokens)`): Which of them later blocks may see.
            positions (`torch.Tensor` of shape `(rows,)`): Rotary position of the next token.
        """
        self.mask[:, self.length : self.length + num_tokens] = valid
        self.length += num_tokens
        self.positions = positions


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
