# SPDX-License-Identifier: Apache-2.0

"""
How BAGEL lays out texts and images as tokens, and which tokens see which.

- A *sequence* is what the model reads as one context: a list of blocks.
- A *block* is a text, the latents of an image, or the patches of an image for the vision tower, with a start and an
  end delimiter.
- The *understanding expert* (`und`) runs on texts, delimiters and patches, the *generation expert* (`gen`) on latents.
- The *horizon* of a token is the number of the first block that it does not see, apart from its own.
- The *extent* of a sequence is where it ends: the rotary position and the block number of what would follow.

Text is causal, tokens of an image see each other, and every block sees the blocks before it. Nobody but itself sees a
noised image. All of that follows from three numbers per token: rotary position, block and horizon.

Tokens of the two experts are kept in two tensors from embedding to output, and meet only in attention. Each expert
thus runs on a dense tensor, without the gather and scatter of the reference implementation. Attention does not depend
on the order of tokens, because visibility does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from alphagrpo_ext.models.bagel.configuration_bagel import BagelConfig
from alphagrpo_ext.trajectory import Segment, TextSegment


NOISED_BLOCK = 1 << 20
"""Number of a sequence's first noised block, beyond every horizon."""
PADDING_BLOCK = 1 << 30
"""Number of the block that all padding of a sequence belongs to, beyond every horizon."""
PADDING = {"positions": 0, "blocks": PADDING_BLOCK, "horizons": 0}
"""Attributes of padding."""


def grid_position_ids(
    rows: int, columns: int, max_side: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """
    Places of an image's tokens in a position table of `max_side` rows and columns.

    Returns:
        `torch.Tensor` of shape `(rows * columns,)`: Integers in [0, max_side**2).

    Raises:
        `ValueError`: If the image is larger than the table.
    """
    if rows > max_side or columns > max_side:
        raise ValueError(f"an image of {rows} x {columns} tokens does not fit the position table of side {max_side}")
    row, column = (torch.arange(side, device=device) for side in (rows, columns))
    return (row[:, None] * max_side + column).flatten()


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """`(..., channels, height, width)` to `(..., tokens, patch_size**2 * channels)`, channels varying fastest."""
    *batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(*batch, channels, rows, patch_size, columns, patch_size)
    patches = patches.movedim((-4, -2, -3, -1, -5), (-5, -4, -3, -2, -1))
    return patches.reshape(*batch, rows * columns, patch_size * patch_size * channels)


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """Inverse of [`patchify`], for images of `grid` rows and columns of tokens."""
    *batch, _, size = tokens.shape
    channels = size // patch_size**2
    patches = tokens.reshape(*batch, grid[0], grid[1], patch_size, patch_size, channels)
    images = patches.movedim((-1, -5, -3, -4, -2), (-5, -4, -3, -2, -1))
    return images.reshape(*batch, channels, grid[0] * patch_size, grid[1] * patch_size)


def sees(
    query_position: torch.Tensor,
    query_block: torch.Tensor,
    query_horizon: torch.Tensor,
    key_position: torch.Tensor,
    key_block: torch.Tensor,
) -> torch.Tensor:
    """
    Whether a query sees a key of its sequence, from integer attributes of shapes that broadcast.

    Inside its block a token sees the tokens at its own position or before. That is causal for a text, whose positions
    rise, and bidirectional for an image, whose positions are equal. Of the other blocks it sees those before its
    horizon. Padding sees padding, so that every query sees at least one key.
    """
    return ((query_block == key_block) & (key_position <= query_position)) | (key_block < query_horizon)


def visibility_mask(
    positions: torch.Tensor, blocks: torch.Tensor, horizons: torch.Tensor, sequence_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Mask of all pairs of tokens; see [`sees`].

    Args:
        positions, blocks, horizons (`torch.Tensor` of shape `(batch, tokens)`): Attributes of every token.
        sequence_ids (`torch.Tensor` of shape `(batch, tokens)`, *optional*):
            The sequence of every token, where several sequences are concatenated.

    Returns:
        `torch.Tensor` of shape `(batch, tokens, tokens)`, bool, queries before keys.
    """
    query = (x[:, :, None] for x in (positions, blocks, horizons))
    mask = sees(*query, positions[:, None, :], blocks[:, None, :])
    return mask if sequence_ids is None else mask & (sequence_ids[:, :, None] == sequence_ids[:, None, :])


class Extent(NamedTuple):
    """
    Where a sequence, or the beginning of one, ends.

    Args:
        position (`int`): Rotary position of the next token.
        num_blocks (`int`): Number of the next block, which is the horizon of what sees all blocks so far.
    """

    position: int
    num_blocks: int


BEGINNING = Extent(0, 0)
"""Extent of nothing."""


@dataclass
class ExpertTokens:
    """Attributes of one expert's tokens in a sequence, one entry for each run of tokens in the same block."""

    positions: list[torch.Tensor] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    horizons: list[int] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every run."""
        return [len(positions) for positions in self.positions]

    def append(self, positions: torch.Tensor, block: int, horizon: int) -> None:
        """Add a run of tokens at `positions` `(tokens,)`."""
        self.positions.append(positions)
        self.blocks.append(block)
        self.horizons.append(horizon)

    def attributes(self) -> dict[str, torch.Tensor]:
        """Positions, blocks and horizons of all tokens, each `(tokens,)`."""
        lengths = torch.tensor(self.lengths, dtype=torch.long)
        return {
            "positions": torch.cat([torch.zeros(0, dtype=torch.long), *self.positions]),
            "blocks": torch.tensor(self.blocks, dtype=torch.long).repeat_interleave(lengths),
            "horizons": torch.tensor(self.horizons, dtype=torch.long).repeat_interleave(lengths),
        }


class BagelSequence:
    """
    A sequence under construction: blocks are appended in the order in which the model reads them.

    Args:
        config ([`BagelConfig`]): Sizes and delimiters.
        start ([`Extent`], *optional*): Extent of what the sequence continues.
    """

    def __init__(self, config: BagelConfig, start: Extent = BEGINNING) -> None:
        self.config = config
        self.position, self.num_blocks = start
        self.num_noised = 0
        self.extents = [start]
        """Where the first `n` segments end, for every `n`."""
        self.und, self.gen = ExpertTokens(), ExpertTokens()
        self.input_ids: list[int] = []
        self.latents: list[torch.Tensor] = []
        self.latent_position_ids: list[torch.Tensor] = []
        self.timesteps: list[float] = []
        self.vit_pixels: list[torch.Tensor] = []
        self.vit_starts: list[int] = []

    @classmethod
    def from_segments(
        cls, segments: Iterable[Segment], config: BagelConfig, start: Extent = BEGINNING
    ) -> BagelSequence:
        """A sequence of segments."""
        sequence = cls(config, start)
        for segment in segments:
            sequence.add_segment(segment)
        return sequence

    @property
    def extent(self) -> Extent:
        """Where the sequence ends."""
        return Extent(self.position, self.num_blocks)

    @property
    def num_tokens(self) -> int:
        """Tokens of both experts."""
        return sum(self.und.lengths) + sum(self.gen.lengths)

    def _add_image_delimiters(self, num_patches: int, block: int) -> None:
        """Add the start delimiter, placeholders of patches, and the end delimiter of an image block."""
        self.input_ids += [self.config.image_start_token_id, *[0] * num_patches, self.config.image_end_token_id]
        self.und.append(torch.full((num_patches + 2,), self.position), block, self.num_blocks)

    def add_text(self, token_ids: Sequence[int]) -> int:
        """Append a text block. Returns the index of its first delimiter among the understanding expert's tokens."""
        start = len(self.input_ids)
        ids = [self.config.bos_token_id, *token_ids, self.config.eos_token_id]
        self.input_ids += ids
        self.und.append(torch.arange(self.position, self.position + len(ids)), self.num_blocks, self.num_blocks)
        self.position += len(ids)
        self.num_blocks += 1
        return start

    def add_latents(
        self, latents: torch.Tensor, grid: tuple[int, int], timestep: float = 0.0, noised: bool = False
    ) -> int:
        """
        Append a block of latents.

        Args:
            latents (`torch.Tensor` of shape `(tokens, channels)`): Latents at time `timestep`.
            grid (`tuple[int, int]`): Their rows and columns.
            timestep (`float`, *optional*, defaults to `0.0`): Time in [0, 1].
            noised (`bool`, *optional*, defaults to `False`):
                Whether nothing else sees the block. It then takes no rotary position.

        Returns:
            `int`: Index of the first latent among the generation expert's tokens.
        """
        start = sum(self.gen.lengths)
        block = NOISED_BLOCK + self.num_noised if noised else self.num_blocks
        self._add_image_delimiters(0, block)
        self.gen.append(torch.full((len(latents),), self.position), block, self.num_blocks)
        self.latents.append(latents)
        self.latent_position_ids.append(grid_position_ids(*grid, self.config.max_latent_size))
        self.timesteps.append(timestep)
        if noised:
            self.num_noised += 1
        else:
            self.position += 1
            self.num_blocks += 1
        return start

    def add_pixels(self, pixel_values: torch.Tensor) -> None:
        """Append a vision-tower block of an image `(3, height, width)` in [-1, 1]."""
        patch_size = self.config.vision_config.patch_size
        num_patches = (pixel_values.shape[-2] // patch_size) * (pixel_values.shape[-1] // patch_size)
        self.vit_starts.append(len(self.input_ids) + 1)
        self.vit_pixels.append(pixel_values)
        self._add_image_delimiters(num_patches, self.num_blocks)
        self.position += 1
        self.num_blocks += 1

    def add_segment(self, segment: Segment) -> int | None:
        """
        Append a segment as context: a text, or an image as latents, if it has any, and patches, if it has pixels. Returns the result
        of [`~BagelSequence.add_text`] for a text.
        """
        start = None
        if isinstance(segment, TextSegment):
            start = self.add_text(segment.content_ids)
        else:
            if len(segment.latents):
                self.add_latents(segment.latents, segment.grid)
            if segment.pixel_values is not None:
                self.add_pixels(segment.pixel_values)
        self.extents.append(self.extent)
        return start


def _pad(tensors: list[torch.Tensor], value: float = 0) -> torch.Tensor:
    return pad_sequence(tensors, batch_first=True, padding_value=value)


def _pad_und(tensors: list[torch.Tensor], value: float = 0) -> torch.Tensor:
    """Pad to at least one token, because attention refuses a batch in which all contexts are empty."""
    padded = _pad(tensors, value)
    return padded if padded.shape[1] else padded.new_full((len(tensors), 1), value)


def collate_tokens(sequences: Sequence[BagelSequence], config: BagelConfig) -> dict[str, torch.Tensor]:
    """
    Pad sequences to a batch, without the pixels for the vision tower.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` `(batch, und)`; `positions`, `blocks`, `horizons` `(batch, und + gen)`,
        understanding tokens first; where there are latents, `latents` `(batch, gen, channels)`, `latent_position_ids`
        `(batch, gen)`, `timesteps` `(batch, images)` and `timestep_index` `(batch, gen)`.
    """
    inputs = {"input_ids": _pad_und([torch.tensor(s.input_ids, dtype=torch.long) for s in sequences])}
    und, gen = [s.und.attributes() for s in sequences], [s.gen.attributes() for s in sequences]
    for name, fill in PADDING.items():
        parts = _pad_und([tokens[name] for tokens in und], fill), _pad([tokens[name] for tokens in gen], fill)
        inputs[name] = torch.cat(parts, dim=1)
    if any(s.latents for s in sequences):
        no_latents, no_ids = torch.zeros(0, config.latent_channels), torch.zeros(0, dtype=torch.long)
        lengths = [torch.tensor(s.gen.lengths, dtype=torch.long) for s in sequences]
        inputs |= {
            "latents": _pad([torch.cat([no_latents, *s.latents]).float() for s in sequences]),
            "latent_position_ids": _pad([torch.cat([no_ids, *s.latent_position_ids]) for s in sequences]),
            "timesteps": _pad([torch.tensor(s.timesteps, dtype=torch.float32) for s in sequences]),
            "timestep_index": _pad([torch.arange(len(n)).repeat_interleave(n) for n in lengths]),
        }
    return inputs


def collate_pixels(
    sequences: Sequence[BagelSequence], starts: Sequence[int], config: BagelConfig
) -> dict[str, torch.Tensor]:
    """
    Patches of the images that sequences look at, each image once however many blocks show it.

    Args:
        sequences (`Sequence[BagelSequence]`): Sequences.
        starts (`Sequence[int]`): Index of the first token of every sequence in the flattened `input_ids`.
        config ([`BagelConfig`]): Sizes.

    Returns:
        `dict[str, torch.Tensor]`: Empty without vision blocks, else `vit_patches` `(images, patches, values)`,
        `vit_position_ids` and `vit_mask` `(images, patches)`; and `vit_image` `(blocks,)`, the image of every block,
        and `vit_index` `(blocks, patches)`, the index of its patches in the flattened `input_ids`.
    """
    patch_size, side = config.vision_config.patch_size, config.vision_patches_per_side
    images: dict[torch.Tensor, int] = {}
    block_images, block_starts = [], []
    for sequence, sequence_start in zip(sequences, starts, strict=True):
        for pixels, start in zip(sequence.vit_pixels, sequence.vit_starts, strict=True):
            block_images.append(images.setdefault(pixels, len(images)))
            block_starts.append(sequence_start + start)
    if not images:
        return {}
    grids = [(pixels.shape[-2] // patch_size, pixels.shape[-1] // patch_size) for pixels in images]
    lengths = [rows * columns for rows, columns in grids]
    index = [torch.arange(lengths[i]) + start for i, start in zip(block_images, block_starts, strict=True)]
    return {
        "vit_patches": _pad([patchify(pixels, patch_size) for pixels in images]),
        "vit_position_ids": _pad([grid_position_ids(*grid, side) for grid in grids]),
        "vit_mask": _pad([torch.ones(length, dtype=torch.bool) for length in lengths], False),
        "vit_image": torch.tensor(block_images),
        "vit_index": _pad(index),
    }


def collate_sequences(sequences: Sequence[BagelSequence], config: BagelConfig) -> dict[str, torch.Tensor]:
    """Pad sequences to a batch. Returns what [`collate_tokens`] and [`collate_pixels`] return."""
    inputs = collate_tokens(sequences, config)
    width = inputs["input_ids"].shape[1]
    return inputs | collate_pixels(sequences, range(0, len(sequences) * width, width), config)
