# SPDX-License-Identifier: Apache-2.0

"""
Measure how the reward of a model of the shapes world depends on the number of evaluations of its network.

One table has evaluations with several ODE solvers and numbers of steps, the other has training rollouts with fewer steps and with
branches. Every row is paired with the first one of its table by prompt and noise. It is a script that `reproduce_tables.py` runs:

```bash
python recipes/reproduce_tables.py --only solvers rollouts
```
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alphagrpo_ext.files import write_text
from alphagrpo_ext.ranges import AtLeastTwo, check_ranges
from recipe_tools.recipe_arguments import RecipeParser


@dataclass
class MeasurementArguments:
    """Arguments of the measurement; the help text of a field describes it."""

    model_name_or_path: str = field(default="bagel-shapes", metadata={"help": "Model of the shapes world to measure."})
    num_prompts: AtLeastTwo = field(default=504, metadata={"help": "Number of held-out prompts of an evaluation."})
    num_groups: AtLeastTwo = field(default=120, metadata={"help": "Number of groups of training rollouts."})
    output_dir: str = field(default="runs/fewer_evaluations", metadata={"help": "Folder for fewer_evaluations.json."})

    def __post_init__(self) -> None:
        check_ranges(self)


def main(args: MeasurementArguments) -> None:
    # Here, so that `--help` does not import models and trainers.
    import torch

    from alphagrpo_ext.models.attention.choice import choose_attention
    from alphagrpo_ext.models.loading import load_model
    from alphagrpo_ext.rollout import TASKS, RolloutGenerator
    from recipe_tools.evaluation.costs import NUM_SEEDS, TABLE_HEADER, Meter, measure_rollouts, measure_solvers
    from reward_models.prompts.loading import load_prompts

    # Threads that wait for each other cost more than they save at this size.
    torch.set_num_threads(1)
    model, processor = load_model(args.model_name_or_path, dtype="float32")
    model.set_attn_implementation(choose_attention(model.family, model.device.type).name)
    meter = Meter(RolloutGenerator(model.eval(), processor, TASKS.get("reasoning_t2i")(think=True)))
    output = Path(args.output_dir) / "fewer_evaluations.json"
    evaluation_title = f"evaluation, {args.num_prompts} prompts x {NUM_SEEDS} seeds"
    rollouts_title = f"training rollouts, {args.num_groups} groups"
    tables: dict[str, list[dict[str, Any]]] = {}
    for title, measure, rows in (
        (evaluation_title, measure_solvers, load_prompts(None, "evaluation", args.num_prompts)),
        (rollouts_title, measure_rollouts, load_prompts(None, "train", args.num_groups)),
    ):
        print(f"{title}\n{TABLE_HEADER}")
        tables[title] = []
        for row in measure(meter, list(rows)):
            print(row, flush=True)
            tables[title].append(asdict(row))
            # After each row, so that a run that is stopped keeps what it measured.
            write_text(output, json.dumps(tables, indent=2) + "\n")
    print(f"\n{output}")


if __name__ == "__main__":
    (arguments,) = RecipeParser([MeasurementArguments], __doc__).parse_args_and_config()
    main(arguments)
