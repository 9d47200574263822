# SPDX-License-Identifier: Apache-2.0

"""Decomposition of prompts into questions: the contract, a file per decomposer, and the file of records."""
