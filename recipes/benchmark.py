# SPDX-License-Identifier: Apache-2.0

"""
Measure what a training step costs: compared with other ways to compute it, with the peak of the machine, and part by part.

```bash
OMP_NUM_THREADS=1 python recipes/benchmark.py
```

measures the packaged `bagel-shapes` in a few minutes. A random model with 100 million parameters takes longer:

```bash
OMP_NUM_THREADS=1 python recipes/benchmark.py --sizes bagel-shapes 100m --precision bfloat16 --repetitions 3
```

`--sizes cosmos3-shapes` measures the tiny Cosmos3 with random weights. Of the other ways to compute a step, those that are written for
BAGEL's parts measure its sizes alone.

`--parts whole_step` compares whole steps with the released code's algorithm; it is not among the parts that run by default.

All parts run in one process, except that `memory` and `whole_step` start one for every peak. Functions that are compared run in turn, and
ratios are taken within a repetition, so that they also hold on a machine that is busy with other work. Tables are printed.
`benchmark.json`, after each row of `whole_step` and each of the other tables, and, with `pip install "alphagrpo-ext[report]"`, plots are
written to `--output_dir`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from alphagrpo_ext.files import write_text
from benchmark_parts.arguments import BenchmarkArguments
from recipe_tools.input_errors import checking_input, input_errors_in_a_line
from recipe_tools.recipe_arguments import RecipeParser


if TYPE_CHECKING:
    from benchmark_parts.tables import ResultTable


def save_tables(tables: list[ResultTable], args: BenchmarkArguments, path: Path) -> None:
    """Write all tables, and the machine that they were measured on."""
    import torch

    result = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "arguments": asdict(args),
        "tables": [table.to_json() for table in tables],
    }
    write_text(path, json.dumps(result, indent=2) + "\n")


def measure_parts(args: BenchmarkArguments) -> list[ResultTable]:
    """Measure all parts for all sizes, and save and print their tables."""
    from benchmark_parts.measurements import MEASUREMENTS

    output_dir = Path(args.output_dir)
    tables: dict[str, ResultTable] = {}
    for name in args.sizes:
        for part in args.parts:
            for table in MEASUREMENTS[part](name, args):
                tables[table.title] = table
                # Now, so that a benchmark that is stopped keeps what it measured.
                save_tables(list(tables.values()), args, output_dir / "benchmark.json")
            print(table, flush=True)
    pictures = [table.save_picture(output_dir) for table in tables.values()]
    print(f"benchmark.json{' and plots' if any(pictures) else ''}: {output_dir}")
    return list(tables.values())


def main(args: BenchmarkArguments) -> list[ResultTable]:
    # Here, so that `--help` does not import models and trainers.
    from alphagrpo_ext.trainer.resume.sole_writer import sole_writer
    from benchmark_parts.timing import keep_freed_memory

    keep_freed_memory()
    with sole_writer(args.output_dir):
        return measure_parts(args)


if __name__ == "__main__":
    with input_errors_in_a_line():
        with checking_input():
            (arguments,) = RecipeParser([BenchmarkArguments], __doc__).parse_args_and_config()
        main(arguments)
