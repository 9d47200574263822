# SPDX-License-Identifier: Apache-2.0

"""Answers to questions about images: a reward of them, and how many of a policy's yes and no are right."""
