# SPDX-License-Identifier: Apache-2.0

"""How good a policy is after how many seconds of training, for several algorithms."""
