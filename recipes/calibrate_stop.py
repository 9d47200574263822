# SPDX-License-Identifier: Apache-2.0

"""
Calibrate when a policy keeps its image instead of repainting it: a threshold on the probability of its own verdict.

```bash
python recipes/calibrate_stop.py --model_name_or_path runs/self_reflection_shapes
```

The policy paints training prompts, reflects on every image, and repaints it. The threshold is the one with which most images pass
strictly, if those above it are kept. It is written into the model's `config.json`, where `generate.py`, `evaluate.py` and the
pipeline find it with `--allow_stop`; none of them asks a judge when to stop.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

from alphagrpo_ext.ranges import PositiveInt
from alphagrpo_ext.rollout.arguments import SamplingArguments
from recipe_tools.input_errors import checking_input, input_errors_in_a_line
from recipe_tools.recipe_arguments import RecipeParser
from reward_models.arguments import RewardArguments


@dataclass
class CalibrationArguments(RewardArguments, SamplingArguments):
    """Arguments of the calibration; for the rest see [`RewardArguments`] and [`SamplingArguments`]."""

    model_name_or_path: str = field(
        default="bagel-shapes", metadata={"help": "The policy: a name, a folder, or an id on the Hub."}
    )
    train_file: str | None = field(
        default=None,
        metadata={"help": "Training prompts with questions, as for training. Default: those of the shapes world."},
    )
    num_prompts: PositiveInt = field(default=252, metadata={"help": "Number of prompts."})
    num_seeds: PositiveInt = field(default=2, metadata={"help": "Images per prompt."})
    image_size: PositiveInt = field(default=24, metadata={"help": "Height and width of images, in pixels."})
    batch_size: PositiveInt = field(default=128, metadata={"help": "Samples per batch."})

    def __post_init__(self) -> None:
        RewardArguments.__post_init__(self)
        SamplingArguments.__post_init__(self)


def main(args: CalibrationArguments) -> None:
    # Here, so that `--help` does not import models.
    from alphagrpo_ext.rollout.task import PAINTING_TASK, REFLECTION_TASK
    from recipe_tools.processes import limit_threads, load_policy
    from recipe_tools.stop_calibration import calibrate, save_threshold
    from reward_models.prompts.loading import load_prompts

    limit_threads()
    rows = list(load_prompts(args.train_file, "train", args.num_prompts))
    configs = {name: args.rollout(args.image_size, args.image_size, name) for name in (PAINTING_TASK, REFLECTION_TASK)}
    policy = functools.cache(functools.partial(load_policy, args.model_name_or_path, args.dtype))
    sizes = [config.size for config in configs.values()]
    reward = args.make_checked_reward({f"train_file {args.train_file}": rows}, sizes, policy)
    model, processor = policy()
    result = calibrate(model, processor, rows, configs, reward, range(args.num_seeds), args.batch_size)
    print(result)
    folder = Path(args.model_name_or_path)
    if (folder / "config.json").is_file():
        save_threshold(folder, model, result.threshold)
        print(f"written into {folder / 'config.json'}; --allow_stop uses it")
    else:
        print(f"use it with --allow_stop --stop_threshold {result.threshold:.4f}")


if __name__ == "__main__":
    with input_errors_in_a_line():
        with checking_input():
            (arguments,) = RecipeParser([CalibrationArguments], __doc__).parse_args_and_config()
        main(arguments)
