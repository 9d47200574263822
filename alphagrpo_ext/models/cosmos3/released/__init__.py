# SPDX-License-Identifier: Apache-2.0

"""The layout of the released checkpoints, which Diffusers and Transformers read."""
