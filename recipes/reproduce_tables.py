# SPDX-License-Identifier: Apache-2.0

"""
Make the measured tables of README.md and recipes/README.md again: those of trainings and evaluations of `bagel-shapes`.

```bash
python recipes/reproduce_tables.py --list
python recipes/reproduce_tables.py
```

One table, or the same tables of another model of the shapes world:

```bash
python recipes/reproduce_tables.py --only training categories
python recipes/reproduce_tables.py --only training categories --model_name_or_path runs/cosmos3-shapes --output_dir runs/tables-cosmos3
```

Each run is a command of another recipe, and tables share runs. `runs/tables/` gets `NAME.md` per table, `tables.md` with all that are
made, and a log per run. The same command goes on where it was stopped: what is finished is not repeated, and a training run that was cut
off continues from its checkpoint. A run that fails is named with its log, the others go on, and the status is 1. No README is changed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from recipe_tools.input_errors import checking_input, input_errors_in_a_line
from recipe_tools.recipe_arguments import RecipeParser
from table_parts.arguments import TABLE_NAMES, TablesArguments


if TYPE_CHECKING:
    from table_parts.plan import Plan, Run
    from table_parts.tables import MeasuredTable


INTERRUPTED_STATUS = 130


def tables_overview(plan: Plan, tables: dict[str, MeasuredTable]) -> str:
    """The number of runs and an estimate of their time for each table, and for all, where shared runs count once."""
    from table_parts.plan import with_needs

    num_parallel = plan.args.num_parallel
    lines = [f"{'table':<24}{'runs':>6}{'left':>6}{'minutes left':>14}"]
    groups = {name: with_needs(table.runs) for name, table in tables.items()}
    groups["all, shared runs once"] = with_needs(run for table in tables.values() for run in table.runs)
    for name, runs in groups.items():
        left = [run for run in runs if not run.finished]
        lines.append(f"{name:<24}{len(runs):>6}{len(left):>6}{sum(run.minutes for run in left) / num_parallel:>14.0f}")
    steps = "" if plan.args.max_steps is None else ", estimated for the recipes' own steps"
    return "\n".join([*lines, f"{num_parallel} at a time{steps}"])


def check_made_with(plan: Plan) -> None:
    """
    Keep runs of other settings, or of a model that was replaced, from being taken for runs of this command.

    Raises:
        `ValueError`: If the output folder has such runs.
    """
    from alphagrpo_ext.files import write_text
    from alphagrpo_ext.models.fingerprint import checkpoint_fingerprint

    names = ("model_name_or_path", "max_steps", "num_eval_prompts")
    made_with = {name: getattr(plan.args, name) for name in names}
    made_with["files of the model"] = list(checkpoint_fingerprint(plan.args.model_name_or_path))
    path = plan.folder / "made_with.json"
    if not path.is_file():
        write_text(path, json.dumps(made_with, indent=2) + "\n")
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    for name, value in made_with.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{plan.folder} holds runs with {name}={saved.get(name)}, and this command has {value}: name another output_dir"
            )


def save_pages(folder: Path, tables: dict[str, MeasuredTable]) -> None:
    """Write the page of each table, and `tables.md` of all pages that the folder has."""
    from alphagrpo_ext.files import write_text

    for name, table in tables.items():
        write_text(folder / f"{name}.md", table.to_markdown())
        if table.draw is not None:
            table.draw(folder / f"{name}.png")
    pages = [folder / f"{name}.md" for name in TABLE_NAMES]
    texts = [page.read_text(encoding="utf-8") for page in pages if page.is_file()]
    write_text(folder / "tables.md", "\n".join(texts))


def run_tables(plan: Plan, runs: list[Run], tables: dict[str, MeasuredTable]) -> int:
    """Run what is missing, write the tables, and return the exit status."""
    from alphagrpo_ext.files import FolderLock
    from table_parts.execution import RunQueue, interrupted_by_termination

    lock = FolderLock(plan.folder)
    lock.acquire()
    try:
        with checking_input():
            check_made_with(plan)
        try:
            with interrupted_by_termination():
                failures = RunQueue(plan.folder / "logs", plan.args.num_parallel).run_all(runs)
        finally:
            # What is finished is on the pages of a command that was stopped, too.
            save_pages(plan.folder, tables)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.")
        return INTERRUPTED_STATUS
    finally:
        lock.release()
    print((plan.folder / "tables.md").read_text(encoding="utf-8"))
    print("\n".join(f"{name} {what}" for name, what in failures.items()) or "all runs are finished")
    print(f"{plan.folder / 'tables.md'}")
    return 1 if failures else 0


def main(args: TablesArguments) -> int:
    # Here, so that `--help` does not import models.
    from table_parts.plan import Plan, with_needs
    from table_parts.registry import TABLES

    plan = Plan(args)
    tables = {name: TABLES[name](plan) for name in TABLE_NAMES if name in args.only}
    if args.list_tables:
        print(tables_overview(plan, tables))
        return 0
    return run_tables(plan, with_needs(run for table in tables.values() for run in table.runs), tables)


if __name__ == "__main__":
    with input_errors_in_a_line():
        with checking_input():
            (arguments,) = RecipeParser([TablesArguments], __doc__).parse_args_and_config()
        sys.exit(main(arguments))
