# SPDX-License-Identifier: Apache-2.0
"""Model families, and the contract that they fulfil."""
