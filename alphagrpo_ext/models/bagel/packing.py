# SPDX-License-Identifier: Apache-2.0

"""How BAGEL's whole trajectories become one forward: contexts once, and behind them the noised copies that are trained.

A guidance branch that sees a part of what another row begins with needs no context of its own, and neither do the
members of a group that share one: their copies hang on the same row, each with its own horizon. Rows that differ in
nothing but the length of their texts are padded to the same length, a *bucket*; the tokens of all buckets follow each other
in one sequence, so that no bucket is padded to the length of another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch

from alphagrpo_ext.models.bagel.configuration_bagel import BagelConfig
from alphagrpo_ext.models.bagel.guidance import BRANCHES, BagelGuidance
from alphagrpo_ext.models.bagel.layout import (
    NOISED_BLOCK,
    PADDING_BLOCK,
    BagelRow,
    collate_pixels,
    collate_tokens,
    grid_position_ids,
)
from alphagrpo_ext.models.bagel.shared_contexts import ContextName, context_name, holders
from alphagrpo_ext.models.contract import PackedBatch, VelocityLayout
from alphagrpo_ext.trajectory import ImageSegment, Segment, TextSegment, Trajectory


NUM_DELIMITERS = 2
"""Tokens of a copy that belong to the understanding expert."""


class Bucket(NamedTuple):
    """
    Rows of one shape, as a line of the table `buckets` of a packed forward.

    Args:
        rows (`int`): How many.
        context_und, context_gen (`int`): Tokens of a row's context for either expert.
        copies, copy_latents (`int`): Noised copies of a row, and latents of a copy.
    """

    rows: int
    context_und: int
    context_gen: int
    copies: int
    copy_latents: int

    @property
    def copy_tokens(self) -> int:
        """Tokens of a copy, delimiters included."""
        return NUM_DELIMITERS + self.copy_latents

    @property
    def und_sizes(self) -> tuple[int, int]:
        """Tokens of all contexts and all copies for the understanding expert."""
        return self.rows * self.context_und, self.rows * self.copies * NUM_DELIMITERS

    @property
    def gen_sizes(self) -> tuple[int, int]:
        """The same for the generation expert."""
        return self.rows * self.context_gen, self.rows * self.copies * self.copy_latents


@dataclass(frozen=True)
class NoisedCopy:
    """
    An image on its way, behind the context of a row, which it sees up to its horizon.

    Args:
        latents (`torch.Tensor` of shape `(tokens, channels)`): The noised image.
        grid (`tuple[int, int]`): Its rows and columns.
        timestep (`float`): Its time.
        position, horizon (`int`): Rotary position, and the first of the row's blocks that it does not see.
        image, step, branch (`int`): Which velocity this is, as in [`VelocityLayout`].
    """

    latents: torch.Tensor
    grid: tuple[int, int]
    timestep: float
    position: int
    horizon: int
    image: int
    step: int
    branch: int


@dataclass(eq=False)
class _PackedRow:
    """
    A context under construction, and its copies.

    Args:
        context ([`BagelRow`]): Its tokens.
        copies (`list[NoisedCopy]`): In any order.
    """

    context: BagelRow
    copies: list[NoisedCopy] = field(default_factory=list)

    def attach(self, image: ImageSegment, index: int, branch: int, steps: Sequence[int], end: tuple[int, int]) -> None:
        """Add copies of an image that see the row up to `end`, a rotary position and a horizon."""
        window = image.window
        self.copies += [
            NoisedCopy(window.latents[step], image.grid, float(window.timesteps[step]), *end, index, step, branch)
            for step in steps
        ]

    @property
    def shape(self) -> tuple[int, ...]:
        """Equal for rows of one bucket: they differ in nothing but the length of texts."""
        return (
            len(self.copies),
            max((len(copy.latents) for copy in self.copies), default=0),
            sum(self.context.gen.lengths),
            sum(pixels.shape[-2] * pixels.shape[-1] for pixels in self.context.vit_pixels),
        )


def _collate_copies(rows: Sequence[_PackedRow], bucket: Bucket, config: BagelConfig) -> dict[str, torch.Tensor]:
    """Attributes of copies, `(rows, copies)`, and of their latents, `(rows, copies, latents)`."""
    shape = (bucket.rows, bucket.copies, bucket.copy_latents)
    tensors = {
        "latents": torch.zeros(*shape, config.latent_channels),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "mask": torch.zeros(shape, dtype=torch.bool),
        "timesteps": torch.zeros(shape[:2]),
        "positions": torch.zeros(shape[:2], dtype=torch.long),
        "horizons": torch.zeros(shape[:2], dtype=torch.long),
    }
    for i, row in enumerate(rows):
        for j, copy in enumerate(row.copies):
            length = len(copy.latents)
            tensors["latents"][i, j, :length] = copy.latents
            tensors["position_ids"][i, j, :length] = grid_position_ids(*copy.grid, config.max_latent_size)
            tensors["mask"][i, j, :length] = True
            tensors["timesteps"][i, j] = copy.timestep
            tensors["positions"][i, j], tensors["horizons"][i, j] = copy.position, copy.horizon
    return tensors


def _concatenated(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """A batch of one sequence."""
    return torch.cat([tensor.flatten(0, -1) for tensor in tensors])[None]


class _PackedSequence:
    """Rows as one sequence: the contexts of every bucket, and then the copies of every bucket, for each expert."""

    def __init__(self, rows: Sequence[_PackedRow], config: BagelConfig) -> None:
        shapes: dict[tuple[int, ...], list[_PackedRow]] = {}
        for row in rows:
            shapes.setdefault(row.shape, []).append(row)
        self.rows = list(shapes.values())
        self.contexts = [collate_tokens([row.context for row in of_shape], config) for of_shape in self.rows]
        self.buckets = [
            Bucket(
                rows=len(of_shape),
                context_und=context["input_ids"].shape[1],
                context_gen=context["positions"].shape[1] - context["input_ids"].shape[1],
                copies=shape[0],
                copy_latents=shape[1],
            )
            for (shape, of_shape), context in zip(shapes.items(), self.contexts, strict=True)
        ]
        self.copies = [
            _collate_copies(of_shape, bucket, config) for of_shape, bucket in zip(self.rows, self.buckets, strict=True)
        ]
        self.config = config

    def starts(self) -> tuple[dict[_PackedRow, int], dict[_PackedRow, int]]:
        """Where the context of each row begins among the understanding tokens, and where its copies among the latents."""
        first_und = accumulate((bucket.und_sizes[0] for bucket in self.buckets), initial=0)
        first_copy = accumulate(
            (bucket.gen_sizes[1] for bucket in self.buckets), initial=sum(b.gen_sizes[0] for b in self.buckets)
        )
        of_contexts, of_copies = {}, {}
        for rows, bucket, und, gen in zip(self.rows, self.buckets, first_und, first_copy, strict=False):
            for i, row in enumerate(rows):
                of_contexts[row] = und + i * bucket.context_und
                of_copies[row] = gen + i * bucket.copies * bucket.copy_latents
        return of_contexts, of_copies

    def _attribute(
        self, name: str, of_copies: Sequence[torch.Tensor], of_latents: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Of every token: a copy's delimiters share one value, its latents have one each."""
        contexts = [(c[name], bucket.context_und) for c, bucket in zip(self.contexts, self.buckets, strict=True)]
        return _concatenated(
            [
                *(context[:, :num_und] for context, num_und in contexts),
                *(x.repeat_interleave(NUM_DELIMITERS, dim=-1) for x in of_copies),
                *(context[:, num_und:] for context, num_und in contexts),
                *of_latents,
            ]
        )

    def attributes(self) -> dict[str, torch.Tensor]:
        """Who sees whom; see [`visibility_mask`]."""
        blocks, latent_blocks, horizons, latent_horizons, positions, latent_positions = ([] for _ in range(6))
        for bucket, copies in zip(self.buckets, self.copies, strict=True):
            mask = copies["mask"]
            of_copies = (NOISED_BLOCK + torch.arange(bucket.copies)).expand(bucket.rows, -1)
            blocks.append(of_copies)
            latent_blocks.append(torch.where(mask, of_copies[:, :, None], PADDING_BLOCK))
            horizons.append(copies["horizons"])
            latent_horizons.append(torch.where(mask, copies["horizons"][:, :, None], 0))
            positions.append(copies["positions"])
            latent_positions.append(copies["positions"][:, :, None].expand(mask.shape))
        return {
            "positions": self._attribute("positions", positions, latent_positions),
            "blocks": self._attribute("blocks", blocks, latent_blocks),
            "horizons": self._attribute("horizons", horizons, latent_horizons),
            "rows": self._rows(),
        }

    def _rows(self) -> torch.Tensor:
        """The row of every token."""
        parts, first = ([], [], [], []), 0
        for bucket in self.buckets:
            index = torch.arange(first, first + bucket.rows)
            for part, size in zip(parts, (*bucket.und_sizes, *bucket.gen_sizes), strict=True):
                part.append(index.repeat_interleave(size // bucket.rows))
            first += bucket.rows
        return _concatenated(tensor for part in parts for tensor in part)

    def inputs(self) -> dict[str, torch.Tensor]:
        """All that the network's forward reads, targets aside."""
        delimiters = torch.tensor([self.config.image_start_token_id, self.config.image_end_token_id])
        inputs = {
            "buckets": torch.tensor(self.buckets),
            "input_ids": _concatenated(
                [
                    *(context["input_ids"] for context in self.contexts),
                    *(delimiters.repeat(bucket.rows * bucket.copies) for bucket in self.buckets),
                ]
            ),
            **self.attributes(),
        }
        starts, _ = self.starts()
        rows = [row.context for row in starts]
        return inputs | self._latents() | collate_pixels(rows, list(starts.values()), self.config)

    def _latents(self) -> dict[str, torch.Tensor]:
        contexts = [context for context in self.contexts if "latents" in context]
        copies = [of_bucket for bucket, of_bucket in zip(self.buckets, self.copies, strict=True) if bucket.copies]
        if not contexts and not copies:
            return {}
        # Images of a context are clean, at one time that they share.
        index = [torch.zeros_like(context["latent_position_ids"]) for context in contexts]
        first = 1
        for of_bucket in copies:
            numbers = first + torch.arange(of_bucket["timesteps"].numel()).view_as(of_bucket["timesteps"])
            index.append(numbers[:, :, None].expand(of_bucket["mask"].shape))
            first += numbers.numel()
        latents = [tensors["latents"].flatten(0, -2) for tensors in (*contexts, *copies)]
        position_ids = [*(c["latent_position_ids"] for c in contexts), *(c["position_ids"] for c in copies)]
        return {
            "latents": torch.cat(latents)[None],
            "latent_position_ids": _concatenated(position_ids),
            "timesteps": _concatenated([torch.zeros(1), *(of_bucket["timesteps"] for of_bucket in copies)]),
            "timestep_index": _concatenated(index),
        }


class _Packer:
    """Lays out trajectories one after the other."""

    def __init__(self, guidance: BagelGuidance, config: BagelConfig, shares_contexts: bool) -> None:
        self.guidance, self.config, self.shares_contexts = guidance, config, shares_contexts
        self.rows: list[_PackedRow] = []
        # Contexts with which the trajectory does not begin, and who sees them: image, its index, branch, and steps.
        self.others: dict[ContextName, tuple[Sequence[Segment], list[tuple[ImageSegment, int, int, list[int]]]]] = {}
        self.scores: list[tuple[_PackedRow, int, int, int, int]] = []  # row, place, target id, trajectory, column
        self.image_trajectory: list[int] = []

    def add(self, trajectory: Trajectory) -> None:
        index, column = len(self.rows), 0
        row = _PackedRow(BagelRow(self.config))
        self.rows.append(row)
        name = context_name(trajectory.segments)
        for i, segment in enumerate(trajectory.segments):
            if isinstance(segment, ImageSegment) and segment.sampled:
                if segment.window is not None:
                    self._add_copies(row, name[:i], segment)
                    self.image_trajectory.append(index)
                if i + 1 < len(trajectory.segments):
                    row.context.add_segment(segment)
                continue
            start = row.context.add_segment(segment)
            if isinstance(segment, TextSegment) and segment.sampled:
                for offset, token_id in enumerate(segment.token_ids):
                    self.scores.append((row, start + offset, token_id, index, column + offset))
                column += len(segment.token_ids)

    def _add_copies(self, row: _PackedRow, name: ContextName, image: ImageSegment) -> None:
        """Copies of an image behind the trajectory's context of this name, and elsewhere those that see another."""
        times, index = image.window.timesteps[:-1].tolist(), len(self.image_trajectory)
        for branch, branch_name in enumerate(BRANCHES):
            steps = [step for step, time in enumerate(times) if branch_name in self.guidance.branches_at(time)]
            if not steps:
                continue
            context = image.guidance_contexts.get(branch_name, [])
            seen = context_name(context) if branch else name
            if branch and not self.shares_contexts:
                # No other context has this name, and none begins with it.
                seen = (*seen, (index, branch))
            if seen == name[: len(seen)]:
                row.attach(image, index, branch, steps, row.context.ends[len(seen)])
            else:
                self.others.setdefault(seen, (context, []))[1].append((image, index, branch, steps))

    def all_rows(self) -> list[_PackedRow]:
        """Rows of trajectories, and the fewest that hold the other contexts."""
        rows: dict[ContextName, _PackedRow] = {}
        for name, holder in holders(self.others).items():
            context, copies = self.others[name]
            if holder not in rows:
                rows[holder] = _PackedRow(BagelRow(self.config))
                for segment in self.others[holder][0]:
                    rows[holder].context.add_segment(segment)
            row = rows[holder]
            for of_image in copies:
                row.attach(*of_image, row.context.ends[len(context)])
        return [*self.rows, *rows.values()]


def pack_trajectories(
    trajectories: Sequence[Trajectory],
    guidance: BagelGuidance,
    config: BagelConfig,
    shares_contexts: bool = True,
) -> PackedBatch:
    """
    Lay out whole trajectories for one forward (DESIGN: one packed forward).

    A row a trajectory: context, sampled texts, sampled images where a later segment looks back at them, and, seen by
    nobody, the noised copies of every sampled image, one a transition of its window. The copies of a guidance branch, at
    times where it counts, are on the trajectory's own row if that begins with their context, and else on a row that all
    copies with this context share. See [`context_name`] for which contexts are the same.

    Args:
        trajectories (`Sequence[Trajectory]`): What to score.
        guidance ([`BagelGuidance`]): Decides which branches are needed at which times.
        config ([`BagelConfig`]): Sizes and delimiters.
        shares_contexts (`bool`, *optional*, defaults to `True`):
            Whether they do; without, every guidance branch of every image has a row of its own, to compare with.

    Returns:
        [`PackedBatch`], the inputs of which are a batch of one sequence; `buckets` `(buckets, 5)` holds a [`Bucket`] a line.
    """
    packer = _Packer(guidance, config, shares_contexts)
    for trajectory in trajectories:
        packer.add(trajectory)
    sequence = _PackedSequence(packer.all_rows(), config)
    inputs = sequence.inputs()
    first_und, first_copy = sequence.starts()
    scores = packer.scores
    inputs["score_index"] = torch.tensor([first_und[row] + place for row, place, *_ in scores], dtype=torch.long)
    inputs["score_targets"] = torch.tensor([score[2] for score in scores], dtype=torch.long)
    # Sorted, so that the velocities of an image stand together, step by step.
    copies = sorted(
        (
            ((copy.image, copy.branch, copy.step), first_copy[row] + place * bucket.copy_latents, len(copy.latents))
            for rows, bucket in zip(sequence.rows, sequence.buckets, strict=True)
            for row in rows
            for place, copy in enumerate(row.copies)
        ),
    )
    layout = None
    if copies:
        lengths = torch.tensor([length for *_, length in copies])
        offsets = torch.arange(int(lengths.max()))
        mask = offsets < lengths[:, None]
        inputs["velocity_index"] = torch.where(
            mask, torch.tensor([start for _, start, _ in copies])[:, None] + offsets, 0
        )
        image, branch, step = torch.tensor([key for key, *_ in copies]).T
        layout = VelocityLayout(image=image, step=step, branch=branch, mask=mask, branches=BRANCHES)
    return PackedBatch(
        inputs=inputs,
        score_trajectory=torch.tensor([score[3] for score in scores], dtype=torch.long),
        score_column=torch.tensor([score[4] for score in scores], dtype=torch.long),
        velocities=layout,
        image_trajectory=torch.tensor(packer.image_trajectory, dtype=torch.long),
        guidance=guidance,
    )
