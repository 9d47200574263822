# SPDX-License-Identifier: Apache-2.0

"""Judges answer yes/no questions about images: the contract, and one file per judge."""

from reward_models.judges.base import JUDGES, Judge


__all__ = ["JUDGES", "Judge"]
