# SPDX-License-Identifier: Apache-2.0

"""
The shapes world: a complete text-to-image benchmark that fits into a unit test.

An image has 24x24 pixels in a 3x3 grid of cells. Up to four shapes in four colors lie in different cells, on a uniform background
(`scene`). Prompts of seven categories, a small version of GenEval's, come with their yes/no questions. They are split by attribute
combination, not by string (`prompts`). A thought plans a scene, and a reflection names what is wrong with an image and plans its
repair (`text`). A judge reads the answers off the pixels as soft probabilities (`judge`). Edits come with their questions, too
(`editing`). `model` builds the tiny BAGEL that `checkpoint/` holds.
"""
