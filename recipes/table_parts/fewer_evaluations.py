# SPDX-License-Identifier: Apache-2.0

"""
Measure how the reward of a model of the shapes world depends on the number of evaluations of its network.

There are three tables: `solvers` has evaluations with several ODE solvers and numbers of steps, `rollouts` has training rollouts with
fewer steps and with branches, and `presets` has those of both tasks under every preset, with and without guidance. Rows are paired by
prompt and noise with the first one of their table or, for presets, of their setting. It is a script that `reproduce_tables.py` runs, once
for each table:

```bash
python recipes/reproduce_tables.py --only solvers rollouts presets
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


COST_TABLES = ("solvers", "rollouts", "presets")
"""Names of the tables."""
COSTS_NAME = "costs.json"
"""File of the rows of a table."""


@dataclass
class MeasurementArguments:
    """Arguments of the measurement; the help text of a field describes it."""

    table: str = field(default="solvers", metadata={"help": f"Table to measure: {', '.join(COST_TABLES)}."})
    model_name_or_path: str = field(default="bagel-shapes", metadata={"help": "Model of the shapes world to measure."})
    num_prompts: AtLeastTwo = field(
        default=504, metadata={"help": "Number of held-out prompts of an evaluation, for solvers."}
    )
    num_groups: AtLeastTwo = field(
        default=120, metadata={"help": "Number of groups of training rollouts, for rollouts and presets."}
    )
    output_dir: str = field(default="runs/fewer_evaluations", metadata={"help": f"Folder for {COSTS_NAME}."})

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.table not in COST_TABLES:
            raise ValueError(f"table: unknown {self.table}; available: {', '.join(COST_TABLES)}")


def main(args: MeasurementArguments) -> None:
    # Here, so that `--help` does not import models and trainers.
    import torch

    from alphagrpo_ext.models.attention.choice import choose_attention
    from alphagrpo_ext.models.loading import load_model
    from recipe_tools.evaluation.costs import (
        TABLE_HEADER,
        Meter,
        measure_preset_rewards,
        measure_rollouts,
        measure_solvers,
    )
    from reward_models.prompts.loading import load_prompts

    # Threads that wait for each other cost more than they save at this size.
    torch.set_num_threads(1)
    model, processor = load_model(args.model_name_or_path, dtype="float32")
    model.set_attn_implementation(choose_attention(model.family, model.device.type).name)
    meter = Meter(model.eval(), processor)
    if args.table == "solvers":
        measured = measure_solvers(meter, list(load_prompts(None, "evaluation", args.num_prompts)))
    else:
        measure = measure_preset_rewards if args.table == "presets" else measure_rollouts
        measured = measure(meter, list(load_prompts(None, "train", args.num_groups)))
    output = Path(args.output_dir) / COSTS_NAME
    rows: list[dict[str, Any]] = []
    print(TABLE_HEADER)
    for row in measured:
        print(row, flush=True)
        rows.append(asdict(row))
        # After each row, so that a run that is stopped keeps what it measured.
        write_text(output, json.dumps(rows, indent=2) + "\n")
    print(f"\n{output}")


if __name__ == "__main__":
    (arguments,) = RecipeParser([MeasurementArguments], __doc__).parse_args_and_config()
    main(arguments)
