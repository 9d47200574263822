# SPDX-License-Identifier: Apache-2.0

"""The data of a report: trajectories and evaluations as text, numbers, and images as data URLs."""

from __future__ import annotations

from dataclasses import dataclass, field


REWARD_TOLERANCE = 0.01
"""Two rewards that differ by at most this count as equal."""


@dataclass(frozen=True)
class Answer:
    """
    The answer of a judge to a question about an image.

    Args:
        question, tag (`str`): The question and its tag, e.g. `"Count"`.
        kind (`str`): `"semantic"` or `"quality"`.
        p_yes (`float` or `None`): P(yes) in [0, 1]; `None` if there is no answer.
    """

    question: str
    tag: str
    kind: str
    p_yes: float | None


@dataclass(frozen=True)
class ReportTurn:
    """
    One turn of the policy: a text, then an image.

    Args:
        text (`str`): Thought or reflection; empty if there is none.
        image (`str`): Data URL of the image. Of a turn that ended without painting, it is the one that the policy looked at.
    """

    text: str
    image: str


@dataclass(frozen=True)
class TrajectoryRecord:
    """
    A trajectory with its rewards and advantages.

    Args:
        turns (`list[ReportTurn]`): What the policy wrote and painted.
        given_image (`str`, *optional*): Data URL of the image that the policy refines or edits.
        reward (`float`, *optional*): Weighted reward of the last image before rectification; `None` if there is none.
        rewards (`dict[str, float | None]`): Reward of each reward function, after rectification.
        advantage, image_advantage (`float`): Advantage of the text, and of the images.
        given_reward (`float`, *optional*): Reward of the image that the policy refines.
        answers (`list[Answer]`): Answers about the last image.
    """

    turns: list[ReportTurn]
    given_image: str | None
    reward: float | None
    rewards: dict[str, float | None]
    advantage: float | None
    image_advantage: float | None
    given_reward: float | None
    answers: list[Answer] = field(default_factory=list)

    @property
    def got_worse(self) -> bool:
        """Whether the reward of the last image is lower than the reward of the image that it refines."""
        return None not in (self.reward, self.given_reward) and self.reward < self.given_reward - REWARD_TOLERANCE


@dataclass(frozen=True)
class TrajectoryGroup:
    """
    The trajectories of one prompt in one step.

    Args:
        step (`int`): Optimizer step that the group was sampled for, from 1.
        index (`int`): Index among the groups of that step.
        task, prompt (`str`): The task, and the prompt.
        trajectories (`list[TrajectoryRecord]`): The trajectories, in descending order of image advantage.
        earlier_step (`int`, *optional*): Last earlier step with the same prompt; `None` if there is none.
        earlier_reward (`float`, *optional*): Mean reward of the prompt at that step.
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
        return [trajectory.reward for trajectory in self.trajectories if trajectory.reward is not None]

    @property
    def informativeness(self) -> float:
        """Range of the rewards plus the share of images that got worse. In [0, 2] for DVReward."""
        reward_range = max(self.rewards) - min(self.rewards) if self.rewards else 0.0
        return reward_range + sum(t.got_worse for t in self.trajectories) / max(len(self.trajectories), 1)


@dataclass(frozen=True)
class ImagePair:
    """
    The images of two policies for the same evaluation prompt and the same noise.

    Args:
        prompt, category (`str`): The prompt and its category.
        before, after (`ReportTurn`): The turn of each policy.
        reward_before, reward_after (`float`): The reward of each image.
    """

    prompt: str
    category: str
    before: ReportTurn
    after: ReportTurn
    reward_before: float
    reward_after: float


@dataclass(frozen=True)
class ScoreTable:
    """
    A table of the page.

    Args:
        header (`list[str]`): Titles of the columns.
        rows (`list[list[str]]`): Cells as they are shown. The first cell of a row is its name.
        note (`str`, *optional*, defaults to `""`): What the columns mean, shown under the table.
    """

    header: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """
    An evaluation before and after training.

    Args:
        table ([`ScoreTable`]): Scores of both evaluations.
        pairs (`list[ImagePair]`): Some of the images.
    """

    table: ScoreTable
    pairs: list[ImagePair]
