# SPDX-License-Identifier: Apache-2.0

"""Cosmos3, a family of Nano's form and Edge's form."""
