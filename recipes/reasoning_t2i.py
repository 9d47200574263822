# SPDX-License-Identifier: Apache-2.0

"""
Train a unified multimodal model on reasoning text-to-image: prompt, thought, image.

Without arguments it trains the packaged `bagel-shapes` on a laptop for a few minutes and shows images before and after:

```bash
accelerate launch recipes/reasoning_t2i.py
```

With `--resume_from_checkpoint last`, the same command starts a run and continues it after it was stopped, with the result of a run
that was never stopped:

```bash
accelerate launch recipes/reasoning_t2i.py --save_strategy steps --save_steps 10 --resume_from_checkpoint last
```

Every argument of `AlphaGRPOConfig` and `ModelConfig` can be given on the command line or in a file. The command line takes
precedence:

```bash
accelerate launch --multi_gpu --num_processes 2 recipes/reasoning_t2i.py \\
    --config recipes/configs/reasoning_t2i_shapes.yaml --max_steps 50 --output_dir runs/try
```
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recipe_tools.startup import without_garbage_collection


with without_garbage_collection():
    from trl import ModelConfig

    from alphagrpo_ext.trainer.config import AlphaGRPOConfig
    from alphagrpo_ext.trainer.resume.sole_writer import writes_alone
    from recipe_tools.early_checks import check_arguments
    from recipe_tools.input_errors import checking_input, input_errors_in_a_line
    from recipe_tools.recipe_arguments import RecipeParser
    from reward_models.arguments import PromptArguments


if TYPE_CHECKING:
    from reward_models.evaluation.samples import Evaluation


DEFAULT_CONFIG = Path(__file__).parent / "configs" / "reasoning_t2i_shapes.yaml"


@writes_alone
def main(script_args: PromptArguments, training_args: AlphaGRPOConfig, model_args: ModelConfig) -> None:
    with checking_input():
        check_arguments(script_args, training_args, model_args)
    # Here, so that `--help` does not import models and trainers.
    from recipe_tools import training
    from reward_models.evaluation.scores import gain_error, scored_pairs
    from reward_models.evaluation.text_tables import comparison_table

    with checking_input():
        run = training.prepare_run(script_args, training_args, model_args)
        trainer = training.make_trainer(run, training.load_rewards(run))

    def evaluations(moment: str) -> list[Evaluation]:
        with trainer.gathered_policy() as policy:
            return [training.evaluate_policy(run, policy, training_args.task, training_args.think, moment)]

    def save(before: list[Evaluation], after: list[Evaluation]) -> tuple[str, str]:
        (old,), (new,) = before, after
        summary = {"before": old.summary(), "after": new.summary(), "gain_error": gain_error(old, new)}
        training.save_scores(run, summary, old, new)
        training.save_picture(
            run.output_dir / "before_after.png",
            scored_pairs(old.samples, new.samples),
            categories=list(old.categories),
            headers=("before", "after"),
            caption=lambda one, _: one.prompt,
            prompt_rows=run.eval_rows,
        )
        return comparison_table(old, new), "before_after.png"

    training.train_between_evaluations(run, trainer, evaluations, save)


if __name__ == "__main__":
    with input_errors_in_a_line():
        parser = RecipeParser([PromptArguments, AlphaGRPOConfig, ModelConfig], __doc__, DEFAULT_CONFIG)
        with checking_input():
            arguments = parser.parse_args_and_config()
        main(*arguments)

    from recipe_tools.processes import end_processes

    end_processes()
