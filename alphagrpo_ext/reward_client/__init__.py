# SPDX-License-Identifier: Apache-2.0

"""The HTTP client of the reward server (`python -m reward_models.server`), for processes that import nothing heavy."""
