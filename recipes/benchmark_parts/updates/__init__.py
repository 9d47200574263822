# SPDX-License-Identifier: Apache-2.0

"""Updates of one micro-batch, in one forward and split over several."""
