# SPDX-License-Identifier: Apache-2.0

"""Numbers of contexts: equal contexts share a node, and a path passes the nodes of all beginnings."""

from dataclasses import replace

import torch

from alphagrpo_ext.models.bagel.context_tree import ContextTree, longest_paths
from alphagrpo_ext.trajectory import ImageSegment, TextSegment


A, B = TextSegment([1, 2]), TextSegment([3])
IMAGE = ImageSegment(torch.zeros(6, 4), (2, 3), pixel_values=torch.zeros(3, 8, 12))


def test_equal_contexts_share_their_nodes() -> None:
    tree = ContextTree()
    path = tree.add([A, IMAGE, B])
    assert len(set(path)) == 4
    assert tree.add([]) == path[:1] == [0]
    assert tree.add([TextSegment([1, 2]), replace(IMAGE)]) == path[:3]
    # The end token of a sampled text is a delimiter, and no part of the context.
    assert tree.add([TextSegment([1, 2, 9], sampled=True, ended=True)]) == path[:2]
    assert tree.add([TextSegment([1, 2], sampled=True, ended=False)]) == path[:2]


def test_other_contexts_have_nodes_of_their_own() -> None:
    tree = ContextTree()
    path = tree.add([A, IMAGE, B])
    others = [
        tree.add(context)
        for context in (
            [B],
            [A, B],
            [A, replace(IMAGE, latents=IMAGE.latents.clone())],
            [A, replace(IMAGE, pixel_values=None)],
            [A, replace(IMAGE, pixel_values=IMAGE.pixel_values.clone())],
        )
    ]
    nodes = [other[-1] for other in others]
    assert len({*nodes, *path}) == len(nodes) + len(path)


def test_longest_paths_are_those_of_contexts_that_begin_no_other() -> None:
    tree = ContextTree()
    paths = [tree.add(context) for context in ([A], [A, IMAGE, B], [], [B], [A, IMAGE])]
    longest = longest_paths(paths)
    assert [longest[path[-1]] for path in paths] == [1, 1, 1, 3, 1]
