# SPDX-License-Identifier: Apache-2.0

"""Scores a policy on prompts with questions: mean reward and strict pass rate, over all prompts and by category."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from alphagrpo_ext.rollout.generator import RolloutConfig, RolloutGenerator, sample_generator
from reward_models.dvreward import DVReward
from reward_models.evaluation.samples import EvaluatedSample, Evaluation, gather_samples
from reward_models.evaluation.store import EvaluationStore
from reward_models.prompts.questions import from_row


def evaluate(
    generator: RolloutGenerator,
    rows: Sequence[Mapping[str, Any]],
    config: RolloutConfig,
    reward: DVReward,
    seeds: Sequence[int] = (0, 1),
    batch_size: int = 128,
    description: str = "evaluation",
    initial: Evaluation | None = None,
    store: EvaluationStore | None = None,
) -> Evaluation:
    """
    Paint every prompt with every noise seed and score it. Two policies that are given the same rows and seeds start
    from the same noise, so that their scores are paired.

    Under several processes each does its share, and all return the whole.

    Args:
        generator ([`RolloutGenerator`]): The policy.
        rows (`Sequence[Mapping[str, Any]]`): Rows with `prompt`, questions, and optionally `category`.
        config ([`RolloutConfig`]): How to sample.
        reward ([`DVReward`]): How to score.
        seeds (`Sequence[int]`, *optional*, defaults to `(0, 1)`): Noise seeds.
        batch_size (`int`, *optional*, defaults to `128`): Samples at once.
        description (`str`, *optional*, defaults to `"evaluation"`): Label of the progress bar.
        initial ([`Evaluation`], *optional*):
            An evaluation of the same rows and seeds, whose images the policy is given: those that it is to refine.
        store ([`EvaluationStore`], *optional*):
            Open; keeps every scored batch, and has those of an earlier run, which are taken as they are.

    Raises:
        [`~reward_models.dvreward.JudgeFailedError`]:
            If there is a store, and the judge leaves more images of a batch without a score than it may. The batch is not
            kept.
    """
    num_rounds = 0 if initial is None else initial.round + 1
    given = {} if initial is None else {(sample.seed, sample.index): sample for sample in initial.samples}
    work = share_of_work(len(rows), seeds)
    samples: list[EvaluatedSample] = []
    progress = tqdm(total=len(work), desc=description, disable=not PartialState().is_main_process)
    # One event loop for all batches: a judge keeps its connections from one to the next.
    with asyncio.Runner() as runner:
        for start in range(0, len(work), batch_size):
            part = work[start : start + batch_size]
            if store is not None and (kept := store.samples(start)) is not None:
                samples += kept
                progress.update(len(part))
                continue
            batch = [
                {**rows[index], "image": given[seed, index].load_image()} if given else rows[index]
                for seed, index in part
            ]
            generators = [sample_generator(f"eval-{seed}", num_rounds, index) for seed, index in part]
            trajectories = generator(batch, generators, config)
            images = [trajectory.final_image for trajectory in trajectories]
            records = [from_row(row, where=f"row {index}") for row, (_, index) in zip(batch, part, strict=True)]
            scores = runner.run(reward.score(images, records))
            if store is not None:
                # What is kept is final, and a judge that is down for a while is no reason for that.
                reward.check_failures(scores)
            scored = []
            for (seed, index), row, trajectory, score in zip(part, batch, trajectories, scores, strict=True):
                ids = [token_id for text in trajectory.sampled_texts for token_id in text.content_ids]
                text = generator.processor.decode(ids)
                scored.append(EvaluatedSample.of(row, index, seed, text, trajectory.final_image, score))
            samples += store.keep(start, scored) if store is not None else scored
            progress.update(len(part))
        runner.run(reward.aclose())
    progress.close()
    return gather_samples(samples, num_rounds)


def share_of_work(num_rows: int, seeds: Sequence[int]) -> list[tuple[int, int]]:
    """What this process paints, as pairs of noise seed and row."""
    state = PartialState()
    # Strided, so that no process can get all the long prompts of a sorted list.
    return [(seed, index) for seed in seeds for index in range(num_rows)][state.process_index :: state.num_processes]


@dataclass(frozen=True)
class RefinementScore:
    """
    What a refinement did to the images that it was given. Shares are of all pairs that could be scored.

    Args:
        improved, worsened, unchanged (`float`): By reward; a difference of at most 0.01 is none.
        fixed (`float`): Images that passed strictly after it and not before.
        broken (`float`): Images that passed strictly before it and not after.
        num_pairs (`int`): Pairs that could be scored.
    """

    improved: float
    worsened: float
    unchanged: float
    fixed: float
    broken: float
    num_pairs: int

    @classmethod
    def of(cls, initial: Evaluation, refined: Evaluation, tolerance: float = 0.01) -> RefinementScore:
        pairs = [
            (old, new)
            for old, new in zip(initial.samples, refined.samples, strict=True)
            if old.reward is not None and new.reward is not None
        ]
        changes = [new.reward - old.reward for old, new in pairs]
        count = max(len(pairs), 1)
        improved = sum(change > tolerance for change in changes) / count
        worsened = sum(change < -tolerance for change in changes) / count
        return cls(
            improved=improved,
            worsened=worsened,
            unchanged=(sum(abs(change) <= tolerance for change in changes)) / count,
            fixed=sum(new.strict_pass and not old.strict_pass for old, new in pairs) / count,
            broken=sum(old.strict_pass and not new.strict_pass for old, new in pairs) / count,
            num_pairs=len(pairs),
        )


def refinement_table(pairs: Mapping[str, tuple[Evaluation, Evaluation]]) -> str:
    """A plain-text table of refinements by one or several policies: initial and refined evaluation by name."""
    header = (
        f"{'':<18}{'n':>6}{'reward':>18}{'':>9}{'strict pass':>18}{'':>9}"
        f"{'improved':>10}{'worsened':>10}{'unchanged':>11}{'fixed':>8}{'broken':>8}"
    )
    lines = [header, "-" * len(header)]
    for name, (initial, refined) in pairs.items():
        old, new, score = initial.total, refined.total, RefinementScore.of(initial, refined)
        lines.append(
            f"{name:<18}{score.num_pairs:>6}"
            f"{old.reward:>9.3f} ->{new.reward:>6.3f}{new.reward - old.reward:>+9.3f}"
            f"{old.strict_pass_rate:>8.1%} ->{new.strict_pass_rate:>7.1%}"
            f"{100 * (new.strict_pass_rate - old.strict_pass_rate):>+9.1f}"
            f"{score.improved:>10.1%}{score.worsened:>10.1%}{score.unchanged:>11.1%}"
            f"{score.fixed:>8.1%}{score.broken:>8.1%}"
        )
    return "\n".join(lines)


def comparison_table(before: Evaluation, after: Evaluation) -> str:
    """A plain-text table of two evaluations of the same rows."""
    header = f"{'category':<20}{'n':>6}{'reward':>18}{'':>9}{'strict pass':>18}{'':>9}"
    lines = [header, "-" * len(header)]
    pairs = [(name, score, after.categories[name]) for name, score in before.categories.items()]
    for name, old, new in [*pairs, ("all", before.total, after.total)]:
        lines.append(
            f"{name:<20}{old.num_samples:>6}"
            f"{old.reward:>9.3f} ->{new.reward:>6.3f}{new.reward - old.reward:>+9.3f}"
            f"{old.strict_pass_rate:>8.1%} ->{new.strict_pass_rate:>7.1%}"
            f"{100 * (new.strict_pass_rate - old.strict_pass_rate):>+9.1f}"
        )
    return "\n".join([*lines[:-1], "-" * len(header), lines[-1]])
