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

"""How BAGEL lays out texts and images as tokens: blocks, rotary positions, and who sees whom.

A row is a sequence of blocks. Text is causal; an image block is seen fully by itself; every block sees the blocks
before it, except noised images, which nobody but themselves sees. All of that follows from three numbers a token:
its block, its rotary position, and whether its block is noised. Tokens of the understanding expert and tokens of the
generation expert are kept in two tensors, so that each expert runs on its own tokens without gather or scatter;
attention does not mind the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.bagel.configuration_bagel import BagelConfig
from alphagrpo_ext.models.unified import BRANCHES, PackedBatch, VelocityLayout
from alphagrpo_ext.trajectory import ImageSegment, Segment, TextSegment, Trajectory


PADDING_BLOCK = -1


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
    key_position: torch.Tensor,
    key_block: torch.Tensor,
    key_noised: torch.Tensor,
) -> torch.Tensor:
    """
    Whether a query sees a key, from attributes that broadcast.

    Inside a block a token sees those at its own position or before, which is causal for text, whose positions rise, and
    full for an image, whose positions are equal. Of other blocks it sees the earlier ones that are not noised. Padding
    sees padding, so that no row of the mask is empty.
    """
    inside = (query_block == key_block) & (key_position <= query_position)
    earlier = (key_block < query_block) & (key_block != PADDING_BLOCK) & ~key_noised
    return inside | earlier


def visibility_mask(positions: torch.Tensor, blocks: torch.Tensor, noised: torch.Tensor) -> torch.Tensor:
    """
    Who [`sees`] whom, from the attributes that [`collate_rows`] gives every token, each `(batch, tokens)`.

    Returns:
        `torch.Tensor` of shape `(batch, tokens, tokens)`, bool, queries before keys.
    """
    return sees(
        positions[:, :, None], blocks[:, :, None], positions[:, None, :], blocks[:, None, :], noised[:, None, :]
    )


@dataclass
class _Expert:
    """Attributes of one expert's tokens in a row, as runs."""

    positions: list[torch.Tensor] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    noised: list[bool] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def append(self, positions: torch.Tensor, block: int, noised: bool = False) -> None:
        self.positions.append(positions)
        self.blocks.append(block)
        self.noised.append(noised)
        self.lengths.append(len(positions))

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        lengths = torch.tensor(self.lengths, dtype=torch.long)
        positions = torch.cat(self.positions) if self.positions else torch.zeros(0, dtype=torch.long)
        blocks = torch.tensor(self.blocks, dtype=torch.long).repeat_interleave(lengths)
        noised = torch.tensor(self.noised, dtype=torch.bool).repeat_interleave(lengths)
        return positions, blocks, noised


class BagelRow:
    """One packed sequence under construction: append blocks in the order in which the model sees them."""

    def __init__(self, config: BagelConfig, position: int = 0) -> None:
        self.config = config
        self.position = position
        self.num_blocks = 0
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

    def _image_delimiters(self, num_inner: int, noised: bool) -> None:
        """Start, `num_inner` places of the understanding expert, and end of an image block."""
        self.input_ids += [self.config.image_start_token_id, *[0] * num_inner, self.config.image_end_token_id]
        self.und.append(torch.full((num_inner + 2,), self.position), self.num_blocks, noised)

    def add_text(self, token_ids: Sequence[int]) -> int:
        """Append a text block; returns the place of its first delimiter among the understanding expert's tokens."""
        start = len(self.input_ids)
        ids = [self.config.bos_token_id, *token_ids, self.config.eos_token_id]
        self.input_ids += ids
        self.und.append(torch.arange(self.position, self.position + len(ids)), self.num_blocks)
        self.position += len(ids)
        self.num_blocks += 1
        return start

    def add_latents(
        self, latents: torch.Tensor, grid: tuple[int, int], timestep: float = 0.0, noised: bool = False
    ) -> int:
        """Append a VAE block; a noised one leaves the rotary position where it was. Returns its place in `gen`."""
        start = sum(self.gen.lengths)
        self._image_delimiters(0, noised)
        self.gen.append(torch.full((len(latents),), self.position), self.num_blocks, noised)
        self.latents.append(latents)
        self.latent_position_ids.append(grid_position_ids(*grid, self.config.max_latent_size))
        self.timesteps.append(timestep)
        self.position += 0 if noised else 1
        self.num_blocks += 1
        return start

    def add_pixels(self, pixel_values: torch.Tensor) -> None:
        """Append a vision-tower block of an image `(3, height, width)`."""
        patch_size = self.config.vision_config.patch_size
        num_patches = (pixel_values.shape[-2] // patch_size) * (pixel_values.shape[-1] // patch_size)
        self.vit_starts.append(len(self.input_ids) + 1)
        self.vit_pixels.append(pixel_values)
        self._image_delimiters(num_patches, noised=False)
        self.position += 1
        self.num_blocks += 1

    def add_segment(self, segment: Segment) -> int | None:
        """Append a segment as context: a text, or an image as VAE block and, if it has pixels, vision block."""
        if isinstance(segment, TextSegment):
            return self.add_text(segment.content_ids)
        self.add_latents(segment.latents, segment.grid)
        if segment.pixel_values is not None:
            self.add_pixels(segment.pixel_values)
        return None


def _pad(tensors: list[torch.Tensor], value: float = 0) -> torch.Tensor:
    return pad_sequence(tensors, batch_first=True, padding_value=value)


def _pad_und(tensors: list[torch.Tensor], value: float = 0) -> torch.Tensor:
    """Pads to at least one place, because attention refuses a batch of nothing but empty contexts."""
    padded = _pad(tensors, value)
    return padded if padded.shape[1] else padded.new_full((len(tensors), 1), value)


def collate_rows(rows: Sequence[BagelRow], config: BagelConfig) -> dict[str, torch.Tensor]:
    """
    Pad rows to tensors.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` `(batch, und)`; `positions`, `blocks`, `noised` `(batch, und + gen)`,
        understanding tokens first, `blocks` -1 on padding; where there are latents, `latents`
        `(batch, gen, channels)`, `latent_position_ids` `(batch, gen)`, `timesteps` `(batch, images)` and
        `timestep_index` `(batch, gen)`; where there are vision blocks, `vit_patches` `(images, patches, values)`,
        `vit_position_ids`, `vit_mask` `(images, patches)` and `vit_index` `(images, patches)` into the flattened
        `input_ids`.
    """
    input_ids = _pad_und([torch.tensor(row.input_ids, dtype=torch.long) for row in rows])
    und = [row.und.tensors() for row in rows]
    gen = [row.gen.tensors() for row in rows]
    fills = (0, PADDING_BLOCK, False)
    attributes = [
        torch.cat([_pad_und([t[i] for t in und], fill), _pad([t[i] for t in gen], fill)], dim=1)
        for i, fill in enumerate(fills)
    ]
    inputs = dict(zip(("positions", "blocks", "noised"), attributes, strict=True), input_ids=input_ids)
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
    if any(row.vit_pixels for row in rows):
        inputs.update(_collate_pixels(rows, input_ids.shape[1], config))
    return inputs


def _collate_pixels(rows: Sequence[BagelRow], width: int, config: BagelConfig) -> dict[str, torch.Tensor]:
    patch_size, side = config.vision_config.patch_size, config.vision_patches_per_side
    patches, position_ids, index = [], [], []
    for i, row in enumerate(rows):
        for pixels, start in zip(row.vit_pixels, row.vit_starts, strict=True):
            patches.append(patchify(pixels, patch_size))
            position_ids.append(
                grid_position_ids(pixels.shape[-2] // patch_size, pixels.shape[-1] // patch_size, side)
            )
            index.append(torch.arange(len(patches[-1])) + i * width + start)
    return {
        "vit_patches": _pad(patches),
        "vit_position_ids": _pad(position_ids),
        "vit_mask": _pad([torch.ones(len(ids), dtype=torch.bool) for ids in position_ids], False),
        "vit_index": _pad(index),
    }


@dataclass(frozen=True)
class NoisedCopy:
    """
    An image on its way, behind the context of a row, which it sees up to its own place.

    Args:
        latents (`torch.Tensor` of shape `(tokens, channels)`): The noised image.
        grid (`tuple[int, int]`): Its rows and columns.
        timestep (`float`): Its time.
        position, block (`int`): Rotary position, and number among the row's blocks.
    """

    latents: torch.Tensor
    grid: tuple[int, int]
    timestep: float
    position: int
    block: int


def append_copies(
    inputs: dict[str, torch.Tensor], copies: Sequence[Sequence[NoisedCopy]], config: BagelConfig
) -> dict[str, torch.Tensor]:
    """
    Put copies behind the contexts that [`collate_rows`] has padded: for both experts the contexts of all rows have one
    length, and then come copies, of one length too, so that slices tell them apart.

    Args:
        inputs (`dict[str, torch.Tensor]`): Of [`collate_rows`], for rows without noised blocks.
        copies (`Sequence[Sequence[NoisedCopy]]`): Of each row.
        config ([`BagelConfig`]): Delimiters and sizes.

    Returns:
        `dict[str, torch.Tensor]`: The same with copies, and `copy_mask` `(rows, copies, latents)`, false on padding.
    """
    rows, width = len(copies), inputs["input_ids"].shape[1]
    num_copies = max(len(of_row) for of_row in copies)
    num_latents = max(len(copy.latents) for of_row in copies for copy in of_row)
    shape = (rows, num_copies, num_latents)
    latents = torch.zeros(*shape, config.latent_channels)
    position_ids = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    timesteps = torch.zeros(shape[:2])
    positions = torch.zeros(shape[:2], dtype=torch.long)
    blocks = torch.full(shape[:2], PADDING_BLOCK)
    for i, of_row in enumerate(copies):
        for j, copy in enumerate(of_row):
            length = len(copy.latents)
            latents[i, j, :length] = copy.latents
            position_ids[i, j, :length] = grid_position_ids(*copy.grid, config.max_latent_size)
            mask[i, j, :length] = True
            timesteps[i, j], positions[i, j], blocks[i, j] = copy.timestep, copy.position, copy.block
    delimiters = torch.tensor([config.image_start_token_id, config.image_end_token_id]).repeat(num_copies)

    def widened(name: str, of_copy: torch.Tensor, of_token: torch.Tensor) -> torch.Tensor:
        """Understanding tokens, delimiters, latents, noised latents."""
        given = inputs[name]
        parts = [given[:, :width], of_copy.repeat_interleave(2, dim=1), given[:, width:], of_token.flatten(1)]
        return torch.cat(parts, dim=1)

    blank = {
        "latents": torch.zeros(rows, 0, config.latent_channels),
        "latent_position_ids": torch.zeros(rows, 0, dtype=torch.long),
        "timesteps": torch.zeros(rows, 0),
        "timestep_index": torch.zeros(rows, 0, dtype=torch.long),
    }
    given = {**blank, **inputs}
    timestep_index = given["timesteps"].shape[1] + torch.arange(num_copies)[:, None].expand(shape)
    result = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], delimiters.expand(rows, -1)], dim=1),
        "positions": widened("positions", positions, positions[:, :, None].expand(shape)),
        "blocks": widened("blocks", blocks, torch.where(mask, blocks[:, :, None], PADDING_BLOCK)),
        "noised": widened("noised", blocks != PADDING_BLOCK, mask),
        "latents": torch.cat([given["latents"], latents.flatten(1, 2)], dim=1),
        "latent_position_ids": torch.cat([given["latent_position_ids"], position_ids.flatten(1)], dim=1),
        "timesteps": torch.cat([given["timesteps"], timesteps], dim=1),
        "timestep_index": torch.cat([given["timestep_index"], timestep_index.flatten(1)], dim=1),
        "copy_mask": mask,
    }
    if "vit_index" in inputs:
        index = inputs["vit_index"]
        result["vit_index"] = index + index // width * 2 * num_copies
    return result


def pack_trajectories(
    trajectories: Sequence[Trajectory], guidance: GuidanceConfig, config: BagelConfig
) -> PackedBatch:
    """
    Lay out whole trajectories for one forward (DESIGN: one packed forward).

    The first rows hold the trajectories themselves: context, sampled texts, and the noised copies of every sampled
    image, one a transition of its window, followed by the clean image where a later segment looks back at it. Each
    further row holds the context of one guidance branch of one image and the copies at times where that branch counts.

    Args:
        trajectories (`Sequence[Trajectory]`): What to score.
        guidance ([`GuidanceConfig`]): Decides which branches are needed at which times.
        config ([`BagelConfig`]): Sizes and delimiters.
    """
    rows: list[BagelRow] = []
    branch_rows: list[BagelRow] = []
    branch_of_row: list[int] = []
    noised: dict[int, list[NoisedCopy]] = {}
    scores: list[tuple[int, int, int, int, int]] = []  # row, place, target id, trajectory, column
    copies: list[tuple[bool, int, int, int, int, int, int]] = []
    image_trajectory: list[int] = []

    def add_copies(row: BagelRow, on_branch_row: bool, row_index: int, image: ImageSegment, branch: int) -> None:
        window = image.window
        for step in range(window.num_steps):
            time = float(window.timesteps[step])
            if BRANCHES[branch] not in guidance.at(time).branches:
                continue
            of_row = noised.setdefault(id(row), [])
            place = len(of_row)
            of_row.append(NoisedCopy(window.latents[step], image.grid, time, row.position, row.num_blocks))
            row.num_blocks += 1
            copies.append((on_branch_row, row_index, place, len(image.latents), len(image_trajectory), step, branch))

    for index, trajectory in enumerate(trajectories):
        row = BagelRow(config)
        column = 0
        for i, segment in enumerate(trajectory.segments):
            if not (isinstance(segment, ImageSegment) and segment.sampled):
                start = row.add_segment(segment)
                if isinstance(segment, TextSegment) and segment.sampled:
                    for offset, token_id in enumerate(segment.token_ids):
                        scores.append((index, start + offset, token_id, index, column + offset))
                    column += len(segment.token_ids)
                continue
            if segment.window is not None:
                add_copies(row, False, index, segment, 0)
                for branch in range(1, len(BRANCHES)):
                    times = segment.window.timesteps[:-1].tolist()
                    if not any(BRANCHES[branch] in guidance.at(time).branches for time in times):
                        continue
                    branch_row = BagelRow(config)
                    for context in segment.guidance_contexts.get(BRANCHES[branch], []):
                        branch_row.add_segment(context)
                    add_copies(branch_row, True, len(branch_rows), segment, branch)
                    branch_rows.append(branch_row)
                    branch_of_row.append(branch)
                image_trajectory.append(index)
            if i + 1 < len(trajectory.segments):
                row.add_segment(segment)
        rows.append(row)

    inputs = collate_rows([*rows, *branch_rows], config)
    inputs["branches"] = torch.tensor([0] * len(rows) + branch_of_row)
    if copies:
        inputs = append_copies(inputs, [noised.get(id(row), []) for row in (*rows, *branch_rows)], config)
    width = inputs["input_ids"].shape[1]
    score_rows = torch.tensor(scores, dtype=torch.long).reshape(-1, 5)
    inputs["score_index"] = score_rows[:, 0] * width + score_rows[:, 1]
    inputs["score_targets"] = score_rows[:, 2]
    layout = None
    if copies:
        gen_width, (_, num_copies, num_latents) = inputs["latents"].shape[1], inputs["copy_mask"].shape
        first = gen_width - num_copies * num_latents
        starts = torch.tensor([(len(rows) * c[0] + c[1]) * gen_width + first + c[2] * num_latents for c in copies])
        lengths = torch.tensor([c[3] for c in copies])
        offsets = torch.arange(int(lengths.max()))
        mask = offsets < lengths[:, None]
        inputs["velocity_index"] = torch.where(mask, starts[:, None] + offsets, 0)
        layout = VelocityLayout(
            image=torch.tensor([c[4] for c in copies]),
            step=torch.tensor([c[5] for c in copies]),
            branch=torch.tensor([c[6] for c in copies]),
            mask=mask,
        )
    return PackedBatch(
        inputs=inputs,
        score_trajectory=score_rows[:, 3],
        score_column=score_rows[:, 4],
        velocities=layout,
        image_trajectory=torch.tensor(image_trajectory, dtype=torch.long),
    )
