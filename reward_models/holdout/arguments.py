# SPDX-License-Identifier: Apache-2.0

"""Arguments of a reward that is logged and not trained on."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from reward_models.dvreward import DVReward
from reward_models.judges import JUDGES
from reward_models.judges.arguments import JudgeArguments


if TYPE_CHECKING:
    from reward_models.holdout.callback import HoldoutCallback


@dataclass
class HoldoutArguments:
    """
    Who judges images beside the judge that is trained on. What is left out is as for that one; see [`JudgeArguments`].

    Args:
        holdout_judge (`str`, *optional*):
            A judge of `--judge`, better one of another kind. `None` for no hold-out reward.
        holdout_judge_model, holdout_judge_base_url (`str`, *optional*):
            Its model, and its endpoint.
        holdout_judge_max_concurrency (`int`, *optional*, defaults to `64`):
            Questions that are with its endpoint at once.
        holdout_judge_timeout (`float`, *optional*, defaults to `60.0`):
            Seconds for one try of a question.
        holdout_judge_max_retries (`int`, *optional*, defaults to `8`):
            Further tries of a question.
        holdout_judge_binary (`bool`, *optional*, defaults to `False`):
            Whether a yes or no counts as it is, for endpoints without log-probabilities.
        holdout_judge_image_first (`bool`, *optional*, defaults to `False`):
            Whether one question about an image goes ahead of the others, to fill the server's prefix cache.
        holdout_judge_extra_body (`dict`, *optional*):
            Further fields of a request to the endpoint, as JSON.
        holdout_judge_batch_size (`int`, *optional*, defaults to `32`):
            Questions that a local judge answers at once.
        holdout_window (`int`, *optional*, defaults to `20`):
            Logs that the two rewards are compared over; see [`diverges`].
    """

    holdout_judge: str | None = field(
        default=None, metadata={"help": "Judge of a reward that is logged and not trained on, e.g. 'policy'."}
    )
    holdout_judge_model: str | None = field(default=None, metadata={"help": "Model of the hold-out judge."})
    holdout_judge_base_url: str | None = field(default=None, metadata={"help": "Endpoint of the hold-out judge."})
    holdout_judge_max_concurrency: int = field(
        default=64, metadata={"help": "Questions that are with the hold-out judge's endpoint at once."}
    )
    holdout_judge_timeout: float = field(default=60.0, metadata={"help": "Seconds for one try of a question."})
    holdout_judge_max_retries: int = field(default=8, metadata={"help": "Further tries of a question."})
    holdout_judge_binary: bool = field(
        default=False, metadata={"help": "Take yes or no of the hold-out judge as they are."}
    )
    holdout_judge_image_first: bool = field(
        default=False, metadata={"help": "Let one question about an image go ahead of the others."}
    )
    holdout_judge_extra_body: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further fields of a request to the hold-out judge's endpoint, as JSON."}
    )
    holdout_judge_batch_size: int = field(
        default=32, metadata={"help": "Questions that a local hold-out judge answers at once."}
    )
    holdout_window: int = field(
        default=20, metadata={"help": "Logs over which training and hold-out reward are compared, at least 4."}
    )

    def __post_init__(self) -> None:
        if self.holdout_window < 4:
            raise ValueError(f"holdout_window must be at least 4, but is {self.holdout_window}")
        if self.holdout_judge is not None:
            self.holdout_judge_extra_body = self._judge_arguments().judge_extra_body

    def make_holdout_callbacks(self, aggregation: str = "geometric", policy: Any = None) -> list[HoldoutCallback]:
        """
        The callback that scores and warns; none without a `holdout_judge`.

        Args:
            aggregation (`str`, *optional*, defaults to `"geometric"`): How answers become a reward.
            policy (`tuple[UnifiedModel, ProcessorMixin]`, *optional*): The model that is trained and its processor.

        Raises:
            `ValueError`: If there is no such judge, or it lacks an argument.
        """
        if self.holdout_judge is None:
            return []
        # The reward server takes arguments from here, too, and needs no trainer.
        from reward_models.holdout.callback import HoldoutCallback

        judge = JUDGES.get(self.holdout_judge).from_arguments(self._judge_arguments(), policy)
        reward = DVReward(judge, aggregation=aggregation, name="holdout")
        return [HoldoutCallback(reward, self.holdout_window)]

    def _judge_arguments(self) -> JudgeArguments:
        return JudgeArguments(**{f.name: getattr(self, f"holdout_{f.name}") for f in fields(JudgeArguments)})
