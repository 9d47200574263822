# SPDX-License-Identifier: Apache-2.0

"""Files and images that users hand in: JSON lines, decoding of images."""
