# SPDX-License-Identifier: Apache-2.0

"""Flags of OpenRLHF, translated to arguments of a recipe."""
