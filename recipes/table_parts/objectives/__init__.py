# SPDX-License-Identifier: Apache-2.0

"""Objectives compared: what they learn, and what a step of each costs."""
