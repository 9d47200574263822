# SPDX-License-Identifier: Apache-2.0

"""
Score checkpoints and adapters on prompts with questions: images painted without a thought or after one, images refined in rounds
of reflection, and edited images.

```bash
python recipes/evaluate.py --models bagel-shapes runs/reasoning_t2i_shapes --modes direct thought
python recipes/evaluate.py --models bagel-shapes runs/reasoning_t2i_shapes --num_rounds 3
python recipes/evaluate.py --models bagel-shapes runs/self_reflection_shapes --task image_editing
```

Or how many questions about images are answered right, with a thought and without one; a file of questions has `image` and `solution`:

```bash
python recipes/evaluate.py --models bagel-shapes --task visual_question_answering --modes direct thought
```

With prompts and a judge of your own (`--help` lists all options):

```bash
python recipes/evaluate.py --models ByteDance-Seed/BAGEL-7B-MoT runs/adapter --dtype bfloat16 --eval_file questions.jsonl \\
    --image_size 512 --num_timesteps 50 --timestep_shift 3 --cfg_text_scale 4 --batch_size 8 \\
    --judge openai --judge_base_url http://localhost:8000/v1 --judge_model NAME
```

All checkpoints see the same prompts and the same noise, so their scores are paired. Each is compared with the first one. Intervals
are 95% bootstrap intervals over prompts.

Every scored batch is kept in the output folder. The same command continues an evaluation that was stopped, and a further model,
mode or round only adds what is new. With `accelerate launch`, several processes share the work.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from recipe_tools.evaluation.arguments import EvaluationArguments
from recipe_tools.evaluation.stages import ANSWERING, make_stages
from recipe_tools.input_errors import checking_input, input_errors_in_a_line
from recipe_tools.recipe_arguments import RecipeParser


def evaluate_questions(args: EvaluationArguments, is_main: bool) -> None:
    """Evaluate the answers of all models, and print and save how many are right."""
    from recipe_tools.evaluation.answers import evaluate_answers, load_questions, save_answers
    from recipe_tools.processes import print_skipped
    from reward_models.evaluation.settings_digest import settings_digest

    skipped: list[str] | None = [] if args.skip_broken_rows else None
    with checking_input():
        rows = load_questions(args.eval_file, args.num_eval_prompts, skipped)
    digest = settings_digest(rows)
    models = dict.fromkeys(args.models)
    answers = [answer for name in models for answer in evaluate_answers(name, rows, digest, args)]
    if is_main:
        print(f"\n{save_answers(Path(args.output_dir), answers, asdict(args))}")
        print_skipped(skipped)
        print(f"\nevaluation.json and samples.jsonl: {args.output_dir}")


def evaluate_images(args: EvaluationArguments, is_main: bool) -> None:
    """Evaluate the images of all models, and print and save their scores."""
    from recipe_tools.evaluation.models import evaluate_model, load_rows, print_rounds
    from recipe_tools.processes import print_skipped
    from reward_models.evaluation.results import save_results
    from reward_models.evaluation.settings_digest import settings_digest
    from reward_models.prompts.questions import from_row

    skipped: list[str] | None = [] if args.skip_broken_rows else None
    with checking_input():
        rows = load_rows(args.task, args.eval_file, args.num_eval_prompts, skipped)
        stages = make_stages(args.task, args.modes, args.num_rounds)
    rows_digest = settings_digest(rows)
    models = list(dict.fromkeys(args.models))
    results = [entry for name in models for entry in evaluate_model(name, stages, rows, rows_digest, args)]
    if is_main:
        records = [from_row(row, where=f"row {index}") for index, row in enumerate(rows)]
        settings = {name: value for name, value in asdict(args).items() if name != "output_dir"}
        print(f"\n{save_results(Path(args.output_dir), results, records, settings)}")
        print_rounds(results)
        print_skipped(skipped)
        print(f"\nevaluation.json, summary.csv, samples.jsonl and images: {args.output_dir}")


def main(args: EvaluationArguments) -> None:
    # Here, so that `--help` does not import models.
    from recipe_tools.processes import sole_processes

    # From beginning to end, because another evaluation would replace the stages that this one has finished.
    with sole_processes(args.output_dir) as state:
        evaluate = evaluate_questions if args.task == ANSWERING else evaluate_images
        evaluate(args, state.is_main_process)


if __name__ == "__main__":
    with input_errors_in_a_line():
        with checking_input():
            (arguments,) = RecipeParser([EvaluationArguments], __doc__).parse_args_and_config()
        main(arguments)
