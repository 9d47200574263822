# SPDX-License-Identifier: Apache-2.0

from reward_models.prompts.questions import PromptRecord, Question, from_row, load_records, validate_dataset

from .aggregation import AGGREGATIONS, aggregate, strict_pass
from .dvreward import DVReward, Score
from .judges import JUDGES, Judge


__all__ = [
    "AGGREGATIONS",
    "JUDGES",
    "DVReward",
    "Judge",
    "PromptRecord",
    "Question",
    "Score",
    "aggregate",
    "from_row",
    "load_records",
    "strict_pass",
    "validate_dataset",
]
