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

from alphagrpo_ext.rollout.config import RolloutConfig
from alphagrpo_ext.rollout.generator import RolloutGenerator, sample_generator
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from reward_models.dvreward import DVReward, Score
from reward_models.prompts.questions import from_row


RECIPE = Path(__file__).parents[2] / "configs" / "reasoning_t2i_shapes.yaml"
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
            f"{self.name:<34}{self.images:>8.2f}{self.fewer:>7.2f}x{self.reward:>9.4f}{self.difference:>+9.4f} +- "
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
        generator ([`RolloutGenerator`]): The policy.
    """

    def __init__(self, generator: RolloutGenerator) -> None:
        self.generator = generator
        self.reward = DVReward("shapes")
        self.images = 0
        predict_velocity = generator.model.predict_velocity

        def counting(cache: Any, latents: torch.Tensor, *args: Any) -> torch.Tensor:
            self.images += len(latents)
            return predict_velocity(cache, latents, *args)

        generator.model.predict_velocity = counting

    def measure(
        self, batches: Sequence[tuple[Sequence[Mapping[str, Any]], Sequence[Any], RolloutConfig]]
    ) -> Measurement:
        """Measure batches, each of which has rows, the keys of their noise, and the settings of sampling."""
        scores: list[Score] = []
        self.images = 0
        for rows, keys, config in batches:
            trajectories = self.generator(rows, [sample_generator(*key) for key in keys], config)
            records = [from_row(row, where="a prompt") for row in rows]
            scores += asyncio.run(self.reward.score([t.final_image for t in trajectories], records))
        return Measurement(
            torch.tensor([score.reward for score in scores]),
            torch.tensor([float(score.strict_pass) for score in scores]),
            self.images / len(scores),
        )


def recipe_arguments(*arguments: str) -> AlphaGRPOConfig:
    """Parse the recipe's configuration, with some arguments that take precedence."""
    parser = TrlParser((AlphaGRPOConfig,))
    config = ["--config", str(RECIPE), *arguments]
    return parser.parse_args_and_config(config, return_remaining_strings=True)[0]


def measure_solvers(meter: Meter, rows: Sequence[Mapping[str, Any]]) -> Iterator[EvaluationCost]:
    """Measure evaluations with several solvers and numbers of steps."""
    work = [(seed, index) for seed in range(NUM_SEEDS) for index in range(len(rows))]
    base = None
    for solver, steps, shift in (
        *(("euler", 10, 1.0), ("ab2", 5, 1.6), ("euler", 5, 1.6)),
        *(("euler", 20, 1.0), ("ab2", 10, 1.0), ("dpmpp_2m", 5, 1.6)),
        *(("ab2", 5, 1.0), ("dpmpp_2m", 5, 1.0), ("euler", 5, 1.0), ("euler", 10, 1.6)),
    ):
        config = recipe_arguments(
            *("--eval_ode_solver", solver, "--eval_ode_steps", str(steps), "--eval_timestep_shift", str(shift))
        ).eval_rollout()
        parts = [work[start : start + EVALUATION_BATCH_SIZE] for start in range(0, len(work), EVALUATION_BATCH_SIZE)]
        measurement = meter.measure(
            [([rows[i] for _, i in part], [(f"eval-{seed}", 0, i) for seed, i in part], config) for part in parts]
        )
        base = base or measurement
        yield measurement.compare_with(f"{solver}, {steps} steps, shift {shift}", base)


def measure_rollouts(meter: Meter, rows: Sequence[Mapping[str, Any]]) -> Iterator[EvaluationCost]:
    """Measure training rollouts of the recipe with fewer steps and with branches."""
    base = None
    branches, solver = "--branches_per_thought", ("--ode_solver", "ab2", "--ode_steps", "3")
    for settings in ((), (branches, "2"), (branches, "4"), solver, (*solver, branches, "2"), (*solver, branches, "4")):
        args = recipe_arguments(*settings)
        group_size = args.num_generations
        prompts_per_batch = args.per_device_train_batch_size // group_size
        batches = []
        for step, start in enumerate(range(0, len(rows), prompts_per_batch)):
            batch = [row for row in rows[start : start + prompts_per_batch] for _ in range(group_size)]
            keys = [(args.seed, step, i) for i in range(len(batch))]
            batches.append((batch, keys, args.train_rollout(step)))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            measurement = meter.measure(batches)
        base = base or measurement
        name = f"{args.ode_solver}, {args.ode_steps or 'all'} steps, {args.branches_per_thought} per thought"
        yield measurement.compare_with(name, base, group_size)


TABLE_HEADER = f"{'':<34}{'images':>8}{'fewer':>8}{'reward':>9}{'paired difference':>19}{'strict':>9}{'spread':>9}"
