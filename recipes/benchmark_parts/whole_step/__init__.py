# SPDX-License-Identifier: Apache-2.0

"""Training steps as a whole: first images, rollout, reward and update."""
