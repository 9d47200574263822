# SPDX-License-Identifier: Apache-2.0

"""What a policy makes of trajectories that were sampled: scores of texts and images, and the loss of images."""
