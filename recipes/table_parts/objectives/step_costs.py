# SPDX-License-Identifier: Apache-2.0

"""
Measure the CPU seconds of a training step of `reasoning_t2i.py` for every objective of the tables, in turn.

It is a script that `reproduce_tables.py` runs:

```bash
python recipes/reproduce_tables.py --only objectives
```
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from trl import ModelConfig

from alphagrpo_ext.files import write_text
from alphagrpo_ext.ranges import PositiveInt, check_ranges
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from recipe_tools.recipe_arguments import RecipeParser
from reward_models.arguments import PromptArguments
from table_parts.objectives.table import OTHER_OBJECTIVES
from table_parts.plan import CONFIGS


if TYPE_CHECKING:
    from alphagrpo_ext.trainer import AlphaGRPOTrainer


@dataclass
class CostArguments(PromptArguments):
    """
    Arguments of the measurement; for the rest see [`~reward_models.arguments.PromptArguments`].

    Args:
        repetitions (`int`, *optional*, defaults to `3`): Trainings of each objective, in turn.
    """

    repetitions: PositiveInt = field(default=3, metadata={"help": "Trainings of each objective, in turn."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self)


def main(words: Sequence[str]) -> None:
    # Here, so that `--help` does not import models and trainers.
    from benchmark_parts.text_overhead import StepTimes

    parser = RecipeParser(
        [CostArguments, AlphaGRPOConfig, ModelConfig], __doc__, CONFIGS / "reasoning_t2i_shapes.yaml"
    )
    arms = {"default": (), **OTHER_OBJECTIVES}
    script_args, training_args, _ = parser.parse_args_and_config([*words])
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repetition in range(script_args.repetitions):
        for name, added in arms.items():
            trainer = _trainer(*parser.parse_args_and_config([*words, "--seed", str(repetition), *added]))
            steps = StepTimes(time.process_time)
            trainer.add_callback(steps)
            trainer.train()
            # The first step has more to do, such as the optimizer's state.
            seconds[name].append(median(steps.seconds[1:]))
            print(f"{name}: {seconds[name][-1]:.2f} CPU seconds per step", flush=True)
    write_text(Path(training_args.output_dir) / "step_costs.json", json.dumps(seconds, indent=2) + "\n")


def _trainer(script_args: CostArguments, training_args: AlphaGRPOConfig, model_args: ModelConfig) -> AlphaGRPOTrainer:
    from recipe_tools import training

    run = training.prepare_run(script_args, training_args, model_args)
    return training.make_trainer(run, training.load_rewards(run))


if __name__ == "__main__":
    main(sys.argv[1:])
