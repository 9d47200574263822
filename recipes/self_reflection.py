# SPDX-License-Identifier: Apache-2.0

"""
Train a unified multimodal model on self-reflective refinement: it looks at its own image, writes what is wrong, and repaints it.

Without arguments it trains the packaged `bagel-shapes` on a laptop for a few minutes and shows flawed and refined images:

```bash
accelerate launch recipes/self_reflection.py
```

With `--resume_from_checkpoint last`, the same command starts a run and continues it after it was stopped, with the result of a run
that was never stopped:

```bash
accelerate launch recipes/self_reflection.py --save_strategy steps --save_steps 10 --resume_from_checkpoint last
```

Every argument of `AlphaGRPOConfig` and `ModelConfig` can be given on the command line or in a file. The command line takes
precedence. Rewards of the text's format train the text alone:

```bash
accelerate launch recipes/self_reflection.py --text_loss_weight 0.05 --formats shapes_reflection --reward_weights 1.0 0.2
```

With `allow_stop`, which the configuration for shapes sets, the policy keeps an image that it finds right. First images then follow
a thought (`stage1_think`), so that some of them are worth keeping.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


DEFAULT_CONFIG = Path(__file__).parent / "configs" / "self_reflection_shapes.yaml"


def summarize_refinement(initial: Evaluation, refined: Evaluation) -> dict[str, Any]:
    """Scores of images as they were first painted, and of the same images refined, for `summary.json`."""
    from reward_models.evaluation.scores import RefinementScore, StopRates

    return {
        "initial": initial.summary(),
        "refined": refined.summary(),
        **asdict(RefinementScore.from_evaluations(initial, refined)),
        "stops": asdict(StopRates.from_evaluations(initial, refined)),
    }


@writes_alone
def main(script_args: PromptArguments, training_args: AlphaGRPOConfig, model_args: ModelConfig) -> None:
    with checking_input():
        check_arguments(script_args, training_args, model_args)
    # Here, so that `--help` does not import models and trainers.
    from alphagrpo_ext.rollout.task import PAINTING_TASK
    from recipe_tools import training
    from reward_models.evaluation.scores import scored_pairs
    from reward_models.evaluation.text_tables import refinement_table

    with checking_input():
        run = training.prepare_run(script_args, training_args, model_args)
        trainer = training.make_trainer(run, training.load_rewards(run))

    def evaluations(moment: str) -> list[Evaluation]:
        with trainer.gathered_policy() as policy:
            think = training_args.stage1_think
            initial = training.evaluate_policy(run, policy, PAINTING_TASK, think, f"{moment}: painting")
            refined = training.evaluate_policy(
                run, policy, training_args.task, training_args.think, f"{moment}: refining", initial
            )
        return [initial, refined]

    def save(before: list[Evaluation], after: list[Evaluation]) -> tuple[str, str]:
        summary = {"before": summarize_refinement(*before), "after": summarize_refinement(*after)}
        training.save_scores(run, summary, before[1], after[1])
        initial, refined = after
        training.save_picture(
            run.output_dir / "refined.png",
            [pair for pair in scored_pairs(initial.samples, refined.samples) if not pair[0].strict_pass],
            categories=list(initial.categories),
            headers=("flawed", "refined"),
            caption=lambda old, new: f"{old.prompt} | {new.text}",
            prompt_rows=run.eval_rows,
            caption_width=420,
        )
        trainer.card_details["compared"] = (
            "the value of the first images and that of the refined ones; a row is of the model before or after training"
        )
        return refinement_table({"before": before, "after": after}), "refined.png"

    training.train_between_evaluations(run, trainer, evaluations, save)


if __name__ == "__main__":
    with input_errors_in_a_line():
        parser = RecipeParser([PromptArguments, AlphaGRPOConfig, ModelConfig], __doc__, DEFAULT_CONFIG)
        with checking_input():
            arguments = parser.parse_args_and_config()
        main(*arguments)

    from recipe_tools.processes import end_processes

    end_processes()
