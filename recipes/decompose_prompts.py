# SPDX-License-Identifier: Apache-2.0

"""
Decompose prompts into the yes/no questions that DVReward asks.

Without arguments it decomposes a hundred prompts of the shapes world by the rules of their grammar:

```bash
python recipes/decompose_prompts.py
```

With prompts of your own (a text file, JSON lines or a dataset) and a language model behind an OpenAI-compatible endpoint (`--help`
lists all options):

```bash
python recipes/decompose_prompts.py --input prompts.txt --output questions.jsonl \\
    --base_url http://localhost:8000/v1 --model NAME
```

The prompts of a public benchmark are read from the benchmark's own files:

```bash
python recipes/decompose_prompts.py --benchmark wise --input WISE/data_verified --output wise_questions.jsonl \\
    --base_url http://localhost:8000/v1 --model NAME
```

`--dry_run` prints the questions of three prompts and writes nothing. The output has one line per prompt. It grows in the order in
which answers come, and is put into the order of the input at the end. The same command continues a run that was stopped, and tries
the prompts again that failed, which are listed in `<output>.failed.jsonl`. Another decomposer or model is refused, by what
`<output>.decomposer.json` says of the first. The exit code is 0 if no prompt failed.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from alphagrpo_ext.files import atomic_path, read_json_lines
from alphagrpo_ext.printable import printable
from alphagrpo_ext.ranges import PositiveInt
from alphagrpo_ext.shapes.prompts import prompt_rows
from recipe_tools.input_errors import checking_input, input_errors_in_a_line
from recipe_tools.recipe_arguments import RecipeParser
from reward_models.decomposition.base import DECOMPOSERS, Decomposer, DecomposerArguments, failure_reason
from reward_models.decomposition.record_file import RecordFile
from reward_models.prompts.questions import PromptRecord


NUM_SHAPES_PROMPTS = 100
NUM_DRY_RUN_PROMPTS = 3
INTERRUPTED = 130


@dataclass
class DecompositionArguments(DecomposerArguments):
    """Arguments of the decomposition; for the rest see [`DecomposerArguments`]. The help text of a field describes it."""

    input: str | None = field(
        default=None,
        metadata={"help": "Prompts: a text file, JSON lines, or a dataset. Default: prompts of the shapes world."},
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Name of the column or field of prompts in `input`. Default: prompt or text."}
    )
    benchmark: str | None = field(
        default=None,
        metadata={
            "help": "Name of the benchmark whose own files `input` is, as for recipes/export_benchmark.py: 'geneval', 'dpg_bench', "
            "'tiif_bench', 'wise', 'gedit_bench', or a registered one."
        },
    )
    output: str = field(
        default="runs/decompose_prompts/questions.jsonl", metadata={"help": "File for the questions, as JSON lines."}
    )
    limit: PositiveInt | None = field(
        default=None, metadata={"help": "Number of prompts, from the start of the input."}
    )
    max_failures_in_a_row: PositiveInt = field(
        default=200, metadata={"help": "Number of failures without a success in between after which the run stops."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the records of three prompts and write nothing."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.benchmark and not self.input:
            raise ValueError(
                f"input is missing: name the file, folder or dataset with the prompts of '{self.benchmark}'"
            )
        if self.prompt_column is not None and (self.benchmark or not self.input):
            raise ValueError(
                f"prompt_column={self.prompt_column!r} names a column of `input`, which must be a table or JSON of your own"
            )
        if self.decomposer is None:
            self.decomposer = "openai" if self.input else "shapes"


@dataclass(frozen=True)
class Failure:
    """A prompt that could not be decomposed, with the kind of the failure and what happened."""

    prompt: str
    reason: str
    detail: str


class TooManyFailuresError(RuntimeError):
    """Raised after so many failures in a row that going on is pointless."""


class FailedFile:
    """
    The file of the prompts whose last try failed. It is replaced as a whole.

    Args:
        path (`Path`): The file. It does not exist if no prompt has failed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        rows = read_json_lines(path) if path.exists() else ()
        try:
            self.failures = {row["prompt"]: Failure(**row) for _, row in rows}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a list of failed prompts, so move it away ({error!r})") from error

    def write(self) -> None:
        if not self.failures:
            self.path.unlink(missing_ok=True)
            return
        lines = (json.dumps(vars(failure), ensure_ascii=False) for failure in self.failures.values())
        with atomic_path(self.path) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")


def load_input(args: DecompositionArguments) -> list[str]:
    """Read all prompts, each once."""
    from reward_models.benchmarks import BENCHMARKS
    from reward_models.prompts.loading import read_prompts

    if args.benchmark is not None:
        # The label names a model's images, of which there are none here.
        texts = BENCHMARKS.get(args.benchmark)("none").texts(args.input)
        return list(dict.fromkeys(texts))[: args.limit]
    if args.input is not None:
        return read_prompts(args.input, args.prompt_column)[: args.limit]
    rows = prompt_rows("train", args.limit or NUM_SHAPES_PROMPTS, seed=0)
    return list(dict.fromkeys(row["prompt"] for row in rows))


async def decompose_all(
    decomposer: Decomposer,
    prompts: Iterable[str],
    args: DecompositionArguments,
    keep: Callable[[PromptRecord], None],
    fail: Callable[[Failure], None],
) -> None:
    """
    Decompose prompts, `max_concurrency` at a time, and pass on each result when it is there.

    Raises:
        [`TooManyFailuresError`]: If `max_failures_in_a_row` is reached.
    """
    # All workers draw from one iterator, so that there is one task per worker and not per prompt.
    remaining = iter(prompts)
    num_failures_in_a_row = 0

    async def work() -> None:
        nonlocal num_failures_in_a_row
        for prompt in remaining:
            try:
                record = await decomposer.decompose(prompt)
            except Exception as error:
                num_failures_in_a_row += 1
                detail = getattr(error, "detail", None) or str(error) or type(error).__name__
                fail(Failure(prompt, failure_reason(error), detail))
                if num_failures_in_a_row >= args.max_failures_in_a_row:
                    raise TooManyFailuresError(
                        f"stopped after {num_failures_in_a_row} failures in a row (max_failures_in_a_row), "
                        f"the last of them: {failure_reason(error)}: {detail[:300]}"
                    ) from error
            else:
                num_failures_in_a_row = 0
                keep(record)

    workers = [asyncio.create_task(work()) for _ in range(args.max_concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await decomposer.aclose()


def failure_table(failures: Iterable[Failure]) -> str:
    """Format how often each reason occurred, the most frequent first, with an example."""
    failures = list(failures)
    examples = {failure.reason: failure for failure in reversed(failures)}
    lines = [f"{'failed':>7}  {'reason':<32}  example"]
    for reason, count in Counter(failure.reason for failure in failures).most_common():
        example = examples[reason]
        lines.append(
            f"{count:>7}  {reason:<32}  {example.prompt[:40]!r}: {printable(' '.join(example.detail.split()))[:160]}"
        )
    return "\n".join(lines)


def print_records(decomposer: Decomposer, prompts: list[str], args: DecompositionArguments) -> int:
    """Decompose a few prompts, print their records, and return the exit code."""
    failures: list[Failure] = []

    def show(record: PromptRecord) -> None:
        print(json.dumps(record.to_row(), ensure_ascii=False, indent=2))

    asyncio.run(decompose_all(decomposer, prompts[:NUM_DRY_RUN_PROMPTS], args, show, failures.append))
    if failures:
        print(failure_table(failures))
    return 1 if failures else 0


def extend(records: RecordFile, decomposer: Decomposer, prompts: list[str], args: DecompositionArguments) -> int:
    """Decompose the prompts that have no record yet, and return the exit code."""
    from reward_models.prompts.loading import FAILED_SUFFIX

    def claim() -> None:
        with checking_input():
            records.claim({"decomposer": args.decomposer, **decomposer.settings()})

    claim()
    failed = FailedFile(records.path.with_name(records.path.name + FAILED_SUFFIX))
    todo = [prompt for prompt in prompts if prompt not in records.prompts]
    num_before, failures = len(records.prompts), []
    message, exit_code = "", 0
    with tqdm(total=len(prompts), initial=len(prompts) - len(todo), desc="prompts", unit="prompt") as progress:

        def keep(record: PromptRecord) -> None:
            if len(records.prompts) == num_before:
                # By now it is known which model answers.
                claim()
            records.append(record)
            failed.failures.pop(record.prompt, None)
            progress.update()

        def fail(failure: Failure) -> None:
            failures.append(failure)
            failed.failures[failure.prompt] = failure
            progress.set_postfix(failed=len(failures))
            progress.update()

        try:
            asyncio.run(decompose_all(decomposer, todo, args, keep, fail))
        except KeyboardInterrupt:
            message, exit_code = "interrupted; the same command continues\n", INTERRUPTED
        except TooManyFailuresError as error:
            message, exit_code = f"{error}\n", 1
        finally:
            # A run that was killed may have recorded a prompt that an earlier one listed as failed.
            failed.failures = {p: failure for p, failure in failed.failures.items() if p not in records.prompts}
            failed.write()
    if failures:
        print(f"{failure_table(failures)}\nThese prompts are listed in {failed.path}.")
    num_added = len(records.prompts) - num_before
    print(
        f"{message}{num_added} records added to {args.output}, {num_before} were there, {len(failures)} prompts failed"
    )
    return exit_code or int(bool(failures))


def main(args: DecompositionArguments) -> int:
    """Decompose the prompts and return the exit code."""
    with checking_input():
        prompts = load_input(args)
        decomposer = DECOMPOSERS.get(args.decomposer).from_arguments(args)
    if args.dry_run:
        return print_records(decomposer, prompts, args)
    records = RecordFile(args.output)
    # Locked until the end, so that no other process opens the file before it is sorted.
    with records.locked():
        with records:
            exit_code = extend(records, decomposer, prompts, args)
        if exit_code != INTERRUPTED:
            records.sort(prompts)
    return exit_code


if __name__ == "__main__":
    with input_errors_in_a_line():
        with checking_input():
            (arguments,) = RecipeParser([DecompositionArguments], __doc__).parse_args_and_config()
        sys.exit(main(arguments))
