# SPDX-License-Identifier: Apache-2.0

from reward_models.judges.base import JUDGES, Judge, TextJudge


__all__ = ["JUDGES", "Judge", "TextJudge"]
