# SPDX-License-Identifier: Apache-2.0

"""Which contexts are the same, and which of them are the beginning of others."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeAlias

from alphagrpo_ext.trajectory import Segment, TextSegment


ContextName: TypeAlias = tuple[Hashable, ...]
"""A hashable for every segment of a context, so that the name of a beginning is the beginning of the name."""


def context_name(segments: Sequence[Segment]) -> ContextName:
    """
    Equal for contexts that leave the same keys and values: their texts have the same ids, their images hold the same tensors.
    A name means something as long as these tensors live.
    """
    # Bytes, because they keep their hash: a name is looked up with each of its beginnings.
    return tuple(
        array("q", segment.content_ids).tobytes()
        if isinstance(segment, TextSegment)
        else (id(segment.latents), id(segment.pixel_values))
        for segment in segments
    )


def holders(names: Iterable[ContextName]) -> dict[ContextName, ContextName]:
    """For every context one that begins with it and is not itself the beginning of another: perhaps the context."""
    names = list(names)
    longest: dict[ContextName, ContextName] = {}
    for name in sorted(names, key=len):
        longest |= {name[:length]: name for length in range(len(name) + 1)}
    return {name: longest[name] for name in names}
