# SPDX-License-Identifier: Apache-2.0

"""The reward server: `python -m reward_models.server`."""
