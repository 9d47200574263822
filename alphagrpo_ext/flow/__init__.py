# SPDX-License-Identifier: Apache-2.0

"""The mathematics of the image side: pure functions of tensors, without a model or a trainer.

Time `t` runs from 1 (noise) to 0 (image), `x_t = (1 - t) x_0 + t eps`, and a model predicts `v = eps - x_0`. A state
is a tensor of shape `(..., tokens, channels)`.
"""
