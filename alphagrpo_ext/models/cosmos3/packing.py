# SPDX-License-Identifier: Apache-2.0

"""
Whole trajectories as one packed forward.

A trajectory is one row of the understanding stream, which every copy of its images reads up to its own place. Every other
context, such as that of the negative prompt, is a row of its own, shared by all copies that are painted from it. A copy
is one noised image in one guidance branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from alphagrpo_ext.models.contract import Guidance, PackedBatch, PackedParts, VelocityLayout
from alphagrpo_ext.models.cosmos3.configuration_cosmos3 import Cosmos3Config
from alphagrpo_ext.models.cosmos3.layout import ContextRow, LatentBlock, Tail, collate_contexts, collate_latents
from alphagrpo_ext.trajectory import ImageSegment, Segment, TextSegment, Trajectory


@dataclass(frozen=True)
class Place:
    """Where an image is painted: after tail `tail` of row `row`."""

    row: int
    tail: int


@dataclass
class Packing:
    """
    What is collected from trajectories.

    Args:
        config ([`Cosmos3Config`]): Token ids and sizes.
        rows (`list[ContextRow]`): Rows of the understanding stream.
        tails (`list[list[Tail]]`): Tails of every row.
        contexts (`list[Place]`): Where images are painted from contexts outside their trajectories.
        scores (`list[tuple[int, int, int, int]]`): Trajectory, column, row of the understanding stream and place of the
            token before, for every sampled token.
        targets (`list[int]`): The sampled tokens.
        blocks (`list[LatentBlock]`), places (`list[Place]`): Every copy, and where it is painted.
        keys (`list[tuple[int, int, int]]`): Image, step and branch of every copy.
        times (`list[torch.Tensor]`): Time of every copy.
        image_trajectory (`list[int]`): Trajectory of every image with a window.
    """

    config: Cosmos3Config
    rows: list[ContextRow] = field(default_factory=list)
    tails: list[list[Tail]] = field(default_factory=list)
    contexts: list[Place] = field(default_factory=list)
    scores: list[tuple[int, int, int, int]] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    blocks: list[LatentBlock] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    keys: list[tuple[int, int, int]] = field(default_factory=list)
    times: list[torch.Tensor] = field(default_factory=list)
    image_trajectory: list[int] = field(default_factory=list)

    def add_trajectory(self, index: int, trajectory: Trajectory, guidance: Guidance, branches: Sequence[str]) -> None:
        """Add a trajectory and the copies of its images. `branches` are the names that indices of branches mean."""
        row = self._add_row(ContextRow(self.config))
        # What stands after the last action is read by nothing.
        pending: list[Segment] = []
        column = 0
        for segment in trajectory.segments:
            context = self.rows[row]
            if segment.sampled and isinstance(segment, TextSegment):
                context.add(pending).begin_reply()
                first = len(context.ids) - 1
                columns = range(column, column + len(segment.token_ids))
                self.scores += [(index, c, row, first + i) for i, c in enumerate(columns)]
                self.targets += segment.token_ids
                column = columns.stop
                context.add([segment])
                pending = []
                continue
            if segment.sampled and segment.window is not None:
                context.add(pending).prepare_action()
                pending = []
                # A context that the thought was rewritten to is no part of this row.
                places = {} if "full" in segment.guidance_contexts else {"full": self._add_tail(row)}
                self._add_copies(segment, places, guidance, branches)
                self.image_trajectory.append(index)
            pending.append(segment)
        if not self.rows[row].ids:
            self.rows[row].prepare_action()

    def _add_row(self, row: ContextRow) -> int:
        self.rows.append(row)
        self.tails.append([])
        return len(self.rows) - 1

    def _add_tail(self, row: int) -> Place:
        self.tails[row].append(self.rows[row].tail())
        return Place(row, len(self.tails[row]) - 1)

    def _place_of(self, context: Sequence[Segment]) -> Place:
        """Where an image is painted from a context outside its trajectory. Equal contexts are one row."""
        row = ContextRow.of(context, self.config)
        for place in self.contexts:
            if self.rows[place.row].equals(row):
                return place
        self.contexts.append(self._add_tail(self._add_row(row)))
        return self.contexts[-1]

    def _add_copies(
        self, image: ImageSegment, places: dict[str, Place], guidance: Guidance, branches: Sequence[str]
    ) -> None:
        """Add the copies of an image. `places` are those of branches in the row of the trajectory."""
        times = image.window.timesteps[:-1]
        for step, (time, latents) in enumerate(zip(times, image.window.latents, strict=False)):
            for name in guidance.branches_at(time):
                if name not in places:
                    places[name] = self._place_of(image.guidance_contexts[name])
                place = places[name]
                tail = self.tails[place.row][place.tail]
                self.blocks.append(LatentBlock(tail.images, latents, image.grid, tail.next_position))
                self.places.append(place)
                self.times.append(time)
                self.keys.append((len(self.image_trajectory), step, branches.index(name)))

    def to_batch(self, guidance: Guidance | tuple[Guidance, ...], branches: tuple[str, ...]) -> PackedBatch:
        """The tensors of the forward, and where its results belong."""
        batch = self.contexts_alone(guidance)
        if self.keys:
            copies = self.copies_alone(range(self.num_steps), guidance, branches)
            batch = replace(batch, inputs=batch.inputs | copies.inputs, velocities=copies.velocities)
        return batch

    @property
    def num_steps(self) -> int:
        """Steps of the longest window."""
        return 1 + max(step for _, step, _ in self.keys)

    def contexts_alone(self, guidance: Guidance | tuple[Guidance, ...]) -> PackedBatch:
        """The understanding stream, with the sampled tokens."""
        inputs = collate_contexts(self.rows, self.tails)
        num_columns = inputs["input_ids"].shape[1]
        trajectory, column, row, place = torch.tensor(self.scores, dtype=torch.long).reshape(-1, 4).T
        inputs["score_index"] = row * num_columns + place
        inputs["score_targets"] = torch.tensor(self.targets, dtype=torch.long)
        return PackedBatch(
            inputs, trajectory, column, None, torch.tensor(self.image_trajectory, dtype=torch.long), guidance
        )

    def copies_alone(
        self, steps: range, guidance: Guidance | tuple[Guidance, ...], branches: tuple[str, ...]
    ) -> PackedBatch:
        """The generation stream of some steps, which are counted from the first of them."""
        chosen = [i for i, (_, step, _) in enumerate(self.keys) if step in steps]
        blocks = [self.blocks[i] for i in chosen]
        image, step, branch = torch.tensor([self.keys[i] for i in chosen]).T
        starts = torch.tensor([block.num_clean for block in blocks])
        lengths = torch.tensor([len(block.noised) for block in blocks])
        offsets = torch.arange(int(lengths.max()))
        mask = offsets < lengths[:, None]
        inputs = collate_latents(blocks, self.config)
        inputs["velocity_index"] = torch.where(mask, starts[:, None] + offsets, 0)
        inputs["times"] = torch.stack([self.times[i] for i in chosen]).float()
        inputs |= self._context_of_copies([self.places[i] for i in chosen])
        layout = VelocityLayout(image, step - steps.start, branch, mask, branches)
        nothing = torch.zeros(0, dtype=torch.long)
        return PackedBatch(
            inputs, nothing, nothing, layout, torch.tensor(self.image_trajectory, dtype=torch.long), guidance
        )

    def _context_of_copies(self, places: Sequence[Place]) -> dict[str, torch.Tensor]:
        """The row of every copy, how much of its conversation the copy sees, and which of its tails."""
        values = [(p.row, self.tails[p.row][p.tail].horizon, p.tail + 1) for p in places]
        names = ("context_rows", "context_horizons", "context_forks")
        return dict(zip(names, torch.tensor(values, dtype=torch.long).T.contiguous(), strict=True))


def pack_conversations(
    trajectories: Sequence[Trajectory],
    guidance: Guidance | Sequence[Guidance],
    branches: tuple[str, ...],
    config: Cosmos3Config,
) -> PackedBatch:
    """
    Tensors for one forward over whole trajectories, as [`UnifiedModel.pack`] says.

    Args:
        trajectories (`Sequence[Trajectory]`): The trajectories.
        guidance ([`Guidance`] or `Sequence[Guidance]`): Guidance of all trajectories, or of each.
        branches (`tuple[str, ...]`): Names of all guidance branches.
        config ([`Cosmos3Config`]): Token ids and sizes.
    """
    packing, used = _lay_out(trajectories, guidance, branches, config)
    return packing.to_batch(used, branches)


def pack_conversation_parts(
    trajectories: Sequence[Trajectory],
    guidance: Guidance | Sequence[Guidance],
    branches: tuple[str, ...],
    config: Cosmos3Config,
    steps_per_part: int,
) -> PackedParts:
    """
    Tensors for one forward of the understanding stream and several of the generation stream, as
    [`UnifiedModel.pack_parts`] says.

    Args:
        trajectories, guidance, branches, config: As in [`pack_conversations`].
        steps_per_part (`int`): Most steps of a window in one part.
    """
    packing, used = _lay_out(trajectories, guidance, branches, config)
    contexts = packing.contexts_alone(used)
    starts = range(0, packing.num_steps, steps_per_part)
    copies = [packing.copies_alone(range(start, start + steps_per_part), used, branches) for start in starts]
    for part in copies:
        # Which tokens of a row are a tail, and whose, so that a copy sees its own alone.
        part.inputs["forks"] = contexts.inputs["forks"]
    return PackedParts(contexts, copies)


def _lay_out(
    trajectories: Sequence[Trajectory],
    guidance: Guidance | Sequence[Guidance],
    branches: tuple[str, ...],
    config: Cosmos3Config,
) -> tuple[Packing, Guidance | tuple[Guidance, ...]]:
    """All that trajectories hold, and the guidance of all images, or of each."""
    packing = Packing(config)
    is_shared = not isinstance(guidance, Sequence)
    each = [guidance] * len(trajectories) if is_shared else guidance
    for index, (trajectory, own) in enumerate(zip(trajectories, each, strict=True)):
        packing.add_trajectory(index, trajectory, own, branches)
    return packing, guidance if is_shared else tuple(each[index] for index in packing.image_trajectory)
