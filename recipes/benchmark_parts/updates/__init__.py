# SPDX-License-Identifier: Apache-2.0

"""Updates of one micro-batch, in one forward, split over several, and with each implementation of attention."""
