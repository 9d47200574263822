# SPDX-License-Identifier: Apache-2.0

"""Numbers for contexts, so that packing and prefill find equal contexts and contexts that begin others.

Contexts are compared by what their segments hold, and not by what a task means by them. A later round of a task
therefore shares whatever an earlier round has read.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence

import torch

from alphagrpo_ext.trajectory import Segment, TextSegment


class ContextTree:
    """
    A tree of contexts. A node is a context, its parent is the context without the last segment, and the root, node 0,
    is the empty context.

    Texts are equal if they have the same token ids. Images are equal if they hold the same tensor objects, which the
    tree keeps alive.
    """

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, Hashable], int] = {}
        self._tensors: dict[torch.Tensor | None, int] = {}

    def add(self, segments: Sequence[Segment]) -> list[int]:
        """
        Add a context.

        Returns:
            `list[int]`: The nodes from the root to the context, so that entry `n` is the context of the first `n`
            segments.
        """
        path = [0]
        for segment in segments:
            path.append(self._nodes.setdefault((path[-1], self._key(segment)), len(self._nodes) + 1))
        return path

    def _key(self, segment: Segment) -> Hashable:
        if isinstance(segment, TextSegment):
            return array("q", segment.content_ids).tobytes()
        return tuple(
            self._tensors.setdefault(tensor, len(self._tensors)) for tensor in (segment.latents, segment.pixel_values)
        )


def longest_paths(paths: Sequence[Sequence[int]]) -> dict[int, int]:
    """
    For every node on paths of [`ContextTree.add`], the index of the longest path through it. Its context begins with
    the node's context, and begins no other one.
    """
    indices = {path[-1]: i for i, path in enumerate(paths)}
    longest: dict[int, int] = {}
    for i in sorted(indices.values(), key=lambda i: len(paths[i])):
        longest |= dict.fromkeys(paths[i], i)
    return longest
