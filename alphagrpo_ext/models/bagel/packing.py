# SPDX-License-Identifier: Apache-2.0

"""
How whole trajectories become one forward: contexts once, and behind them the noised copies that are trained.

- A *noised copy* is the state of a sampled image before one step of its window, in one guidance branch. It sees its
  context up to an extent, and itself.
- A *packed sequence* is a context and the noised copies that see a beginning of it.
- A *bucket* holds packed sequences that differ in nothing but the length of their texts. They are padded to each
  other.

A trajectory is one packed sequence. A guidance branch whose context is a beginning of the trajectory needs no tokens
of its own: its copies are attached to the trajectory with an earlier horizon. All other branches share packed
sequences of their own, one for each context that begins no other one. The buckets follow each other in one batch of
size 1, so that no bucket is padded to the length of another, and layers see one dense tensor per expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from alphagrpo_ext.models.bagel.configuration_bagel import BagelConfig
from alphagrpo_ext.models.bagel.context_tree import ContextTree, longest_paths
from alphagrpo_ext.models.bagel.guidance import BRANCHES, BagelGuidance
from alphagrpo_ext.models.bagel.layout import (
    BEGINNING,
    NOISED_BLOCK,
    PADDING,
    BagelSequence,
    Extent,
    collate_pixels,
    collate_tokens,
    grid_position_ids,
)
from alphagrpo_ext.models.contract import PackedBatch, PackedParts, VelocityLayout
from alphagrpo_ext.trajectory import ImageSegment, Segment, TextSegment, Trajectory


NUM_DELIMITERS = 2
"""Tokens of a noised copy that belong to the understanding expert."""


class Bucket(NamedTuple):
    """
    Sizes of a bucket, which is one line of the table `buckets` of a packed forward.

    Args:
        sequences (`int`): Number of packed sequences.
        context_und, context_gen (`int`): Tokens of each context for either expert.
        copies, copy_latents (`int`): Noised copies of each sequence, and latents of each copy.
    """

    sequences: int
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
        """Tokens of all contexts, and of all copies, for the understanding expert."""
        return self.sequences * self.context_und, self.sequences * self.copies * NUM_DELIMITERS

    @property
    def gen_sizes(self) -> tuple[int, int]:
        """Tokens of all contexts, and of all copies, for the generation expert."""
        return self.sequences * self.context_gen, self.sequences * self.copies * self.copy_latents


@dataclass(frozen=True)
class NoisedCopy:
    """
    A noised image behind the context of a packed sequence.

    Args:
        latents (`torch.Tensor` of shape `(tokens, channels)`): The noised image.
        grid (`tuple[int, int]`): Its rows and columns.
        timestep (`float`): Its time in (0, 1].
        extent ([`Extent`]): Its rotary position and its horizon.
        image, branch, step (`int`): Which velocity is predicted from it, as in [`VelocityLayout`].
    """

    latents: torch.Tensor
    grid: tuple[int, int]
    timestep: float
    extent: Extent
    image: int
    branch: int
    step: int


class _PackedSequence(BagelSequence):
    """A context, the tokens of it whose log-probabilities are scored, and the noised copies that see it."""

    def __init__(self, config: BagelConfig, start: Extent = BEGINNING) -> None:
        super().__init__(config, start)
        self.copies: list[NoisedCopy] = []
        self.sampled_tokens: list[tuple[int, int]] = []
        """For every sampled token, the index of the understanding token before it, and its id."""

    @property
    def shape(self) -> tuple[int, ...]:
        """
        Equal for the sequences of one bucket. Starts with the number of copies and the latents of the longest one.
        """
        return (
            len(self.copies),
            max((len(copy.latents) for copy in self.copies), default=0),
            sum(self.gen.lengths),
            sum(pixels.shape[-2] * pixels.shape[-1] for pixels in self.vit_pixels),
        )


class _Packer:
    """Lays out trajectories one after the other, and attaches noised copies to the contexts that they see."""

    def __init__(self, config: BagelConfig, shares_contexts: bool) -> None:
        self.config, self.shares_contexts = config, shares_contexts
        self.tree = ContextTree()
        self.trajectory_sequences: list[_PackedSequence] = []
        self.image_trajectory: list[int] = []
        self.image_guidance: list[BagelGuidance] = []
        self.branch_sequences: dict[int, _PackedSequence] = {}
        """Contexts of branches that begin no trajectory that sees them, by their nodes in the tree."""
        self.branch_paths: list[list[int]] = []
        """Their paths in the tree."""

    def add(self, trajectory: Trajectory, guidance: BagelGuidance) -> None:
        """Lay out a trajectory. A sampled image that nothing follows is in no context and is left out."""
        sequence = _PackedSequence(self.config)
        path = self.tree.add(trajectory.segments)
        for i, segment in enumerate(trajectory.segments):
            if isinstance(segment, ImageSegment) and segment.sampled:
                if segment.window is not None:
                    self._add_copies(sequence, path[: i + 1], segment, guidance)
                    self.image_trajectory.append(len(self.trajectory_sequences))
                    self.image_guidance.append(guidance)
                if i + 1 == len(trajectory.segments):
                    break
            start = sequence.add_segment(segment)
            if isinstance(segment, TextSegment) and segment.sampled:
                sequence.sampled_tokens += zip(itertools.count(start), segment.token_ids, strict=False)
        self.trajectory_sequences.append(sequence)

    def _add_copies(
        self, sequence: _PackedSequence, path: list[int], image: ImageSegment, guidance: BagelGuidance
    ) -> None:
        """Attach an image's noised copies to its trajectory, whose context has a `path`, or to other contexts."""
        window, index = image.window, len(self.image_trajectory)
        times = window.timesteps[:-1].tolist()
        for branch, name in enumerate(BRANCHES):
            steps = [step for step, time in enumerate(times) if name in guidance.branches_at(time)]
            if not steps:
                continue
            if name == "full":
                seen, extent = sequence, sequence.extent
            else:
                seen, extent = self._find_context(sequence, path, image.guidance_contexts.get(name, []))
            seen.copies += [
                NoisedCopy(window.latents[step], image.grid, times[step], extent, index, branch, step)
                for step in steps
            ]

    def _find_context(
        self, sequence: _PackedSequence, path: list[int], context: Sequence[Segment]
    ) -> tuple[_PackedSequence, Extent]:
        """The sequence that begins with a branch's context, and where the context ends in it."""
        # Without sharing, a node that no other context has.
        own_path = self.tree.add(context) if self.shares_contexts else [-1 - len(self.branch_sequences)]
        node = own_path[-1]
        if node in path:
            return sequence, sequence.extents[len(context)]
        if node not in self.branch_sequences:
            self.branch_sequences[node] = _PackedSequence.from_segments(context, self.config)
            self.branch_paths.append(own_path)
        return self.branch_sequences[node], self.branch_sequences[node].extent

    def sequences(self) -> list[_PackedSequence]:
        """Sequences of trajectories, and the fewest that hold the contexts of the other branches."""
        longest, sequences = longest_paths(self.branch_paths), list(self.branch_sequences.values())
        copies: dict[int, list[NoisedCopy]] = {}
        for node, sequence in self.branch_sequences.items():
            copies.setdefault(longest[node], []).extend(sequence.copies)
        for index, shared in copies.items():
            sequences[index].copies = shared
        return [*self.trajectory_sequences, *(sequences[index] for index in copies)]


@dataclass(frozen=True)
class _PackedBucket:
    """
    The sequences of a bucket as tensors.

    Args:
        sizes ([`Bucket`]): Sizes.
        sequences (`list[_PackedSequence]`): The sequences.
        noised (`list[list[NoisedCopy]]`): The copies of every sequence that are in the batch, as many for each.
        contexts (`dict[str, torch.Tensor]`): What [`collate_tokens`] returns for their contexts.
        copies (`dict[str, torch.Tensor]`):
            `positions`, `blocks`, `horizons` and `timesteps` `(sequences, copies)`; `position_ids` and `mask`
            `(sequences, copies, latents)`; and `latents` `(sequences, copies, latents, channels)`.
    """

    sizes: Bucket
    sequences: list[_PackedSequence]
    noised: list[list[NoisedCopy]]
    contexts: dict[str, torch.Tensor]
    copies: dict[str, torch.Tensor]

    def narrowed(self, steps: range, config: BagelConfig) -> _PackedBucket:
        """The same contexts with the copies of some steps alone, which are counted from the first of them."""
        noised = [
            [replace(copy, step=copy.step - steps.start) for copy in copies if copy.step in steps]
            for copies in self.noised
        ]
        sizes = Bucket(*self.sizes[:3], copies=len(noised[0]), copy_latents=self.sizes.copy_latents)
        return replace(self, sizes=sizes, noised=noised, copies=_collate_copies(noised, sizes, config))


def _collate_buckets(
    sequences: Sequence[_PackedSequence], config: BagelConfig, same_steps: bool = False
) -> list[_PackedBucket]:
    """
    Sequences by shape, in the order in which the shapes first come. With `same_steps`, the sequences of a bucket have as many
    copies of every step.
    """
    by_shape: dict[Hashable, list[_PackedSequence]] = {}
    for sequence in sequences:
        steps = sorted(copy.step for copy in sequence.copies) if same_steps else ()
        by_shape.setdefault((sequence.shape, tuple(steps)), []).append(sequence)
    buckets = []
    for same_shape in by_shape.values():
        num_copies, num_latents, *_ = same_shape[0].shape
        contexts = collate_tokens(same_shape, config)
        num_und = contexts["input_ids"].shape[1]
        num_gen = contexts["positions"].shape[1] - num_und
        sizes = Bucket(len(same_shape), num_und, num_gen, num_copies, num_latents)
        noised = [sequence.copies for sequence in same_shape]
        copies = _collate_copies(noised, sizes, config)
        buckets.append(_PackedBucket(sizes, same_shape, noised, contexts, copies))
    return buckets


def _collate_copies(
    noised: Sequence[Sequence[NoisedCopy]], sizes: Bucket, config: BagelConfig
) -> dict[str, torch.Tensor]:
    shape = (sizes.sequences, sizes.copies, sizes.copy_latents)
    tensors = {
        "latents": torch.zeros(*shape, config.latent_channels),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "mask": torch.zeros(shape, dtype=torch.bool),
        "timesteps": torch.zeros(shape[:2]),
        "positions": torch.zeros(shape[:2], dtype=torch.long),
        "blocks": (NOISED_BLOCK + torch.arange(sizes.copies)).expand(shape[:2]),
        "horizons": torch.zeros(shape[:2], dtype=torch.long),
    }
    for i, copies in enumerate(noised):
        for j, copy in enumerate(copies):
            length = len(copy.latents)
            tensors["latents"][i, j, :length] = copy.latents
            tensors["position_ids"][i, j, :length] = grid_position_ids(*copy.grid, config.max_latent_size)
            tensors["mask"][i, j, :length] = True
            tensors["timesteps"][i, j] = copy.timestep
            tensors["positions"][i, j], tensors["horizons"][i, j] = copy.extent
    return tensors


def _concatenate(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """All values of all tensors as a batch of size 1, `(1, values)`."""
    return torch.cat([tensor.flatten() for tensor in tensors])[None]


def _token_attribute(buckets: Sequence[_PackedBucket], name: str) -> torch.Tensor:
    """An attribute in `PADDING` of all tokens, `(1, und + gen)`; the tokens of a copy share one value."""
    contexts = [bucket.contexts[name].tensor_split([bucket.sizes.context_und], dim=1) for bucket in buckets]
    copies = [bucket.copies[name] for bucket in buckets]
    masks = [bucket.copies["mask"] for bucket in buckets]
    return _concatenate(
        [
            *(und for und, _ in contexts),
            *(values.repeat_interleave(NUM_DELIMITERS) for values in copies),
            *(gen for _, gen in contexts),
            *(torch.where(mask, values[..., None], PADDING[name]) for mask, values in zip(masks, copies, strict=True)),
        ]
    )


def _sequence_ids(buckets: Sequence[_PackedBucket]) -> torch.Tensor:
    """The sequence of every token, `(1, und + gen)`."""
    sizes = [bucket.sizes for bucket in buckets]
    ids = torch.arange(sum(s.sequences for s in sizes)).split([s.sequences for s in sizes])
    lengths = [(s.context_und, s.copies * NUM_DELIMITERS, s.context_gen, s.copies * s.copy_latents) for s in sizes]
    parts = zip(*lengths, strict=True)
    return _concatenate(i.repeat_interleave(n) for part in parts for i, n in zip(ids, part, strict=True))


def _latent_inputs(buckets: Sequence[_PackedBucket]) -> dict[str, torch.Tensor]:
    """
    Latents of contexts and then of copies, with their places in the position table and their times.

    Returns:
        `dict[str, torch.Tensor]`: Empty without latents, else `latents` `(1, gen, channels)`, `latent_position_ids`
        and `timestep_index` `(1, gen)`, and `timesteps` `(1, 1 + copies)`. Images of contexts are clean and share time
        0, the first one.
    """
    contexts = [bucket.contexts for bucket in buckets if "latents" in bucket.contexts]
    copies = [bucket.copies for bucket in buckets if bucket.sizes.copies]
    if not contexts and not copies:
        return {}
    index = [torch.zeros_like(context["latent_position_ids"]) for context in contexts]
    first = 1
    for bucket_copies in copies:
        times, mask = bucket_copies["timesteps"], bucket_copies["mask"]
        numbers = first + torch.arange(times.numel()).view_as(times)
        index.append(numbers[:, :, None].expand_as(mask))
        first += times.numel()
    position_ids = [*(c["latent_position_ids"] for c in contexts), *(c["position_ids"] for c in copies)]
    return {
        "latents": torch.cat([tensors["latents"].flatten(0, -2) for tensors in (*contexts, *copies)])[None],
        "latent_position_ids": _concatenate(position_ids),
        "timesteps": _concatenate([torch.zeros(1), *(c["timesteps"] for c in copies)]),
        "timestep_index": _concatenate(index),
    }


def _starts(buckets: Sequence[_PackedBucket]) -> tuple[dict[_PackedSequence, int], dict[_PackedSequence, int]]:
    """For every sequence, the index of its context among the understanding tokens, and of its copies among latents."""
    und, gen = 0, sum(bucket.sizes.gen_sizes[0] for bucket in buckets)
    context_starts, copy_starts = {}, {}
    for bucket in buckets:
        for sequence in bucket.sequences:
            context_starts[sequence], copy_starts[sequence] = und, gen
            und += bucket.sizes.context_und
            gen += bucket.sizes.copies * bucket.sizes.copy_latents
    return context_starts, copy_starts


def _locate_velocities(
    buckets: Sequence[_PackedBucket], copy_starts: dict[_PackedSequence, int]
) -> tuple[torch.Tensor, VelocityLayout] | None:
    """
    Index of every copy's latents, `(copies, latents)`, and what they are. Copies are sorted, so that the velocities of
    an image follow each other step by step. `None` without copies.
    """
    located = [
        (copy, copy_starts[sequence] + i * bucket.sizes.copy_latents)
        for bucket in buckets
        for sequence, copies in zip(bucket.sequences, bucket.noised, strict=True)
        for i, copy in enumerate(copies)
    ]
    if not located:
        return None
    located.sort(key=lambda item: (item[0].image, item[0].branch, item[0].step))
    lengths = torch.tensor([len(copy.latents) for copy, _ in located])
    offsets = torch.arange(int(lengths.max()))
    mask = offsets < lengths[:, None]
    index = torch.where(mask, torch.tensor([start for _, start in located])[:, None] + offsets, 0)
    image, branch, step = torch.tensor([(copy.image, copy.branch, copy.step) for copy, _ in located]).T
    return index, VelocityLayout(image=image, step=step, branch=branch, mask=mask, branches=BRANCHES)


def _packed_inputs(buckets: Sequence[_PackedBucket], config: BagelConfig) -> dict[str, torch.Tensor]:
    """Everything that the decoder reads: arguments of [`BagelModel.forward`] without targets."""
    delimiters = torch.tensor([config.image_start_token_id, config.image_end_token_id])
    copy_ids = [delimiters.repeat(bucket.sizes.sequences * bucket.sizes.copies) for bucket in buckets]
    return {
        "buckets": torch.tensor([bucket.sizes for bucket in buckets]),
        "input_ids": _concatenate([*(bucket.contexts["input_ids"] for bucket in buckets), *copy_ids]),
        **{name: _token_attribute(buckets, name) for name in PADDING},
        "sequence_ids": _sequence_ids(buckets),
        **_latent_inputs(buckets),
    }


@dataclass(frozen=True)
class _PackedTrajectories:
    """
    Trajectories that were laid out.

    Args:
        packer ([`_Packer`]): Laid them out.
        guidance ([`BagelGuidance`] or `tuple[BagelGuidance, ...]`): Of all images, or of each.
        config ([`BagelConfig`]): Sizes and delimiters.
    """

    packer: _Packer
    guidance: BagelGuidance | tuple[BagelGuidance, ...]
    config: BagelConfig

    @classmethod
    def of(
        cls,
        trajectories: Sequence[Trajectory],
        guidance: BagelGuidance | Sequence[BagelGuidance],
        config: BagelConfig,
        shares_contexts: bool = True,
    ) -> _PackedTrajectories:
        packer = _Packer(config, shares_contexts)
        is_shared = isinstance(guidance, BagelGuidance)
        each = [guidance] * len(trajectories) if is_shared else guidance
        for trajectory, own in zip(trajectories, each, strict=True):
            packer.add(trajectory, own)
        return cls(packer, guidance if is_shared else tuple(packer.image_guidance), config)

    def batch(self, buckets: Sequence[_PackedBucket]) -> PackedBatch:
        """Contexts with their sampled tokens, and the copies that the buckets have."""
        inputs = _packed_inputs(buckets, self.config)
        context_starts, copy_starts = _starts(buckets)
        inputs |= collate_pixels(list(context_starts), list(context_starts.values()), self.config)
        tokens = [
            (context_starts[sequence] + place, token_id, trajectory, column)
            for trajectory, sequence in enumerate(self.packer.trajectory_sequences)
            for column, (place, token_id) in enumerate(sequence.sampled_tokens)
        ]
        return self._to_batch(inputs, tokens, _locate_velocities(buckets, copy_starts))

    def copies(self, buckets: Sequence[_PackedBucket]) -> PackedBatch:
        """
        The copies alone. Positions, blocks and horizons are those of contexts, too: they say what a copy sees.
        """
        inputs, copy_starts = _packed_inputs(buckets, self.config), _starts(buckets)[1]
        num_und, num_gen = (
            sum(s) for s in zip(*((b.sizes.und_sizes[0], b.sizes.gen_sizes[0]) for b in buckets), strict=True)
        )
        inputs["input_ids"] = inputs["input_ids"][:, num_und:]
        for name in ("latents", "latent_position_ids", "timestep_index"):
            inputs[name] = inputs[name][:, num_gen:]
        index, layout = _locate_velocities(buckets, copy_starts)
        return self._to_batch(inputs, [], (index - num_gen, layout))

    def _to_batch(
        self,
        inputs: dict[str, torch.Tensor],
        tokens: Sequence[tuple[int, int, int, int]],
        located: tuple[torch.Tensor, VelocityLayout] | None,
    ) -> PackedBatch:
        """With the place, id, trajectory and column of every sampled token, and what [`_locate_velocities`] returns."""
        places, targets, trajectory, column = torch.tensor(tokens, dtype=torch.long).reshape(-1, 4).T.contiguous()
        inputs |= {"score_index": places, "score_targets": targets}
        velocities = None
        if located is not None:
            inputs["velocity_index"], velocities = located
        return PackedBatch(
            inputs=inputs,
            score_trajectory=trajectory,
            score_column=column,
            velocities=velocities,
            image_trajectory=torch.tensor(self.packer.image_trajectory, dtype=torch.long),
            guidance=self.guidance,
        )


def pack_trajectories(
    trajectories: Sequence[Trajectory],
    guidance: BagelGuidance | Sequence[BagelGuidance],
    config: BagelConfig,
    shares_contexts: bool = True,
) -> PackedBatch:
    """
    Lay out whole trajectories for one forward.

    Args:
        trajectories (`Sequence[Trajectory]`): What to score.
        guidance ([`BagelGuidance`] or `Sequence[BagelGuidance]`):
            Decides for all trajectories, or for each, which branches are needed at which times.
        config ([`BagelConfig`]): Sizes and delimiters.
        shares_contexts (`bool`, *optional*, defaults to `True`):
            With `False`, every guidance branch of every image has a packed sequence of its own, for comparisons.

    Returns:
        [`PackedBatch`]: Its inputs are a batch of size 1, and `buckets` `(buckets, 5)` holds one [`Bucket`] per line.
    """
    packed = _PackedTrajectories.of(trajectories, guidance, config, shares_contexts)
    return packed.batch(_collate_buckets(packed.packer.sequences(), config))


def pack_parts(
    trajectories: Sequence[Trajectory],
    guidance: BagelGuidance | Sequence[BagelGuidance],
    config: BagelConfig,
    steps_per_part: int,
) -> PackedParts:
    """
    Lay out whole trajectories for one forward over contexts and several over noised copies, as
    [`UnifiedModel.pack_parts`] says.

    Args:
        trajectories, guidance, config: As in [`pack_trajectories`].
        steps_per_part (`int`): Most steps of a window in one part.
    """
    packed = _PackedTrajectories.of(trajectories, guidance, config)
    # All parts have the same contexts in the same order, whatever copies they have.
    buckets = _collate_buckets(packed.packer.sequences(), config, same_steps=True)
    num_steps = 1 + max(copy.step for bucket in buckets for copies in bucket.noised for copy in copies)
    parts = [range(start, start + steps_per_part) for start in range(0, num_steps, steps_per_part)]
    return PackedParts(
        contexts=packed.batch([bucket.narrowed(range(0), config) for bucket in buckets]),
        copies=[packed.copies([bucket.narrowed(steps, config) for bucket in buckets]) for steps in parts],
    )
