# SPDX-License-Identifier: Apache-2.0

"""Evaluation of a policy on held-out prompts: samples, statistics, tables, pages, and resumable storage."""
