# SPDX-License-Identifier: Apache-2.0

"""Pretraining of the packaged checkpoint `bagel-shapes`."""
