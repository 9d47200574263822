# SPDX-License-Identifier: Apache-2.0

"""Painters of the reward server: models that turn a prompt into an image for a policy that only writes text."""
