# SPDX-License-Identifier: Apache-2.0

"""The runs that tables need: commands of recipes, each with a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphagrpo_ext.files import write_text
from table_parts.arguments import TablesArguments


FINISHED_NAME = "finished.json"
"""File of a run's folder that says by which commands it was finished."""
TRAINING_MINUTES, SHORT_TRAINING_MINUTES, REFLECTION_MINUTES = 5.0, 3.0, 5.0
EVALUATION_MINUTES, CURVE_MINUTES = 0.7, 14.0
"""
Minutes on one core while the other core is busy: a run of text-to-image with the recipe's and with fewer steps, a run of
self-reflection, an evaluation of one model, and a learning curve.
"""
SHORT_STEPS = ("--max_steps", "80")
"""Steps of text-to-image where settings are compared, half of the recipe's, or where other training follows."""
CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Run:
    """
    One command.

    Args:
        name (`str`): Its name, the same in all tables that need it.
        folder (`Path`): What it writes.
        command (`tuple[str, ...]`): A script's file in `recipes/`, and its arguments.
        minutes (`float`): Estimate of its time on one core.
        needs (`tuple[Run, ...]`, *optional*, defaults to `()`): Runs that must be finished before.
    """

    name: str
    folder: Path
    command: tuple[str, ...]
    minutes: float
    needs: tuple[Run, ...] = ()

    @property
    def commands(self) -> list[Any]:
        """Its command, and those of the runs that it needs, as JSON has them."""
        return [list(self.command), [other.commands for other in self.needs]]

    @property
    def finished(self) -> bool:
        """Whether these very commands were finished."""
        path = self.folder / FINISHED_NAME
        return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == self.commands

    def mark_finished(self) -> None:
        """Say in its folder that it was finished."""
        write_text(self.folder / FINISHED_NAME, json.dumps(self.commands) + "\n")


def with_needs(runs: Iterable[Run]) -> list[Run]:
    """The runs and all that they need, each once, after what it needs."""
    found: dict[str, Run] = {}
    for run in runs:
        found |= {other.name: other for other in [*with_needs(run.needs), run]}
    return list(found.values())


class Plan:
    """
    Makes the runs of tables. Runs of the same name are equal, so tables share them.

    Args:
        args ([`TablesArguments`]): Model, seeds and amounts.
    """

    def __init__(self, args: TablesArguments) -> None:
        self.args = args
        self.folder = Path(args.output_dir)
        self.seeds: Sequence[int] = args.seeds

    def _run(
        self,
        name: str,
        script: str,
        arguments: Sequence[str],
        minutes: float,
        needs: tuple[Run, ...] = (),
        output: str = "",
    ) -> Run:
        folder = self.folder / "runs" / name
        where = ("--output", str(folder / output)) if output else ("--output_dir", str(folder))
        return Run(name, folder, (script, *arguments, *where), minutes, needs)

    def training(
        self, name: str, seed: int, *arguments: str, recipe: str = "reasoning_t2i", needs: tuple[Run, ...] = ()
    ) -> Run:
        """A run of a training recipe. One that was cut off continues from its last checkpoint."""
        painting_minutes = SHORT_TRAINING_MINUTES if SHORT_STEPS[0] in arguments else TRAINING_MINUTES
        minutes = REFLECTION_MINUTES if recipe == "self_reflection" else painting_minutes
        steps = () if self.args.max_steps is None else ("--max_steps", str(self.args.max_steps))
        amounts = (*steps, "--num_eval_prompts", str(self.args.num_eval_prompts))
        resume = ("--save_strategy", "steps", "--save_steps", "20", "--save_total_limit", "1")
        given = ("--model_name_or_path", self.args.model_name_or_path, "--seed", str(seed), *arguments)
        words = (*given, *amounts, *resume, "--resume_from_checkpoint", "last")
        return self._run(f"{name}-seed{seed}", f"{recipe}.py", words, minutes, needs)

    def reasoning(self, name: str, *arguments: str, seeds: Sequence[int] | None = None) -> tuple[Run, ...]:
        """Runs of `reasoning_t2i.py`, by default with all seeds."""
        return tuple(self.training(name, seed, *arguments) for seed in (self.seeds if seeds is None else seeds))

    def default_reasoning(self, seeds: Sequence[int] | None = None) -> tuple[Run, ...]:
        """Runs of `reasoning_t2i.py` without further arguments, which most tables share."""
        return self.reasoning("reasoning", seeds=seeds)

    def short_reasoning(
        self, name: str = "painting", *arguments: str, seeds: Sequence[int] | None = None
    ) -> tuple[Run, ...]:
        """Runs of `reasoning_t2i.py` with [`SHORT_STEPS`], whose settings are compared."""
        return self.reasoning(name, *SHORT_STEPS, *arguments, seeds=seeds)

    def reflection(self, name: str, *arguments: str, seeds: Sequence[int] | None = None) -> tuple[Run, ...]:
        """Runs of `self_reflection.py`, by default with all seeds."""
        chosen = self.seeds if seeds is None else seeds
        return tuple(self.training(name, seed, *arguments, recipe="self_reflection") for seed in chosen)

    def default_reflection(self) -> tuple[Run, ...]:
        """Runs of `self_reflection.py` without further arguments."""
        return self.reflection("reflection")

    def evaluation(self, name: str, trained: Run | None, *arguments: str, num_stages: int = 1) -> Run:
        """
        An evaluation of one model by `evaluate.py`, whose judge is that of the pixels.

        Args:
            name (`str`): What is evaluated; the name of the run has the model's beside it.
            trained ([`Run`], *optional*): The run that made the model; `None` for the model that runs start from.
            arguments (`str`): Arguments of the evaluation.
            num_stages (`int`, *optional*, defaults to `1`): Number of times that every prompt is painted, for the estimate.
        """
        model = self.args.model_name_or_path if trained is None else str(trained.folder)
        words = ("--models", model, "--num_eval_prompts", str(self.args.num_eval_prompts), *arguments)
        needs = () if trained is None else (trained,)
        label = "untrained" if trained is None else trained.name
        return self._run(f"{name}-{label}", "evaluate.py", words, EVALUATION_MINUTES * num_stages, needs)

    def questions(self, decomposer: str, *arguments: str) -> Run:
        """Training prompts of the shapes world with a decomposer's questions, in `questions.jsonl`."""
        words = ("--decomposer", decomposer, "--limit", "2048", *arguments)
        return self._run(f"questions-{decomposer}", "decompose_prompts.py", words, 0.3, output="questions.jsonl")

    def learning_curves(self, recipe: str, name: str, *arguments: str) -> tuple[Run, ...]:
        """Runs of `learning_curve.py` with the configuration of a recipe, one per seed. One that was cut off goes on from its last point."""
        config = ("--config", str(CONFIGS / f"{recipe}_shapes.yaml"))
        steps = () if self.args.max_steps is None else ("--max_steps", str(self.args.max_steps))
        # There are nine evaluations, so each has one noise seed alone.
        evaluation = (
            "--num_eval_prompts",
            str(self.args.num_eval_prompts),
            "--eval_seeds",
            "1",
            "--eval_questions",
            "0",
        )
        amounts = (*steps, *evaluation, "--report", "false")
        resume = ("--resume_from_checkpoint", "last")
        model = ("--model_name_or_path", self.args.model_name_or_path)
        return tuple(
            self._run(
                f"curve_{recipe}_{name}-seed{seed}",
                "table_parts/time_to_quality/learning_curve.py",
                (*config, *model, "--seed", str(seed), *arguments, *amounts, *resume),
                CURVE_MINUTES,
            )
            for seed in self.seeds
        )

    def objective_costs(self) -> Run:
        """The measurement of `step_costs.py`, which begins anew after it was cut off."""
        amounts = ("--max_steps", "4", "--num_eval_prompts", "2", "--eval_questions", "0", "--report", "false")
        words = ("--model_name_or_path", self.args.model_name_or_path, *amounts)
        return self._run("objective_costs", "table_parts/objectives/step_costs.py", words, 4.0)

    def costs(self, table: str, minutes: float) -> Run:
        """The measurement of a table by `fewer_evaluations.py`, which begins anew after it was cut off."""
        num_groups = max(2, round(120 * self.args.num_eval_prompts / 504))
        amounts = ("--num_prompts", str(self.args.num_eval_prompts), "--num_groups", str(num_groups))
        words = ("--table", table, "--model_name_or_path", self.args.model_name_or_path, *amounts)
        return self._run(f"fewer_evaluations_{table}", "table_parts/fewer_evaluations.py", words, minutes)

    def frozen_rewards(self) -> Run:
        """The measurement of `frozen_rewards.py`, on several images of every prompt by the model that runs start from."""
        num_prompts = max(2, self.args.num_eval_prompts // 4)
        images = self.evaluation("several_seeds", None, "--num_eval_prompts", str(num_prompts), "--eval_seeds", "6")
        words = ("--model_name_or_path", self.args.model_name_or_path, "--evaluation", str(images.folder))
        return self._run("frozen_rewards", "table_parts/frozen_rewards.py", words, 3.0, needs=(images,))
