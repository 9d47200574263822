# SPDX-License-Identifier: Apache-2.0

"""
Paint the prompts of a public benchmark into the folders that its scorer reads, and score the images by yes/no questions.

```bash
python recipes/export_benchmark.py --benchmark geneval --prompts geneval/prompts/evaluation_metadata.jsonl \\
    --model_name_or_path ByteDance-Seed/BAGEL-7B-MoT --dtype bfloat16 --height 1024 --width 1024 \\
    --num_timesteps 50 --timestep_shift 3 --cfg_text_scale 4 --max_new_tokens 512 --output_dir runs/geneval
```

Benchmarks are `geneval`, `dpg_bench`, `tiif_bench`, `wise` and `gedit_bench`. The files in
`reward_models/benchmarks/` describe what each reads and writes. `<output_dir>/images` is the folder for the benchmark's scorer.

With a judge, images are also scored by yes/no questions, which come from the benchmark's metadata or from a file that
`recipes/decompose_prompts.py` made of its prompts:

```bash
python recipes/export_benchmark.py --benchmark wise --prompts WISE/data_verified --questions wise_questions.jsonl \\
    --judge openai --judge_base_url http://localhost:8000/v1 --judge_model NAME --output_dir runs/wise
```

The same command continues a run that was stopped: no image is painted again, and no question is asked twice. With
`accelerate launch`, several processes share the work.

All images to edit are read before anything is painted. Rows that cannot be read are named, and `--skip_broken_rows` leaves them out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from recipe_tools.benchmark_export.arguments import ExportArguments
from recipe_tools.input_errors import checking_input, input_errors_in_a_line
from recipe_tools.recipe_arguments import RecipeParser


if TYPE_CHECKING:
    from accelerate import PartialState

    from reward_models.benchmarks import Benchmark, BenchmarkPrompt
    from reward_models.dvreward import DVReward
    from reward_models.prompts.questions import PromptRecord


MAX_LISTED_ROWS = 20


def prompts_with_questions(
    prompts: Iterable[BenchmarkPrompt], args: ExportArguments
) -> list[tuple[BenchmarkPrompt, PromptRecord]]:
    """The prompts that have questions, without the originals of edited images, which the judge does not see."""
    from reward_models.prompts.questions import load_records

    questions = {str(record.prompt): record for record in load_records(args.questions)} if args.questions else {}
    found = ((prompt, prompt.record(questions)) for prompt in prompts)
    return [(replace(prompt, image=None, original=None), record) for prompt, record in found if record is not None]


def early_reward(records: list[PromptRecord], args: ExportArguments) -> DVReward | None:
    """The checked reward, before images are painted for hours; `None` for a judge that takes a model."""
    from recipe_tools.benchmark_export.images import IMAGE_SIZE
    from reward_models.judges import JUDGES

    if not records or not JUDGES.get(args.judge).is_light:
        return None
    rows = {f"prompts {args.prompts}": [record.to_row() for record in records]}
    size = (args.height or IMAGE_SIZE, args.width or IMAGE_SIZE)
    return args.make_checked_reward(rows, [size], lambda: (None, None))


def score_images(
    benchmark: Benchmark,
    asked: list[tuple[BenchmarkPrompt, PromptRecord]],
    num_prompts: int,
    reward: DVReward | None,
    args: ExportArguments,
) -> None:
    """Let the judge answer the questions about all images, save the scores and print their table."""
    from recipe_tools.benchmark_export.images import score
    from recipe_tools.processes import load_policy
    from reward_models.evaluation.kept_scores import KeptScores
    from reward_models.evaluation.results import save_results
    from reward_models.evaluation.scores import NamedEvaluation

    if not asked:
        print("No prompt has questions: make some with recipes/decompose_prompts.py and pass them as --questions.")
        return
    policy = load_policy(args.model_name_or_path, args.dtype) if args.judge == "policy" else None
    with KeptScores(Path(args.output_dir) / "scores.jsonl") as kept:
        evaluation = asyncio.run(score(benchmark, asked, reward or args.make_reward(policy), args, kept))
    named = NamedEvaluation(args.model_label or args.model_name_or_path, args.benchmark, evaluation)
    settings = {name: value for name, value in asdict(args).items() if name != "output_dir"}
    table = save_results(Path(args.output_dir), [named], [record for _, record in asked], settings)
    print(f"\n{table}\n\n{len(asked)} of {num_prompts} prompts have questions. Scores: {args.output_dir}")


def list_broken_rows(broken: Mapping[int, str], args: ExportArguments) -> str:
    """Name the prompts that cannot be read, one a line."""
    lines = [f"  {error}" for error in list(broken.values())[:MAX_LISTED_ROWS]]
    if len(broken) > MAX_LISTED_ROWS:
        lines.append(f"  and {len(broken) - MAX_LISTED_ROWS} more")
    return "\n".join([f"{len(broken)} rows of {args.prompts} cannot be read:", *lines])


def export_images(args: ExportArguments, state: PartialState) -> None:
    """Paint what is missing of a benchmark, and score it if there is a judge."""
    from alphagrpo_ext.models.fingerprint import model_label
    from recipe_tools.benchmark_export.images import claim_folder, find_broken_rows, paint_missing
    from recipe_tools.processes import print_skipped
    from reward_models.benchmarks import BENCHMARKS

    with checking_input():
        label = args.model_label or model_label(args.model_name_or_path)
        benchmark: Benchmark = BENCHMARKS.get(args.benchmark)(label)
        benchmark.check_num_images(args.num_images or benchmark.num_images)
        prompts = benchmark.prompts(args.prompts)
        if args.height is not None:
            benchmark.check_image_size(args.height, args.width)
        broken = find_broken_rows(prompts)
        if broken and not args.skip_broken_rows:
            raise ValueError(
                f"{list_broken_rows(broken, args)}\nRepair them, or leave them out with --skip_broken_rows."
            )
        good = (prompts[i] for i in range(len(prompts)) if i not in broken)
        asked = prompts_with_questions(good, args) if args.judge != "none" else []
        reward = early_reward([record for _, record in asked], args)
        if state.is_main_process:
            claim_folder(args, benchmark, prompts, broken)
    state.wait_for_everyone()
    paint_missing(benchmark, prompts, args, broken)
    state.wait_for_everyone()
    if state.is_main_process:
        print(f"{len(prompts) - len(broken)} prompts are painted: {Path(args.output_dir) / 'images'}")
        if args.judge != "none":
            score_images(benchmark, asked, len(prompts) - len(broken), reward, args)
        print_skipped(list(broken.values()))


def main(args: ExportArguments) -> None:
    # Here, so that `--help` does not import models.
    from recipe_tools.processes import sole_processes

    with sole_processes(args.output_dir) as state:
        export_images(args, state)


if __name__ == "__main__":
    with input_errors_in_a_line():
        with checking_input():
            (arguments,) = RecipeParser([ExportArguments], __doc__).parse_args_and_config()
        main(arguments)
