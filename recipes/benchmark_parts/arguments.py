# SPDX-License-Identifier: Apache-2.0

"""Arguments of `benchmark.py`. They are read without models, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from alphagrpo_ext.ranges import PositiveInt, check_ranges
from benchmark_parts.sizes import SIZES, Size


PRECISIONS = ("float32", "bfloat16")
DEFAULT_PARTS = (
    "structures",
    "utilization",
    "scaling",
    "text_overhead",
    "breakdown",
    "memory",
    "adapter",
    "presets",
    "attention",
)
PARTS = (*DEFAULT_PARTS, "whole_step")
"""All parts; those that are not measured by default take longer than all others together."""


@dataclass
class BenchmarkArguments:
    """Arguments of the benchmark; the help text of a field describes it."""

    parts: list[str] = field(
        default_factory=lambda: list(DEFAULT_PARTS),
        metadata={
            "help": f"Parts to measure: {', '.join(PARTS)}. By default all but whole_step, which takes longest."
        },
    )
    sizes: list[str] = field(
        default_factory=lambda: ["bagel-shapes"], metadata={"help": f"Models to measure: {', '.join(SIZES)}."}
    )
    precision: str = field(default="float32", metadata={"help": "'float32', or 'bfloat16' by autocast."})
    repetitions: PositiveInt = field(default=5, metadata={"help": "Repetitions of everything that is timed."})
    num_trajectories: PositiveInt | None = field(
        default=None, metadata={"help": "Trajectories per micro-batch. Default: the number of the size."}
    )
    output_dir: str = field(default="runs/benchmark", metadata={"help": "Folder for benchmark.json and plots."})

    def __post_init__(self) -> None:
        for name, values, known in (
            ("parts", self.parts, PARTS),
            ("sizes", self.sizes, SIZES),
            ("precision", [self.precision], PRECISIONS),
        ):
            if unknown := [value for value in values if value not in known]:
                raise ValueError(f"{name}: unknown {', '.join(unknown)}; available: {', '.join(known)}")
        check_ranges(self)

    def size(self, name: str) -> Size:
        """The size of this name, with the number of trajectories of the arguments."""
        size = SIZES[name]
        return size if self.num_trajectories is None else replace(size, num_trajectories=self.num_trajectories)
