# SPDX-License-Identifier: Apache-2.0

"""Measuring the library: what a step costs, against other ways of computing the same, and against the machine."""
