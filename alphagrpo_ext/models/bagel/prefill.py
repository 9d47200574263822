# SPDX-License-Identifier: Apache-2.0

"""What of several contexts has to be run: not what an earlier turn has read, nor what another of them begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alphagrpo_ext.models.bagel.configuration_bagel import BagelConfig
from alphagrpo_ext.models.bagel.layout import BagelRow
from alphagrpo_ext.models.bagel.shared_contexts import context_name, holders
from alphagrpo_ext.trajectory import Segment


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


def _row(segments: Sequence[Segment], config: BagelConfig, start: tuple[int, int] = (0, 0)) -> BagelRow:
    row = BagelRow(config, *start)
    for segment in segments:
        row.add_segment(segment)
    return row


def plan_prefill(
    contexts: Sequence[Sequence[Segment]], past: Sequence[Sequence[Segment]], config: BagelConfig
) -> PrefillPlan:
    """
    Decide what to run. See [`context_name`] for which contexts are the same.

    Args:
        contexts (`Sequence[Sequence[Segment]]`): What is wanted, in any order, some of it several times perhaps.
        past (`Sequence[Sequence[Segment]]`): What the rows of a cache hold.
        config ([`BagelConfig`]): Sizes and delimiters.
    """
    names = [context_name(context) for context in contexts]
    of_name = dict(zip(names, contexts, strict=True))
    holder_of = holders(of_name)
    places = {name: i for i, name in enumerate(dict.fromkeys(holder_of.values()))}
    whole = [_row(of_name[name], config) for name in places]
    past_names = [context_name(held) for held in past]
    known = {held[:length]: i for i, held in enumerate(past_names) for length in range(1, len(held) + 1)}
    rows, past_rows, past_blocks = [], [], []
    for name, row in zip(places, whole, strict=True):
        length = max((n for n in range(1, len(name) + 1) if name[:n] in known), default=0)
        rows.append(_row(of_name[name][length:], config, row.ends[length]) if length else row)
        past_rows.append(known[name[:length]] if length else 0)
        past_blocks.append(row.ends[length][1])
    index = [places[holder_of[name]] for name in names]
    return PrefillPlan(
        rows=rows,
        past_rows=past_rows,
        past_blocks=past_blocks,
        index=index,
        ends=[whole[place].ends[len(name)] for place, name in zip(index, names, strict=True)],
    )
