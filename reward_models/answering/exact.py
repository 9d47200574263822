# SPDX-License-Identifier: Apache-2.0

"""The reward of answers: whether what a text says after its thought is the answer of its row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reward_models.format import written_texts
from reward_models.prompts.questions import paints_image


THOUGHT_START, THOUGHT_END = "<think>", "</think>"
_SURROUNDING = " \t\r\n.,;:!?。！？"


def given_answer(text: str) -> str | None:
    """
    The answer that a text gives, in a form that can be compared: lower case, single blanks, and no punctuation at its end.

    Args:
        text (`str`): A thought and an answer, or an answer alone. The answer is what follows the last `</think>`.

    Returns:
        `str` or `None`: `None` for a thought that does not end, or a text that ends with its thought.
    """
    thought, end, answer = text.rpartition(THOUGHT_END)
    if not end and THOUGHT_START in answer:
        return None
    return " ".join(answer.casefold().rstrip(_SURROUNDING).split()) or None


class ExactAnswer:
    """
    A reward function for TRL: 1 for a sample whose answer is that of its row, 0 for another one. Case, blanks and punctuation at the end do not
    count. The right answer is in the column `solution`, as for TRL's `accuracy_reward`. A row without one is not scored.

    Example:

    ```python
    >>> trainer = AlphaGRPOTrainer(..., reward_funcs=[DVReward("shapes"), ExactAnswer()])
    ```
    """

    text_only = True

    __name__ = "answer"
    """TRL takes the name of a reward function from its `__name__`."""

    def __call__(
        self,
        completions: Sequence[Any],
        *,
        solution: Sequence[Any],
        texts: Sequence[list[str]] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """
        Compute the reward of each completion, as TRL calls it. All sequences have one entry per completion.

        Args:
            completions (`Sequence`): As TRL passes them.
            solution (`Sequence`): The right answers, texts or numbers; `None` where there is nothing to answer.
            texts (`Sequence[list[str]]`, *optional*): The texts that each sample wrote. The last one has the answer.
        """
        written = written_texts(completions, texts)
        return [
            None if wanted is None else float(bool(own) and given_answer(own[-1]) == given_answer(str(wanted)))
            for own, wanted in zip(written, solution, strict=True)
        ]

    def validate_dataset(self, dataset: Iterable[Mapping[str, Any]]) -> None:
        """
        Check that a dataset has answers: at least one, and one for each row whose task paints nothing.

        Raises:
            `ValueError`: If it has not. The message names the row.
        """
        columns = getattr(dataset, "column_names", None)
        if columns:
            # Image columns stay undecoded.
            dataset = dataset.select_columns([name for name in ("task", "solution") if name in columns])
        num_answers = 0
        for index, row in enumerate(dataset):
            solution = row.get("solution")
            num_answers += solution is not None
            if solution is None and paints_image(row):
                continue
            if solution is None or given_answer(str(solution)) is None:
                raise ValueError(f"row {index}: 'solution' must be the answer to the question, but is {solution!r}")
        if not num_answers:
            raise ValueError("no row has an answer in its column 'solution', which the reward 'answer' compares with")
