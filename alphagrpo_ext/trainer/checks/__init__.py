# SPDX-License-Identifier: Apache-2.0

"""Checks before training, of datasets and their rows, and during it, of losses and gradients."""
