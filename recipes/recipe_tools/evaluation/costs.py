# SPDX-License-Identifier: Apache-2.0

"""Rewards of a policy against the number of images that are passed through its network."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trl import TrlParser

from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.rollout.config import RolloutConfig
from alphagrpo_ext.rollout.generator import RolloutGenerator, sample_generator
from alphagrpo_ext.rollout.presets import PRESETS
from alphagrpo_ext.rollout.task import PAINTING_TASK, TASKS
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from alphagrpo_ext.trainer.initial_images import ImageRewards, paint_initial_images
from alphagrpo_ext.trainer.step import new_step
from alphagrpo_ext.trajectory import Trajectory
from reward_models.dvreward import DVReward


CONFIG_FOLDER = Path(__file__).parents[2] / "configs"
_GUIDANCE = ("--cfg_text_scale", "2", "--cfg_interval", "0", "1")
_POINTS = ("--num_timesteps", "40", "--sde_window_size", "5", "--sde_window_range", "0", "15")
PRESET_SETTINGS = {
    "text-to-image": ("reasoning_t2i",),
    "text-to-image, guidance": ("reasoning_t2i", *_GUIDANCE),
    "self-reflection": ("self_reflection",),
    "self-reflection, guidance": ("self_reflection", *_GUIDANCE),
    "self-reflection, guidance, 40 points": ("self_reflection", *_GUIDANCE, *_POINTS),
}
"""Recipes and arguments with which presets are compared. Forty points, of which five steps are trained, are the paper's."""
NUM_SEEDS = 2
"""Number of noise seeds of an evaluation."""
EVALUATION_BATCH_SIZE = 128
"""Samples per batch of an evaluation."""


@dataclass(frozen=True)
class EvaluationCost:
    """
    One row of a table: what a setting costs and gains, compared with the first row.

    Args:
        name (`str`): The setting.
        images (`float`): Images passed through the network per sample.
        fewer (`float`): Factor by which these are fewer than in the first row.
        reward, strict_pass_rate (`float`): Means over samples.
        difference, error (`float`): Difference of the mean reward from that of the first row, and its standard error.
        spread (`float`, *optional*): Mean standard deviation of rewards within a group.
    """

    name: str
    images: float
    fewer: float
    reward: float
    difference: float
    error: float
    strict_pass_rate: float
    spread: float | None

    def __str__(self) -> str:
        spread = "" if self.spread is None else f"{self.spread:.3f}"
        return (
            f"{self.name:<48}{self.images:>8.2f}{self.fewer:>7.2f}x{self.reward:>9.4f}{self.difference:>+9.4f} +- "
            f"{self.error:.4f}{self.strict_pass_rate:>9.1%}{spread:>9}"
        )


@dataclass(frozen=True)
class Measurement:
    """
    Rewards of a setting.

    Args:
        rewards, strict (`torch.Tensor` of shape `(samples,)`): Reward of every image, and whether all answers were yes.
        images (`float`): Images passed through the network per sample.
    """

    rewards: torch.Tensor
    strict: torch.Tensor
    images: float

    def compare_with(self, name: str, base: Measurement, group_size: int = 1) -> EvaluationCost:
        """Compare with a measurement of the same prompts and noise."""
        # Members of a group with branches are not independent, so the standard error is taken over groups.
        difference = (self.rewards - base.rewards).view(-1, group_size).mean(dim=1)
        within = self.rewards.view(-1, group_size).std(dim=1, correction=0).mean().item() if group_size > 1 else None
        return EvaluationCost(
            name,
            images=self.images,
            fewer=base.images / self.images,
            reward=self.rewards.mean().item(),
            difference=difference.mean().item(),
            error=(difference.std() / len(difference) ** 0.5).item(),
            strict_pass_rate=self.strict.mean().item(),
            spread=within,
        )


class Meter:
    """
    Paints and scores images, and counts the images that are passed through the network.

    Args:
        model ([`UnifiedModel`]): The policy.
        processor ([`UnifiedProcessor`]): Its processor.
    """

    def __init__(self, model: UnifiedModel, processor: UnifiedProcessor) -> None:
        self.model = model
        self.processor = processor
        dvreward = DVReward("shapes")

        def reward(**columns: Any) -> list[float | None]:
            return asyncio.run(dvreward(**columns))

        self.rewards = ImageRewards([reward], torch.ones(1), trainer_state=None, loop=None)
        self.images = 0
        predict_velocity = model.predict_velocity

        def counting(cache: Any, latents: torch.Tensor, *args: Any) -> torch.Tensor:
            self.images += len(latents)
            return predict_velocity(cache, latents, *args)

        model.predict_velocity = counting

    def evaluations(self, rows: Sequence[Mapping[str, Any]], config: RolloutConfig) -> Measurement:
        """Measure text-to-image with a thought, with [`NUM_SEEDS`] noise seeds per row."""
        generate = RolloutGenerator(self.model, self.processor, TASKS.get(PAINTING_TASK)(think=True))
        work = [(seed, index) for seed in range(NUM_SEEDS) for index in range(len(rows))]
        samples = []
        self.images = 0
        for start in range(0, len(work), EVALUATION_BATCH_SIZE):
            part = work[start : start + EVALUATION_BATCH_SIZE]
            chosen = [rows[index] for _, index in part]
            generators = [sample_generator(f"eval-{seed}", 0, index) for seed, index in part]
            samples += zip(chosen, generate(chosen, generators, config), strict=True)
        return self._scored(samples)

    def training_rollouts(self, rows: Sequence[Mapping[str, Any]], args: AlphaGRPOConfig) -> Measurement:
        """Measure what training samples with some arguments, first images of self-reflection included; one group per row."""
        tasks = {name: args.make_task(name) for name in args.with_painting_task([args.task])}
        generate = RolloutGenerator(self.model, self.processor, tasks)
        group_size = args.num_generations
        prompts_per_batch = args.per_device_train_batch_size // group_size
        samples = []
        self.images = 0
        for index, start in enumerate(range(0, len(rows), prompts_per_batch)):
            batch = [dict(row) for row in rows[start : start + prompts_per_batch] for _ in range(group_size)]
            step = new_step(batch, args, process_index=0, group_size=group_size, training_position=(index, 0))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
                paint_initial_images(step, generate, tasks, self.rewards, args)
                samples += zip(batch, generate(step.rows, step.generators(), step.configs), strict=True)
        return self._scored(samples)

    def _scored(self, samples: Sequence[tuple[Mapping[str, Any], Trajectory]]) -> Measurement:
        rows, trajectories = zip(*samples, strict=True)
        rewards, passes = self.rewards(rows, [trajectory.final_image for trajectory in trajectories])
        return Measurement(rewards[:, 0], passes, self.images / len(rows))


def recipe_arguments(recipe: str, *arguments: str) -> AlphaGRPOConfig:
    """Parse the configuration of a recipe for the packaged model, with some arguments that take precedence."""
    parser = TrlParser((AlphaGRPOConfig,))
    config = ["--config", str(CONFIG_FOLDER / f"{recipe}_shapes.yaml"), *arguments]
    return parser.parse_args_and_config(config, return_remaining_strings=True)[0]


def measure_solvers(meter: Meter, rows: Sequence[Mapping[str, Any]]) -> Iterator[EvaluationCost]:
    """Measure evaluations with several solvers and numbers of steps."""
    base = None
    for solver, steps, shift in (
        *(("euler", 10, 1.0), ("ab2", 5, 1.6), ("euler", 5, 1.6)),
        *(("euler", 20, 1.0), ("ab2", 10, 1.0), ("dpmpp_2m", 5, 1.6)),
        *(("ab2", 5, 1.0), ("dpmpp_2m", 5, 1.0), ("euler", 5, 1.0), ("euler", 10, 1.6)),
    ):
        args = recipe_arguments(
            PAINTING_TASK,
            *("--eval_ode_solver", solver, "--eval_ode_steps", str(steps), "--eval_timestep_shift", str(shift)),
        )
        measurement = meter.evaluations(rows, args.eval_rollout())
        base = base or measurement
        yield measurement.compare_with(f"{solver}, {steps} steps, shift {shift}", base)


def measure_rollouts(meter: Meter, rows: Sequence[Mapping[str, Any]]) -> Iterator[EvaluationCost]:
    """Measure training rollouts of text-to-image with fewer steps and with branches."""
    base = None
    branches, solver = "--branches_per_thought", ("--ode_solver", "ab2", "--ode_steps", "3")
    for settings in ((), (branches, "2"), (branches, "4"), solver, (*solver, branches, "2"), (*solver, branches, "4")):
        args = recipe_arguments(PAINTING_TASK, *settings)
        measurement = meter.training_rollouts(rows, args)
        base = base or measurement
        name = f"{args.ode_solver}, {args.ode_steps or 'all'} steps, {args.branches_per_thought} per thought"
        yield measurement.compare_with(name, base, args.num_generations)


def measure_preset_rewards(meter: Meter, rows: Sequence[Mapping[str, Any]]) -> Iterator[EvaluationCost]:
    """Measure training rollouts of both tasks under every preset. Rows of a setting are compared with its first preset."""
    for title, (recipe, *arguments) in PRESET_SETTINGS.items():
        base = None
        for preset in PRESETS:
            args = recipe_arguments(recipe, "--preset", preset, *arguments)
            measurement = meter.training_rollouts(rows, args)
            base = base or measurement
            yield measurement.compare_with(f"{title}, `{preset}`", base, args.num_generations)


TABLE_HEADER = f"{'':<48}{'images':>8}{'fewer':>8}{'reward':>9}{'paired difference':>19}{'strict':>9}{'spread':>9}"
