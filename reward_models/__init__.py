# SPDX-License-Identifier: Apache-2.0

"""DVReward and what it consists of: questions about images, judges that answer them, and aggregations of the answers."""

from reward_models.aggregation import AGGREGATIONS, aggregate, all_yes
from reward_models.dvreward import DVReward, Score
from reward_models.judges import JUDGES, Judge
from reward_models.prompts.questions import PromptRecord, Question, from_row, load_records, validate_dataset


__all__ = [
    "AGGREGATIONS",
    "JUDGES",
    "DVReward",
    "Judge",
    "PromptRecord",
    "Question",
    "Score",
    "aggregate",
    "all_yes",
    "from_row",
    "load_records",
    "validate_dataset",
]
