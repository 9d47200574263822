# SPDX-License-Identifier: Apache-2.0

"""Image files, and decoding of images that are not trusted."""
