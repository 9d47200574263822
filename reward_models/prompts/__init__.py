# SPDX-License-Identifier: Apache-2.0

"""Prompts with their questions: records, rows of a dataset, and loading from files and datasets."""
