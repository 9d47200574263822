# SPDX-License-Identifier: Apache-2.0

"""Checks of one GPU: whether the package computes there what it computes on a CPU, and how fast it trains."""
