# SPDX-License-Identifier: Apache-2.0

"""How BAGEL lays out texts and images as tokens: blocks, rotary positions, and who sees whom.

A row is a sequence of blocks. Text is causal; an image block is seen fully by itself; every block sees the blocks
before it, except noised images, which nobody but themselves sees. All of that follows from three numbers a token: its
rotary position, its block, and its horizon, the first block that it does not see any more. Tokens of the understanding
expert and tokens of the generation expert are kept in two tensors, so that each expert runs on its own tokens without
gather or scatter; attention does not mind the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from alphagrpo_ext.models.bagel.configuration_bagel import BagelConfig
from alphagrpo_ext.trajectory import Segment, TextSegment


NOISED_BLOCK = 1 << 20
"""Number of a row's first noised block, beyond every horizon."""
PADDING_BLOCK = 1 << 30
"""Number of what pads a row, beyond every horizon as well."""


def grid_position_ids(rows: int, columns: int, max_side: int) -> torch.Tensor:
    """Flattened two-dimensional positions `(rows * columns,)`; `max_side` is the side of the table, not the image's."""
    if rows > max_side or columns > max_side:
        raise ValueError(f"an image of {rows} x {columns} tokens does not fit the position table of side {max_side}")
    return (torch.arange(rows)[:, None] * max_side + torch.arange(columns)).flatten()


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """`(..., channels, height, width)` to `(..., tokens, patch_size**2 * channels)`, channel fastest."""
    *batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(*batch, channels, rows, patch_size, columns, patch_size)
    patches = patches.movedim((-4, -2, -3, -1, -5), (-5, -4, -3, -2, -1))
    return patches.reshape(*batch, rows * columns, patch_size * patch_size * channels)


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """Inverse of [`patchify`]."""
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
    Whether a query sees a key of its row, from attributes that broadcast.

    Inside a block a token sees those at its own position or before, which is causal for text, whose positions rise, and
    full for an image, whose positions are equal. Of other blocks it sees those before its horizon, where no noised block
    is. Padding sees padding, so that no row of the mask is empty.
    """
    return ((query_block == key_block) & (key_position <= query_position)) | (key_block < query_horizon)


def visibility_mask(
    positions: torch.Tensor, blocks: torch.Tensor, horizons: torch.Tensor, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Who [`sees`] whom, from the attributes that [`collate_rows`] gives every token, each `(batch, tokens)`; `rows` tells
    rows apart that follow each other in one sequence.

    Returns:
        `torch.Tensor` of shape `(batch, tokens, tokens)`, bool, queries before keys.
    """
    query = (x[:, :, None] for x in (positions, blocks, horizons))
    mask = sees(*query, positions[:, None, :], blocks[:, None, :])
    return mask if rows is None else mask & (rows[:, :, None] == rows[:, None, :])


@dataclass
class _Expert:
    """Attributes of one expert's tokens in a row, as runs."""

    positions: list[torch.Tensor] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    horizons: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def append(self, positions: torch.Tensor, block: int, horizon: int) -> None:
        self.positions.append(positions)
        self.blocks.append(block)
        self.horizons.append(horizon)
        self.lengths.append(len(positions))

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        lengths = torch.tensor(self.lengths, dtype=torch.long)
        positions = torch.cat(self.positions) if self.positions else torch.zeros(0, dtype=torch.long)
        blocks = torch.tensor(self.blocks, dtype=torch.long).repeat_interleave(lengths)
        horizons = torch.tensor(self.horizons, dtype=torch.long).repeat_interleave(lengths)
        return positions, blocks, horizons


class BagelRow:
    """
    One packed sequence under construction: append blocks in the order in which the model sees them.

    Args:
        config ([`BagelConfig`]): Sizes and delimiters.
        position, num_blocks (`int`, *optional*, defaults to `0`): Where the sequence goes on, if something is before it.
    """

    def __init__(self, config: BagelConfig, position: int = 0, num_blocks: int = 0) -> None:
        self.config = config
        self.position = position
        self.num_blocks, self.num_noised = num_blocks, 0
        # Position and number of blocks before the first segment and after each.
        self.ends = [(position, num_blocks)]
        self.und, self.gen = _Expert(), _Expert()
        self.input_ids: list[int] = []
        self.latents: list[torch.Tensor] = []
        self.latent_position_ids: list[torch.Tensor] = []
        self.timesteps: list[float] = []
        self.vit_pixels: list[torch.Tensor] = []
        self.vit_starts: list[int] = []

    @property
    def num_tokens(self) -> int:
        """Tokens of both experts."""
        return sum(self.und.lengths) + sum(self.gen.lengths)

    def _image_delimiters(self, num_inner: int, block: int) -> None:
        """Start, `num_inner` places of the understanding expert, and end of an image block."""
        self.input_ids += [self.config.image_start_token_id, *[0] * num_inner, self.config.image_end_token_id]
        self.und.append(torch.full((num_inner + 2,), self.position), block, self.num_blocks)

    def add_text(self, token_ids: Sequence[int]) -> int:
        """Append a text block; returns the place of its first delimiter among the understanding expert's tokens."""
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
        """Append a VAE block; a noised one leaves the rotary position where it was. Returns its place in `gen`."""
        start = sum(self.gen.lengths)
        block = NOISED_BLOCK + self.num_noised if noised else self.num_blocks
        self._image_delimiters(0, block)
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
        """Append a vision-tower block of an image `(3, height, width)`."""
        patch_size = self.config.vision_config.patch_size
        num_patches = (pixel_values.shape[-2] // patch_size) * (pixel_values.shape[-1] // patch_size)
        self.vit_starts.append(len(self.input_ids) + 1)
        self.vit_pixels.append(pixel_values)
        self._image_delimiters(num_patches, self.num_blocks)
        self.position += 1
        self.num_blocks += 1

    def add_segment(self, segment: Segment) -> int | None:
        """
        Append a segment as context: a text, or an image as VAE block and, if it has pixels, vision block. Returns what
        [`~BagelRow.add_text`] does of a text.
        """
        start = None
        if isinstance(segment, TextSegment):
            start = self.add_text(segment.content_ids)
        else:
            self.add_latents(segment.latents, segment.grid)
            if segment.pixel_values is not None:
                self.add_pixels(segment.pixel_values)
        self.ends.append((self.position, self.num_blocks))
        return start


def _pad(tensors: list[torch.Tensor], value: float = 0) -> torch.Tensor:
    return pad_sequence(tensors, batch_first=True, padding_value=value)


def _pad_und(tensors: list[torch.Tensor], value: float = 0) -> torch.Tensor:
    """Pads to at least one place, because attention refuses a batch of nothing but empty contexts."""
    padded = _pad(tensors, value)
    return padded if padded.shape[1] else padded.new_full((len(tensors), 1), value)


def collate_tokens(rows: Sequence[BagelRow], config: BagelConfig) -> dict[str, torch.Tensor]:
    """
    Pad rows to tensors, pictures for the vision tower aside.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` `(batch, und)`; `positions`, `blocks`, `horizons` `(batch, und + gen)`,
        understanding tokens first; where there are latents, `latents` `(batch, gen, channels)`, `latent_position_ids`
        `(batch, gen)`, `timesteps` `(batch, images)` and `timestep_index` `(batch, gen)`.
    """
    input_ids = _pad_und([torch.tensor(row.input_ids, dtype=torch.long) for row in rows])
    und = [row.und.tensors() for row in rows]
    gen = [row.gen.tensors() for row in rows]
    fills = (0, PADDING_BLOCK, 0)
    attributes = [
        torch.cat([_pad_und([t[i] for t in und], fill), _pad([t[i] for t in gen], fill)], dim=1)
        for i, fill in enumerate(fills)
    ]
    inputs = dict(zip(("positions", "blocks", "horizons"), attributes, strict=True), input_ids=input_ids)
    if any(row.latents for row in rows):
        empty = torch.zeros(0, config.latent_channels)
        inputs["latents"] = _pad([torch.cat(row.latents).float() if row.latents else empty for row in rows])
        no_ids = torch.zeros(0, dtype=torch.long)
        inputs["latent_position_ids"] = _pad(
            [torch.cat(row.latent_position_ids) if row.latents else no_ids for row in rows]
        )
        inputs["timesteps"] = _pad([torch.tensor(row.timesteps, dtype=torch.float32) for row in rows])
        inputs["timestep_index"] = _pad(
            [
                torch.arange(len(row.latents)).repeat_interleave(torch.tensor(row.gen.lengths, dtype=torch.long))
                for row in rows
            ]
        )
    return inputs


def collate_pixels(rows: Sequence[BagelRow], starts: Sequence[int], config: BagelConfig) -> dict[str, torch.Tensor]:
    """
    The pictures of rows, each once however often it is looked at.

    Args:
        rows (`Sequence[BagelRow]`): Of which each begins at one of `starts` in the flattened `input_ids`.

    Returns:
        `dict[str, torch.Tensor]`: Empty without vision blocks, else `vit_patches` `(images, patches, values)`,
        `vit_position_ids` and `vit_mask` `(images, patches)`; and `vit_image` `(blocks,)`, the image of every block, and
        `vit_index` `(blocks, patches)`, the place of its patches in the flattened `input_ids`.
    """
    patch_size, side = config.vision_config.patch_size, config.vision_patches_per_side
    images: dict[int, int] = {}
    patches, position_ids, of_block, index = [], [], [], []
    for row, row_start in zip(rows, starts, strict=True):
        for pixels, start in zip(row.vit_pixels, row.vit_starts, strict=True):
            if id(pixels) not in images:
                images[id(pixels)] = len(images)
                patches.append(patchify(pixels, patch_size))
                grid = (pixels.shape[-2] // patch_size, pixels.shape[-1] // patch_size)
                position_ids.append(grid_position_ids(*grid, side))
            image = images[id(pixels)]
            of_block.append(image)
            index.append(torch.arange(len(patches[image])) + row_start + start)
    if not of_block:
        return {}
    return {
        "vit_patches": _pad(patches),
        "vit_position_ids": _pad(position_ids),
        "vit_mask": _pad([torch.ones(len(ids), dtype=torch.bool) for ids in position_ids], False),
        "vit_image": torch.tensor(of_block),
        "vit_index": _pad(index),
    }


def collate_rows(rows: Sequence[BagelRow], config: BagelConfig) -> dict[str, torch.Tensor]:
    """Pad rows to a batch: what [`collate_tokens`] and [`collate_pixels`] return."""
    inputs = collate_tokens(rows, config)
    width = inputs["input_ids"].shape[1]
    return inputs | collate_pixels(rows, range(0, len(rows) * width, width), config)
