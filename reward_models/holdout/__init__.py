# SPDX-License-Identifier: Apache-2.0

"""A judge that is held out of training and scores rollouts to show reward hacking."""
