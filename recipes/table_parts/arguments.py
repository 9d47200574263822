# SPDX-License-Identifier: Apache-2.0

"""Arguments of `reproduce_tables.py`. They are read without models, so that `--help` is quick."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from alphagrpo_ext.ranges import AtLeastTwo, NonNegativeInt, PositiveInt, check_ranges


TABLE_NAMES = (
    "training",
    "categories",
    "objectives",
    "objectives_in_equal_time",
    "settings",
    "guidance",
    "solvers",
    "rollouts",
    "presets",
    "cheaper_training",
    "reflection",
    "reflection_settings",
    "refinement_after_painting",
    "refine_strength",
    "rounds",
    "editing",
    "frozen_rewards",
    "decomposed_or_holistic",
    "time_to_quality",
)
"""Names of the tables, in the order of recipes/README.md."""


@dataclass
class TablesArguments:
    """Arguments of the tables; the help text of a field describes it."""

    only: list[str] = field(
        default_factory=lambda: list(TABLE_NAMES), metadata={"help": f"Tables to make: {', '.join(TABLE_NAMES)}."}
    )
    list_tables: bool = field(
        default=False,
        metadata={
            "help": "Print the tables with their number of runs and an estimate of minutes, and run nothing. Also --list.",
            "aliases": ["--list"],
        },
    )
    seeds: list[NonNegativeInt] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "Seeds of training. A table of fewer seeds takes the first ones."},
    )
    num_parallel: PositiveInt | None = field(
        default=None,
        metadata={"help": "Number of runs at a time, each in one process with one thread. Default: one per core."},
    )
    model_name_or_path: str = field(
        default="bagel-shapes", metadata={"help": "Model that every run starts from, of the shapes world."}
    )
    max_steps: PositiveInt | None = field(
        default=None, metadata={"help": "Training steps of a run; those of its recipe by default."}
    )
    num_eval_prompts: AtLeastTwo = field(default=504, metadata={"help": "Held-out prompts of an evaluation."})
    output_dir: str = field(
        default="runs/tables",
        metadata={"help": "Folder for the tables, the runs, and a log of each run."},
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if unknown := [name for name in self.only if name not in TABLE_NAMES]:
            raise ValueError(f"only: unknown {', '.join(unknown)}; available: {', '.join(TABLE_NAMES)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, at least one, but are {self.seeds}")
        if self.num_parallel is None:
            self.num_parallel = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
