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

"""What of several contexts has to be run: not what an earlier turn has read, nor what another of them begins with."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from alphagrpo_ext.models.bagel.configuration_bagel import BagelConfig
from alphagrpo_ext.models.bagel.rows_bagel import BagelRow
from alphagrpo_ext.trajectory import Segment, TextSegment


@dataclass(frozen=True)
class PrefillPlan:
    """
    Rows to run, and where the contexts are found in them.

    Args:
        rows (`list[BagelRow]`): What is run, each behind what is known of it.
        past_rows, past_blocks (`list[int]`): Row of the past that each goes on from, and how many of its blocks it sees.
        index (`list[int]`): Of every context, the row that begins with it.
        ends (`list[tuple[int, int]]`): Of every context, rotary position and number of blocks where it ends.
    """

    rows: list[BagelRow]
    past_rows: list[int]
    past_blocks: list[int]
    index: list[int]
    ends: list[tuple[int, int]]


def _contents(segment: Segment) -> Hashable:
    """Equal for segments that leave the same keys and values."""
    if isinstance(segment, TextSegment):
        return tuple(segment.content_ids)
    return id(segment.latents), id(segment.pixel_values)


def _row(segments: Sequence[Segment], config: BagelConfig, after: Sequence[Segment] = ()) -> BagelRow:
    """Segments at the place where they stand behind others."""
    before = _row(after, config) if after else BagelRow(config)
    row = BagelRow(config, before.position, before.num_blocks)
    for segment in segments:
        row.add_segment(segment)
    return row


def plan_prefill(
    contexts: Sequence[Sequence[Segment]], past: Sequence[Sequence[Segment]], config: BagelConfig
) -> PrefillPlan:
    """
    Decide what to run. Texts are the same if their ids are, images if they hold the same tensors.

    Args:
        contexts (`Sequence[Sequence[Segment]]`): What is wanted, in any order, some of it several times perhaps.
        past (`Sequence[Sequence[Segment]]`): What the rows of a cache hold.
        config ([`BagelConfig`]): Sizes and delimiters.
    """
    numbers: dict[Hashable, int] = {}

    def name(segments: Sequence[Segment]) -> tuple[int, ...]:
        return tuple(numbers.setdefault(_contents(segment), len(numbers)) for segment in segments)

    names = [name(context) for context in contexts]
    of_name = dict(zip(names, contexts, strict=True))
    begun = {wanted[:length] for wanted in of_name for length in range(len(wanted))}
    run = [wanted for wanted in of_name if wanted not in begun]
    found_in = {wanted[:length]: i for i, wanted in enumerate(run) for length in range(len(wanted) + 1)}
    known = {held[:length]: i for i, held in enumerate(map(name, past)) for length in range(1, len(held) + 1)}
    rows, past_rows, past_blocks = [], [], []
    for wanted in run:
        length = max((n for n in range(1, len(wanted) + 1) if wanted[:n] in known), default=0)
        context = of_name[wanted]
        rows.append(_row(context[length:], config, after=context[:length]))
        past_rows.append(known[wanted[:length]] if length else 0)
        past_blocks.append(_row(context[:length], config).num_blocks)
    ends = {wanted: _row(context, config) for wanted, context in of_name.items()}
    return PrefillPlan(
        rows=rows,
        past_rows=past_rows,
        past_blocks=past_blocks,
        index=[found_in[wanted] for wanted in names],
        ends=[(ends[wanted].position, ends[wanted].num_blocks) for wanted in names],
    )
