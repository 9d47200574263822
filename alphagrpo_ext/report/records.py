# SPDX-License-Identifier: Apache-2.0

"""What a report knows of trajectories and evaluations. All of it is text and numbers; images are data URLs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


# As evaluations have it: a smaller difference of rewards is none.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Answer:
    """
    A judge's answer to a question about an image.

    Args:
        question, tag (`str`): The question, and what it is about, e.g. `"Count"`.
        kind (`str`): `"semantic"` or `"quality"`.
        p_yes (`float` or `None`): P(yes) in [0, 1]; `None` if there is no answer.
    """

    question: str
    tag: str
    kind: str
    p_yes: float | None


@dataclass(frozen=True)
class Turn:
    """
    What the policy wrote, and then painted.

    Args:
        text (`str`): Thought or reflection; empty if there is none.
        image (`str`): Data URL of the image.
    """

    text: str
    image: str


@dataclass(frozen=True)
class TrajectoryRecord:
    """
    A trajectory with what it was worth.

    Args:
        turns (`list[Turn]`): What the policy did.
        given_image (`str`, *optional*): Data URL of the image that the policy was given to refine or edit.
        reward (`float`, *optional*): Weighted reward of the last image before rectification; `None` if there is none.
        rewards (`dict[str, float | None]`): Of each reward function, after rectification.
        advantage, image_advantage (`float`): Of text, and of images.
        given_reward (`float`, *optional*): Reward of the image that was to be refined.
        answers (`list[Answer]`): About the last image.
    """

    turns: list[Turn]
    given_image: str | None
    reward: float | None
    rewards: dict[str, float | None]
    advantage: float
    image_advantage: float
    given_reward: float | None
    answers: list[Answer] = field(default_factory=list)

    @property
    def got_worse(self) -> bool:
        """Whether the last image is worth less than the one that it was to improve, by more than 0.01."""
        return None not in (self.reward, self.given_reward) and self.reward < self.given_reward - TOLERANCE


@dataclass(frozen=True)
class TrajectoryGroup:
    """
    The trajectories of one prompt in one step.

    Args:
        step (`int`): Optimizer step that the group was sampled for, from 1.
        index (`int`): Place among the groups of that step.
        task, prompt (`str`): What was asked.
        trajectories (`list[TrajectoryRecord]`): By falling advantage of images.
        earlier_step (`int`, *optional*): Last step before that had the same prompt; `None` if there is none.
        earlier_reward (`float`, *optional*): Mean reward then.
    """

    step: int
    index: int
    task: str
    prompt: str
    trajectories: list[TrajectoryRecord]
    earlier_step: int | None = None
    earlier_reward: float | None = None

    @property
    def rewards(self) -> list[float]:
        """Rewards of the trajectories that have one."""
        return [t.reward for t in self.trajectories if t.reward is not None]

    @property
    def tellingness(self) -> float:
        """How much there is to see: spread of rewards, and the share of images that got worse. In [0, 2] for DVReward."""
        spread = max(self.rewards) - min(self.rewards) if self.rewards else 0.0
        return spread + sum(t.got_worse for t in self.trajectories) / max(len(self.trajectories), 1)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrajectoryGroup:
        trajectories = [
            TrajectoryRecord(
                **{
                    **entry,
                    "turns": [Turn(**turn) for turn in entry["turns"]],
                    "answers": [Answer(**answer) for answer in entry["answers"]],
                }
            )
            for entry in data["trajectories"]
        ]
        return cls(**{**data, "trajectories": trajectories})


@dataclass(frozen=True)
class Pair:
    """
    An evaluation prompt with its image by two policies, from the same noise.

    Args:
        prompt, category (`str`): The prompt, and the category it belongs to.
        before, after (`Turn`): What each policy did.
        reward_before, reward_after (`float`): What it was worth.
    """

    prompt: str
    category: str
    before: Turn
    after: Turn
    reward_before: float
    reward_after: float


@dataclass(frozen=True)
class Table:
    """
    Args:
        header (`list[str]`): Titles of the columns.
        rows (`list[list[str]]`): Cells as they are shown; the first one of a row names it.
    """

    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Comparison:
    """
    An evaluation before and after training.

    Args:
        table ([`Table`]): Its scores.
        pairs (`list[Pair]`): Some of its images.
    """

    table: Table
    pairs: list[Pair]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Comparison:
        pairs = [
            Pair(**{**entry, "before": Turn(**entry["before"]), "after": Turn(**entry["after"])})
            for entry in data["pairs"]
        ]
        return cls(Table(**data["table"]), pairs)
