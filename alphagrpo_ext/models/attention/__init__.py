# SPDX-License-Identifier: Apache-2.0
"""Implementations of attention that models have, and the choice of one of them."""
