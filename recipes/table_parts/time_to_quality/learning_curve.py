# SPDX-License-Identifier: Apache-2.0

"""
Train a model of the shapes world, and measure on held-out prompts how good it is after how many seconds of training.

It is a script that `reproduce_tables.py` runs, with the arguments of a training recipe:

```bash
python recipes/reproduce_tables.py --only time_to_quality
```

Seconds are those of the CPU that this process spends in training steps: rollouts, rewards and updates, without evaluations. After every
evaluation there is a checkpoint, from which a run that was cut off goes on with `--resume_from_checkpoint last`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy
from trl import ModelConfig

from alphagrpo_ext.files import write_text
from alphagrpo_ext.ranges import PositiveInt, check_ranges
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from recipe_tools.recipe_arguments import RecipeParser
from reward_models.arguments import PromptArguments
from table_parts.time_to_quality.curve import CURVE_NAME, CurvePoint, read_curve


if TYPE_CHECKING:
    from alphagrpo_ext.models.contract import UnifiedModel
    from recipe_tools.training import TrainingRun
    from reward_models.evaluation.samples import Evaluation


@dataclass
class CurveArguments(PromptArguments):
    """
    Arguments of the measurement; for the rest see [`~reward_models.arguments.PromptArguments`].

    Args:
        num_points (`int`, *optional*, defaults to `8`): Evaluations, evenly spaced, beside the one before training.
    """

    num_points: PositiveInt = field(
        default=8, metadata={"help": "Evaluations, evenly spaced, beside the one before training."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self)


class LearningCurve(TrainerCallback):
    """
    Evaluates the policy every few steps, and writes all points after each evaluation.

    Args:
        path (`Path`): JSON file of the points.
        interval (`int`): Steps between two evaluations.
        evaluate (`Callable[[], tuple[float, float]]`): Returns strict pass rate and mean reward of the policy.
    """

    def __init__(self, path: Path, interval: int, evaluate: Callable[[], tuple[float, float]]) -> None:
        self.path = path
        self.interval = interval
        self.evaluate = evaluate
        self.seconds = 0.0
        self.points: list[CurvePoint] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._add_point(0)
            return
        # A step after the checkpoint is done again, so it does not count twice.
        self.points = [point for point in read_curve(self.path.parent) if point.step <= state.global_step]
        self.seconds = self.points[-1].seconds

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.process_time() - self.start
        if state.global_step % self.interval == 0:
            self._add_point(state.global_step)

    def _add_point(self, step: int) -> None:
        self.points.append(CurvePoint(step, self.seconds, *self.evaluate()))
        write_text(self.path, json.dumps([asdict(point) for point in self.points], indent=2) + "\n")


def evaluate_final_images(run: TrainingRun, policy: UnifiedModel) -> Evaluation:
    """Score what a policy paints; in a task that refines its own images, what it paints in the end."""
    from alphagrpo_ext.rollout.task import PAINTING_TASK, TASKS
    from recipe_tools import training

    args, initial = run.training_args, None
    if TASKS.get(args.task).paints_initial_image:
        initial = training.evaluate_policy(run, policy, PAINTING_TASK, args.stage1_think, "painting")
    return training.evaluate_policy(run, policy, args.task, args.think, args.task, initial)


def main(script_args: CurveArguments, training_args: AlphaGRPOConfig, model_args: ModelConfig) -> None:
    # Here, so that `--help` does not import models and trainers.
    from recipe_tools import training

    interval = max(1, training_args.max_steps // script_args.num_points)
    training_args.save_strategy = SaveStrategy.STEPS
    training_args.save_steps, training_args.save_total_limit = interval, 1
    run = training.prepare_run(script_args, training_args, model_args)
    trainer = training.make_trainer(run, training.load_rewards(run))

    def evaluate() -> tuple[float, float]:
        with trainer.gathered_policy() as policy:
            summary = evaluate_final_images(run, policy).summary()
        return summary["strict_pass_rate"], summary["reward"]

    trainer.add_callback(LearningCurve(run.output_dir / CURVE_NAME, interval, evaluate))
    trainer.train(resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint))


if __name__ == "__main__":
    main(*RecipeParser([CurveArguments, AlphaGRPOConfig, ModelConfig], __doc__).parse_args_and_config())
