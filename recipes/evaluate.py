# SPDX-License-Identifier: Apache-2.0

"""
Score checkpoints and adapters on prompts with questions: images painted without a thought or after one, images refined in rounds
of reflection, and edited images.

```bash
python recipes/evaluate.py --models bagel-shapes runs/reasoning_t2i_shapes --modes direct thought
python recipes/evaluate.py --models bagel-shapes runs/reasoning_t2i_shapes --num_rounds 3
python recipes/evaluate.py --models bagel-shapes runs/self_reflection_shapes --task image_editing
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

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from alphagrpo_ext.files import FileInUseError
from alphagrpo_ext.ranges import NonNegativeInt, PositiveInt
from alphagrpo_ext.rollout.arguments import SamplingArguments
from recipe_tools.evaluation_stages import DIRECT, EDITING, PAINTING, REFINE, THOUGHT, make_stages
from recipe_tools.recipe_arguments import RecipeParser
from reward_models.arguments import RewardArguments


@dataclass
class EvaluationArguments(RewardArguments, SamplingArguments):
    """
    Arguments of the evaluation; for the rest see [`RewardArguments`] and [`SamplingArguments`]. The help text of a field describes
    it.
    """

    models: list[str] = field(
        default_factory=lambda: ["bagel-shapes"],
        metadata={"help": "Checkpoints and adapters: names, folders, or ids on the Hub."},
    )
    task: str = field(default=PAINTING, metadata={"help": "'reasoning_t2i' or 'image_editing'."})
    eval_file: str | None = field(
        default=None,
        metadata={
            "help": "Prompts with questions, and images to edit: JSON lines, a JSON array, CSV, TSV, Parquet, a folder, or a dataset. "
            "Default: prompts of the shapes world."
        },
    )
    num_eval_prompts: PositiveInt = field(
        default=504, metadata={"help": "Number of prompts drawn from the shapes world."}
    )
    skip_broken_rows: bool = field(
        default=False,
        metadata={"help": "Leave out rows whose image cannot be read, and list them at the end, instead of stopping."},
    )
    eval_seeds: PositiveInt = field(default=2, metadata={"help": "Noise seeds per prompt."})
    modes: list[str] | None = field(
        default=None,
        metadata={
            "help": "How images are made: 'direct' (without a thought), 'thought' (after one), 'refine' (after a thought and "
            "num_rounds rounds of reflection, each of which is scored). Default: 'thought', and 'refine' if there are rounds."
        },
    )
    num_rounds: NonNegativeInt = field(default=0, metadata={"help": "Number of rounds of reflection."})
    image_size: PositiveInt = field(default=24, metadata={"help": "Height and width of images, in pixels."})
    batch_size: PositiveInt = field(default=128, metadata={"help": "Samples per batch."})
    output_dir: str = field(default="runs/evaluate", metadata={"help": "Folder for scores and images."})

    def __post_init__(self) -> None:
        RewardArguments.__post_init__(self)
        SamplingArguments.__post_init__(self)
        if self.task not in (PAINTING, EDITING):
            raise ValueError(f"task must be '{PAINTING}' or '{EDITING}', but is '{self.task}'")
        if self.modes is None:
            self.modes = [THOUGHT, REFINE] if self.num_rounds else [THOUGHT]
        unknown = [mode for mode in self.modes if mode not in (DIRECT, THOUGHT, REFINE)]
        if unknown or not self.modes:
            raise ValueError(f"modes must be among '{DIRECT}', '{THOUGHT}' and '{REFINE}', but are {self.modes}")
        if (REFINE in self.modes) != (self.num_rounds > 0):
            raise ValueError(
                f"mode '{REFINE}' and num_rounds go together, but modes are {self.modes} and num_rounds is {self.num_rounds}"
            )


def main(args: EvaluationArguments) -> None:
    # Here, so that `--help` does not import models.
    from recipe_tools.evaluation import evaluate_model, load_rows, print_rounds
    from recipe_tools.processes import end_processes, print_skipped, start_processes
    from reward_models.evaluation.results import save_results
    from reward_models.evaluation.settings_digest import settings_digest
    from reward_models.prompts.questions import from_row

    state = start_processes()
    skipped: list[str] | None = [] if args.skip_broken_rows else None
    rows = load_rows(args.task, args.eval_file, args.num_eval_prompts, skipped)
    stages = make_stages(args.task, args.modes, args.num_rounds)
    rows_digest = settings_digest(rows)
    models = list(dict.fromkeys(args.models))
    results = [entry for name in models for entry in evaluate_model(name, stages, rows, rows_digest, args)]
    if state.is_main_process:
        records = [from_row(row, where=f"row {index}") for index, row in enumerate(rows)]
        settings = {name: value for name, value in asdict(args).items() if name != "output_dir"}
        print(f"\n{save_results(Path(args.output_dir), results, records, settings)}")
        print_rounds(results)
        print_skipped(skipped)
        print(f"\nevaluation.json, summary.csv, samples.jsonl and images: {args.output_dir}")
    end_processes()


if __name__ == "__main__":
    (arguments,) = RecipeParser([EvaluationArguments], __doc__).parse_args_and_config()
    try:
        main(arguments)
    except FileInUseError as error:
        sys.exit(str(error))
