# SPDX-License-Identifier: Apache-2.0

"""
Segments as rows of tokens of the two streams.

The *understanding stream* of a context is its conversation in the chat template. User turns hold texts and images, and
a turn is closed when the policy acts. The *generation stream* of one image holds the clean latents of the images in its
context and its own noised latents.

An image is painted from the conversation so far and a *tail*, the end token of the reply and `<|vision_start|>`. The
conversation goes on without this `<|vision_start|>`, so that a tail is a fork of the stream, which nothing but the
generation stream reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.nn.utils.rnn import pad_sequence

from alphagrpo_ext.models.cosmos3.chat_template import read_pieces
from alphagrpo_ext.models.cosmos3.configuration_cosmos3 import Cosmos3Config
from alphagrpo_ext.trajectory import ImageSegment, Segment


Position = tuple[int, int, int]
"""Time, row and column."""


@dataclass(frozen=True)
class PlacedImage:
    """
    An image in the understanding stream.

    Args:
        segment ([`ImageSegment`]): The image.
        start (`int`): Place of its first token.
        grid (`tuple[int, int]`): Rows and columns of tokens of the vision tower.
    """

    segment: ImageSegment
    start: int
    grid: tuple[int, int]

    @property
    def num_tokens(self) -> int:
        """Tokens of the vision tower."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Tail:
    """
    What an image is painted from, after the conversation so far.

    Args:
        ids (`list[int]`): The tail's own tokens.
        horizon (`int`): Number of tokens of the conversation so far.
        first_position (`int`): Position of the tail's first token.
        images (`list[ImageSegment]`): Images in the conversation so far.
    """

    ids: list[int]
    horizon: int
    first_position: int
    images: list[ImageSegment]

    @property
    def next_position(self) -> int:
        """Position after the tail."""
        return self.first_position + len(self.ids)


@dataclass
class ContextRow:
    """
    The understanding stream of a context, built segment by segment.

    Args:
        config ([`Cosmos3Config`]): Token ids and sizes.
        ids (`list[int]`): Token ids.
        positions (`list[Position]`): Position of every token.
        images (`list[PlacedImage]`): Images in their order.
        next_position (`int`): Position of the next text token.
        turn (`str`): What is open: `"start"`, `"between"` turns, a `"user"` turn, a `"reply"` after its header, or a reply
            that has `"ended"` by its end token.
    """

    config: Cosmos3Config
    ids: list[int] = field(default_factory=list)
    positions: list[Position] = field(default_factory=list)
    images: list[PlacedImage] = field(default_factory=list)
    next_position: int = 0
    turn: str = "start"

    def __post_init__(self) -> None:
        self.pieces = read_pieces(self.config.chat_pieces)

    @classmethod
    def of(cls, context: Sequence[Segment], config: Cosmos3Config) -> ContextRow:
        """The row of a context in which the policy is about to act."""
        return cls(config).add(context).prepare_action()

    def add(self, segments: Sequence[Segment]) -> ContextRow:
        """Add segments, and return the row itself."""
        for segment in segments:
            if isinstance(segment, ImageSegment):
                self._add_image(segment)
            elif segment.role == "system":
                self._leave_turn("system")
                self._add_ids([*self.pieces.system_start, *segment.content_ids, *self.pieces.system_end])
            elif segment.role == "user":
                self._enter_user_turn()
                self._add_ids(segment.content_ids)
            else:
                self.begin_reply()._add_ids([*segment.content_ids, self.config.eos_token_id])
                self.turn = "ended"
        return self

    def begin_reply(self, thinks: bool = True) -> ContextRow:
        """
        Close the turn that is open, add the header of a reply if it is not there yet, and return the row itself.

        Args:
            thinks (`bool`, *optional*, defaults to `True`): Whether the reply begins as the template lets it by default.
        """
        if self.turn != "reply":
            self._leave_turn("assistant")
            self._add_ids(self.pieces.reply_start if thinks else self.pieces.answer_start)
            self.turn = "reply"
        return self

    def prepare_action(self) -> ContextRow:
        """As [`begin_reply`], unless the policy has just written a reply, which it paints after."""
        return self if self.turn == "ended" else self.begin_reply()

    def tail(self) -> Tail:
        """The tail of an image that is painted now, in a reply or after it."""
        end = [] if self.turn == "ended" else [self.config.eos_token_id]
        ids = [*end, self.config.vision_start_token_id]
        return Tail(ids, len(self.ids), self.next_position, [placed.segment for placed in self.images])

    def copy(self) -> ContextRow:
        """A row that can be continued by itself."""
        return replace(self, ids=list(self.ids), positions=list(self.positions), images=list(self.images))

    def num_common_tokens(self, other: ContextRow) -> int:
        """Number of tokens that two rows begin with and in which they look at the same images."""
        length = min(len(self.ids), len(other.ids))
        pairs = zip(self.ids, other.ids, strict=False)
        common = next((i for i, (own, others) in enumerate(pairs) if own != others), length)
        for own, others in zip(self.images, other.images, strict=False):
            if own.start < common and not _is_same(own.segment.pixel_values, others.segment.pixel_values):
                return own.start
        return common

    def equals(self, other: ContextRow) -> bool:
        """Whether two rows have the same tokens and images, clean latents included."""
        return (
            self.ids == other.ids
            and self.num_common_tokens(other) == len(self.ids)
            and all(
                _is_same(own.segment.latents, others.segment.latents)
                for own, others in zip(self.images, other.images, strict=True)
            )
        )

    def _leave_turn(self, next_role: str) -> None:
        if self.turn == "start" and next_role != "system":
            self._add_ids(self.pieces.default_system)
        elif self.turn == "user":
            self._add_ids(self.pieces.user_end)
        elif self.turn == "reply":
            self._add_ids([self.config.eos_token_id, *self.pieces.after_reply])
        elif self.turn == "ended":
            self._add_ids(self.pieces.after_reply)
        self.turn = "between"

    def _enter_user_turn(self) -> None:
        if self.turn != "user":
            self._leave_turn("user")
            self._add_ids(self.pieces.user_start)
            self.turn = "user"

    def _add_ids(self, ids: Sequence[int]) -> None:
        self.ids += ids
        end = self.next_position + len(ids)
        self.positions += [(n, n, n) for n in range(self.next_position, end)]
        self.next_position = end

    def _add_image(self, segment: ImageSegment) -> None:
        self._enter_user_turn()
        grid = vision_grid(segment, self.config)
        self._add_ids([self.config.vision_start_token_id])
        placed, first = PlacedImage(segment, len(self.ids), grid), self.next_position
        self.images.append(placed)
        self.ids += [self.config.image_token_id] * placed.num_tokens
        self.positions += [(first, first + row, first + column) for row in range(grid[0]) for column in range(grid[1])]
        self.next_position = first + max(grid)
        self._add_ids([self.config.vision_end_token_id])


def vision_grid(segment: ImageSegment, config: Cosmos3Config) -> tuple[int, int]:
    """
    Rows and columns of an image's tokens of the vision tower.

    Raises:
        `ValueError`: If the model has no vision tower, or the segment no pixels.
    """
    if config.vision_config is None:
        raise ValueError(
            "this Cosmos3 checkpoint has no vision tower (vision_encoder/), so that no image can be in its context: take a "
            "task without images, or a folder with the vision tower"
        )
    if segment.pixel_values is None:
        raise ValueError("an image that is context needs pixel_values: set them to processor.look(image)")
    height, width = segment.pixel_values.shape[-2:]
    return height // config.vision_stride, width // config.vision_stride


def _is_same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def collate_contexts(
    rows: Sequence[ContextRow], tails: Sequence[Sequence[Tail]], starts: Sequence[int] | None = None
) -> dict[str, torch.Tensor]:
    """
    Tensors of the understanding stream: conversations, padded on the right, and then the tails of every row.

    Args:
        rows (`Sequence[ContextRow]`): Conversations.
        tails (`Sequence[Sequence[Tail]]`): Tails of every row.
        starts (`Sequence[int]`, *optional*): Tokens of every row that a cache holds, which are left out.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` `(rows, tokens)`, `positions` `(rows, 3, tokens)`, `horizons` and `forks`
        `(rows, tokens)` for [`stream_mask`], and, if there are images, what [`collate_images`] returns.
    """
    starts = starts or [0] * len(rows)
    streams = [row.ids[start:] for row, start in zip(rows, starts, strict=True)]
    num_stream = max(map(len, streams))
    num_tails = max(sum(len(tail.ids) for tail in own) for own in tails)
    shape = (len(rows), num_stream + num_tails)
    ids, horizons, forks = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    positions = torch.zeros(len(rows), 3, shape[1])
    for i, (row, start, stream, own) in enumerate(zip(rows, starts, streams, tails, strict=True)):
        length = len(stream)
        ids[i, :length] = torch.tensor(stream, dtype=torch.long)
        positions[i, :, :length] = torch.tensor(row.positions[start:], dtype=torch.float32).reshape(-1, 3).T
        horizons[i, :length] = torch.arange(1, length + 1)
        column = num_stream
        for fork, tail in enumerate(own, start=1):
            end = column + len(tail.ids)
            ids[i, column:end] = torch.tensor(tail.ids)
            positions[i, :, column:end] = torch.arange(tail.first_position, tail.next_position)
            horizons[i, column:end], forks[i, column:end] = tail.horizon - start, fork
            column = end
    inputs = {"input_ids": ids, "positions": positions, "horizons": horizons, "forks": forks}
    return inputs | collate_images(rows, starts, shape[1])


def collate_images(rows: Sequence[ContextRow], starts: Sequence[int], num_columns: int) -> dict[str, torch.Tensor]:
    """
    Images of the understanding stream. Those that several rows share are read once.

    Returns:
        `dict[str, torch.Tensor]`: `pixels` `(images, 3, height, width)`, padded, and their sizes `pixel_sizes`
        `(images, 2)`; `feature_index` `(places,)`, indices into the features of all images, and `feature_places`
        `(places,)`, where they belong in the flattened tokens, ascending. Empty without images.
    """
    pixels: list[torch.Tensor] = []
    first_features: dict[int, int] = {}
    num_features = 0
    index, places = [], []
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        for placed in row.images:
            if placed.start < start:
                continue
            image = placed.segment.pixel_values
            if id(image) not in first_features:
                first_features[id(image)] = num_features
                num_features += placed.num_tokens
                pixels.append(image)
            offsets = torch.arange(placed.num_tokens)
            index.append(first_features[id(image)] + offsets)
            places.append(i * num_columns + placed.start - start + offsets)
    if not pixels:
        return {}
    sizes = torch.tensor([image.shape[-2:] for image in pixels])
    padded = torch.zeros(len(pixels), 3, *sizes.amax(dim=0).tolist())
    for target, image in zip(padded, pixels, strict=True):
        target[:, : image.shape[-2], : image.shape[-1]] = image
    return {
        "pixels": padded,
        "pixel_sizes": sizes,
        "feature_index": torch.cat(index),
        "feature_places": torch.cat(places),
    }


def stream_mask(horizons: torch.Tensor, forks: torch.Tensor) -> torch.Tensor:
    """
    Which token of the understanding stream sees which. A token of a conversation sees those before it and itself. A token
    of a tail sees the conversation before it, and its own tail up to itself.

    Args:
        horizons (`torch.Tensor` of shape `(rows, tokens)`): How many tokens of its conversation a token sees; 0 on padding.
        forks (`torch.Tensor` of shape `(rows, tokens)`): Number of the token's tail, from 1; 0 in a conversation.

    Returns:
        `torch.Tensor` of shape `(rows, tokens, tokens)`, bool: Queries in lines, keys in columns.
    """
    index = torch.arange(horizons.shape[1], device=horizons.device)
    same_tail = (forks[:, :, None] == forks[:, None]) & (forks[:, None] > 0) & (index[:, None] >= index)
    return (index < horizons[..., None]) | same_tail


def latent_positions(
    grids: Sequence[tuple[int, int]], start: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """
    Positions of the latents of images that are painted together: clean images, and then the noised one. Each has a time
    of its own; rows and columns begin anew.

    Args:
        grids (`Sequence[tuple[int, int]]`): Rows and columns of every image.
        start (`int`): Time of the first image.
        device (`torch.device`, *optional*): Where they are made.

    Returns:
        `torch.Tensor` of shape `(3, tokens)`, fp32: Time, row and column.
    """
    blocks = [torch.empty(3, 0, device=device)]
    for i, (rows, columns) in enumerate(grids):
        ranges = ((start + i, start + i + 1), (0, rows), (0, columns))
        axes = torch.meshgrid(*(torch.arange(*ends, device=device) for ends in ranges), indexing="ij")
        blocks.append(torch.stack(axes).flatten(1))
    return torch.cat(blocks, dim=1).float()


@dataclass(frozen=True)
class LatentBlock:
    """
    The generation stream of one image.

    Args:
        clean (`list[ImageSegment]`): Images in its context.
        noised (`torch.Tensor` of shape `(tokens, channels)`): Its noised latents.
        grid (`tuple[int, int]`): Their rows and columns.
        next_position (`int`): Position after the context.
    """

    clean: list[ImageSegment]
    noised: torch.Tensor
    grid: tuple[int, int]
    next_position: int

    @property
    def num_clean(self) -> int:
        """Number of clean latents, which stand before the noised ones."""
        return sum(len(image.latents) for image in self.clean)


def collate_latents(blocks: Sequence[LatentBlock], config: Cosmos3Config) -> dict[str, torch.Tensor]:
    """
    Tensors of the generation stream, padded on the right.

    Returns:
        `dict[str, torch.Tensor]`: `latents` `(blocks, tokens, channels)`, `latent_positions` `(blocks, 3, tokens)`, `noised`
        and `valid` `(blocks, tokens)`: where latents are noised, and where there are any.
    """
    latents = [torch.cat([*(image.latents for image in block.clean), block.noised]).float() for block in blocks]
    grids = [[*(image.grid for image in block.clean), block.grid] for block in blocks]
    positions = [
        latent_positions(own, block.next_position + config.latent_margin).T
        for own, block in zip(grids, blocks, strict=True)
    ]
    noised = [torch.arange(len(x)) >= block.num_clean for x, block in zip(latents, blocks, strict=True)]
    return {
        "latents": pad_sequence(latents, batch_first=True),
        "latent_positions": pad_sequence(positions, batch_first=True).transpose(1, 2),
        "noised": pad_sequence(noised, batch_first=True),
        "valid": pad_sequence([torch.ones(len(x), dtype=torch.bool) for x in latents], batch_first=True),
    }
