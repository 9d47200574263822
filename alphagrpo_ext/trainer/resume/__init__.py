# SPDX-License-Identifier: Apache-2.0

"""Checkpoints, and how a run that was stopped goes on from one."""
