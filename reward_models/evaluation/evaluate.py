# SPDX-License-Identifier: Apache-2.0

"""Paint prompts with a policy and score the images: mean reward and strict pass rate, over all prompts and by category."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
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
    Paint every prompt with every noise seed and score the images. Two policies that are evaluated on the same rows and seeds
    start from the same noise, so that their scores are paired.

    Several processes share the work, and each of them returns the whole evaluation.

    Args:
        generator ([`RolloutGenerator`]): The policy.
        rows (`Sequence[Mapping[str, Any]]`): Rows with `prompt`, questions, and optionally `category`.
        config ([`RolloutConfig`]): Sampling settings.
        reward ([`DVReward`]): The reward.
        seeds (`Sequence[int]`, *optional*, defaults to `(0, 1)`): Noise seeds.
        batch_size (`int`, *optional*, defaults to `128`): Samples per batch.
        description (`str`, *optional*, defaults to `"evaluation"`): Label of the progress bar.
        initial ([`Evaluation`], *optional*):
            An evaluation of the same rows and seeds. The policy refines its images, but for those that it kept already. An
            image that it keeps has the score that it had.
        store ([`EvaluationStore`], *optional*):
            An open store. It keeps every scored batch, and batches that it already holds are not painted again.

    Raises:
        [`~reward_models.dvreward.JudgeFailedError`]:
            If there is a store, and the judge leaves more images of a batch without a score than it may. The batch is not
            kept.
    """
    num_rounds = 0 if initial is None else initial.round + 1
    initial_samples = {} if initial is None else {(sample.seed, sample.index): sample for sample in initial.samples}
    work = share_of_work(len(rows), seeds)
    samples: list[EvaluatedSample] = []
    progress = tqdm(total=len(work), desc=description, disable=not PartialState().is_main_process)
    # All batches share one event loop, so that the judge keeps its connections.
    with asyncio.Runner() as runner:
        for start in range(0, len(work), batch_size):
            places = work[start : start + batch_size]
            scored = store.samples(start) if store is not None else None
            if scored is None:
                started = [initial_samples.get(place) for place in places]
                scored = _score_batch(
                    generator, rows, places, started, config, reward, num_rounds, runner, store is not None
                )
                if store is not None:
                    scored = store.keep(start, scored)
            samples += scored
            progress.update(len(places))
        runner.run(reward.aclose())
    progress.close()
    return gather_samples(samples, num_rounds)


def _score_batch(
    generator: RolloutGenerator,
    rows: Sequence[Mapping[str, Any]],
    places: Sequence[tuple[int, int]],
    started: Sequence[EvaluatedSample | None],
    config: RolloutConfig,
    reward: DVReward,
    num_rounds: int,
    runner: asyncio.Runner,
    check_failures: bool,
) -> list[EvaluatedSample]:
    """
    Paint and score a batch. `places` has the noise seed and the row index of each sample, and `started` the sample that is
    refined, if there is one.
    """
    result = {place: old.kept(old.text) for place, old in zip(places, started, strict=True) if old and old.is_kept}
    is_open = [place not in result for place in places]
    sources = dict(itertools.compress(zip(places, started, strict=True), is_open))
    batch = [{**rows[index], "image": old.load_image()} if old else rows[index] for (_, index), old in sources.items()]
    generators = [sample_generator(f"eval-{seed}", num_rounds, index) for seed, index in sources]
    trajectories = dict(zip(sources, generator(batch, generators, config), strict=True))
    texts = {place: generator.processor.decode_sampled(t.sampled_texts) for place, t in trajectories.items()}
    painted = {place: t.final_image for place, t in trajectories.items() if t.sampled_images or not sources[place]}
    records = [from_row(rows[index], where=f"row {index}") for _, index in painted]
    scores = runner.run(reward.score(list(painted.values()), records))
    if check_failures:
        # A kept batch is final, so it must not record that the judge was unreachable for a while.
        reward.check_failures(scores)
    for place, score in zip(painted, scores, strict=True):
        seed, index = place
        result[place] = EvaluatedSample.from_score(rows[index], index, seed, texts[place], painted[place], score)
    for place in sources.keys() - painted.keys():
        result[place] = sources[place].kept(texts[place])
    return [result[place] for place in places]


def share_of_work(num_rows: int, seeds: Sequence[int]) -> list[tuple[int, int]]:
    """The samples that this process paints, as pairs of noise seed and row index."""
    state = PartialState()
    # With a stride, no process gets all the long prompts of a sorted list.
    return [(seed, index) for seed in seeds for index in range(num_rows)][state.process_index :: state.num_processes]
