# SPDX-License-Identifier: Apache-2.0

"""
Measure what fewer evaluations of the network cost on the packaged `bagel-shapes`: reward against images pushed through
the network, of evaluations with several ODE solvers and of training rollouts with branches. All are paired by prompt and
noise with the first of their table.

```bash
python recipes/fewer_evaluations.py
```
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import TrlParser

from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator
from alphagrpo_ext.rollout.generator import sample_generator
from alphagrpo_ext.trainer import AlphaGRPOConfig
from reward_models.dvreward import DVReward, Score
from reward_models.prompts.loading import load_prompts
from reward_models.prompts.questions import from_row


RECIPE = Path(__file__).parent / "configs" / "reasoning_t2i_shapes.yaml"
NUM_SEEDS = 2
"""Noise seeds of an evaluation."""


@dataclass
class MeasurementArguments:
    """
    How much is measured.

    Args:
        num_prompts (`int`, *optional*, defaults to `504`): Held-out prompts of an evaluation.
        num_groups (`int`, *optional*, defaults to `120`): Groups of training rollouts.
        output_dir (`str`, *optional*, defaults to `"runs/fewer_evaluations"`): Where `fewer_evaluations.json` goes.
    """

    num_prompts: int = field(default=504, metadata={"help": "Held-out prompts of an evaluation."})
    num_groups: int = field(default=120, metadata={"help": "Groups of training rollouts."})
    output_dir: str = field(default="runs/fewer_evaluations", metadata={"help": "Where fewer_evaluations.json goes."})

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_groups"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, but is {getattr(self, name)}")


@dataclass(frozen=True)
class Row:
    """
    Args:
        name (`str`): What was set.
        images (`float`): Images pushed through the network, per sample.
        fewer (`float`): By which factor they are fewer than those of the first row.
        reward, strict_pass_rate (`float`): Means over samples.
        difference, error (`float`): Of the mean reward to that of the first row, and its standard error.
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
    Args:
        rewards, strict (`torch.Tensor` of shape `(samples,)`): Reward of every image, and whether all answers were yes.
        images (`float`): Images pushed through the network, per sample.
    """

    rewards: torch.Tensor
    strict: torch.Tensor
    images: float

    def compare(self, name: str, base: Measurement, group_size: int = 1) -> Row:
        # Members of a group with branches are not independent, so the error is that of a mean of groups.
        difference = (self.rewards - base.rewards).view(-1, group_size).mean(dim=1)
        within = self.rewards.view(-1, group_size).std(dim=1, correction=0).mean().item() if group_size > 1 else None
        return Row(
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
    Paints and scores, and counts the images that go through the network.

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
        """Rows, the keys of their noise, and how to sample, a batch each."""
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
    """The recipe's settings, and others that take precedence."""
    parser = TrlParser((AlphaGRPOConfig,))
    config = ["--config", str(RECIPE), *arguments]
    return parser.parse_args_and_config(config, return_remaining_strings=True)[0]


def measure_solvers(meter: Meter, rows: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Evaluations by several solvers and numbers of steps."""
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
        parts = [work[start : start + 128] for start in range(0, len(work), 128)]
        measurement = meter.measure(
            [([rows[i] for _, i in part], [(f"eval-{seed}", 0, i) for seed, i in part], config) for part in parts]
        )
        base = base or measurement
        yield measurement.compare(f"{solver}, {steps} steps, shift {shift}", base)


def measure_rollouts(meter: Meter, rows: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Training rollouts of the recipe with fewer steps and with branches."""
    base = None
    branches, solver = "--branches_per_thought", ("--ode_solver", "ab2", "--ode_steps", "3")
    for settings in ((), (branches, "2"), (branches, "4"), solver, (*solver, branches, "2"), (*solver, branches, "4")):
        args = recipe_arguments(*settings)
        group_size = args.num_generations
        prompts_a_batch = args.per_device_train_batch_size // group_size
        batches = []
        for step, start in enumerate(range(0, len(rows), prompts_a_batch)):
            of_batch = [row for row in rows[start : start + prompts_a_batch] for _ in range(group_size)]
            keys = [(args.seed, step, i) for i in range(len(of_batch))]
            batches.append((of_batch, keys, args.train_rollout(step)))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            measurement = meter.measure(batches)
        base = base or measurement
        name = f"{args.ode_solver}, {args.ode_steps or 'all'} steps, {args.branches_per_thought} a thought"
        yield measurement.compare(name, base, group_size)


def main(args: MeasurementArguments) -> None:
    # Threads that wait for each other cost more than they bring at this size.
    torch.set_num_threads(1)
    model, processor = load_model("bagel-shapes", dtype="float32", attn_implementation="eager")
    meter = Meter(RolloutGenerator(model.eval(), processor, TASKS.get("reasoning_t2i")(think=True)))
    output = Path(args.output_dir) / "fewer_evaluations.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[dict[str, Any]]] = {}
    for title, measure, rows in (
        (
            f"evaluation, {args.num_prompts} prompts x {NUM_SEEDS} seeds",
            measure_solvers,
            load_prompts(None, "evaluation", args.num_prompts),
        ),
        (
            f"training rollouts, {args.num_groups} groups",
            measure_rollouts,
            load_prompts(None, "train", args.num_groups),
        ),
    ):
        print(title)
        print(f"{'':<34}{'images':>8}{'fewer':>8}{'reward':>9}{'paired difference':>19}{'strict':>9}{'spread':>9}")
        tables[title] = []
        for row in measure(meter, list(rows)):
            print(row, flush=True)
            tables[title].append(asdict(row))
            # What is measured already is not lost with what follows.
            temporary = output.with_suffix(".json.tmp")
            temporary.write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, output)
    print(f"\n{output}")


if __name__ == "__main__":
    (arguments,) = TrlParser((MeasurementArguments,)).parse_args_and_config()
    main(arguments)
