# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from reward_models.dvreward import DVReward
from reward_models.evaluation.evaluate import evaluate
from reward_models.evaluation.samples import Evaluation
from reward_models.evaluation.scores import StopRates
from reward_models.evaluation.store import EvaluationStore
from reward_models.evaluation.text_tables import comparison_table, refinement_table
from reward_models.judges import Judge
from support.stopping import stop_after


CONFIG = RolloutConfig(
    height=24,
    width=24,
    max_new_tokens=6,
    denoising=DenoisingConfig(num_timesteps=3, guidance=GuidanceConfig(text_scale=2.0)),
)
# P(yes) to the two questions of each row; what has no answer cannot be scored.
ANSWERS = {"a": (0.9, 0.4), "b": (0.5, 1.0), "c": (0.8, None), "d": (0.2, 0.5), "e": (None, None)}
CATEGORIES = {"a": "one", "b": "two", "c": "one", "d": "one", "e": "three"}


class TableJudge(Judge):
    """Answers from a table of P(yes) by row and side."""

    async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
        return [ANSWERS[name][int(side)] for name, side in (question.split() for question in questions)]


def make_row(name: str) -> dict[str, Any]:
    return {
        "prompt": f"a red circle and a blue square {name}",
        "semantic_questions": [{"question": f"{name} 0", "tag": "Count"}],
        "quality_questions": [{"question": f"{name} 1", "tag": "Geometry"}],
        "category": CATEGORIES[name],
    }


ROWS = [make_row(name) for name in ANSWERS]


@pytest.fixture(scope="module")
def run(make_shapes_bagel: Callable[[], BagelModel], shapes_processor: BagelProcessor) -> Callable[..., Evaluation]:
    generate = RolloutGenerator(make_shapes_bagel(), shapes_processor, TASKS.get("reasoning_t2i")(think=True))

    def run(rows: list[dict[str, Any]] = ROWS, **kwargs: Any) -> Evaluation:
        return evaluate(generate, rows, CONFIG, DVReward(TableJudge()), **kwargs)

    return run


@pytest.fixture(scope="module")
def evaluation(run: Callable[..., Evaluation]) -> Evaluation:
    return run(seeds=(0, 1))


def pixels(evaluation: Evaluation) -> np.ndarray:
    return np.stack([np.asarray(sample.image) for sample in evaluation.samples]).astype(int)


def test_every_prompt_is_painted_with_every_seed(evaluation: Evaluation) -> None:
    assert [(s.seed, s.index) for s in evaluation.samples] == [(seed, i) for seed in (0, 1) for i in range(5)]
    assert [s.prompt for s in evaluation.samples] == [row["prompt"] for row in ROWS] * 2
    images = pixels(evaluation)
    assert (np.abs(images[:5] - images[5:]).mean(axis=(1, 2, 3)) > 1).all()


@pytest.mark.invariant
@pytest.mark.parametrize("batch_size", [128, 3, 1])
def test_samples_are_paired_whatever_the_batch(
    run: Callable[..., Evaluation], evaluation: Evaluation, batch_size: int
) -> None:
    other = run(seeds=(0, 1), batch_size=batch_size)
    assert [s.text for s in other.samples] == [s.text for s in evaluation.samples]
    assert [s.reward for s in other.samples] == [s.reward for s in evaluation.samples]
    # Rounding may move a value across the border between two eight-bit levels.
    assert np.abs(pixels(other) - pixels(evaluation)).max() <= 1


def test_noise_belongs_to_seed_and_row(run: Callable[..., Evaluation], evaluation: Evaluation) -> None:
    only = run(seeds=(1,))
    assert [s.text for s in only.samples] == [s.text for s in evaluation.samples[5:]]


def test_categories_equal_hand_computation(evaluation: Evaluation) -> None:
    one, two, three, total = (*(evaluation.categories[name] for name in ("one", "two", "three")), evaluation.total)
    assert list(evaluation.categories) == ["one", "two", "three"]
    # Rows a and d can be scored, row c cannot; each is painted twice.
    assert one.reward == pytest.approx(((0.9 * 0.4) ** 0.5 + (0.2 * 0.5) ** 0.5) / 2)
    assert (one.strict_pass_rate, one.num_samples, one.num_failed) == (0.0, 4, 2)
    assert two.reward == pytest.approx(0.5**0.5)
    assert (two.strict_pass_rate, two.num_samples, two.num_failed) == (1.0, 2, 0)
    assert (three.num_samples, three.num_failed) == (0, 2)
    assert total.reward == pytest.approx(((0.9 * 0.4) ** 0.5 + (0.2 * 0.5) ** 0.5 + 0.5**0.5) / 3)
    assert total.strict_pass_rate == pytest.approx(1 / 3)
    assert (total.num_samples, total.num_failed) == (6, 4)


def test_failed_judgement_is_not_a_reward_of_zero(evaluation: Evaluation) -> None:
    failed = [sample for sample in evaluation.samples if sample.index in (2, 4)]
    assert [(s.reward, s.strict_pass) for s in failed] == [(None, None)] * 4


def test_summary_holds_total_and_categories(evaluation: Evaluation) -> None:
    summary = evaluation.summary()
    assert summary["reward"] == evaluation.total.reward
    assert summary["categories"]["one"]["num_failed"] == 2


def test_rows_without_category_form_one(run: Callable[..., Evaluation]) -> None:
    rows = [{key: value for key, value in row.items() if key != "category"} for row in ROWS[:2]]
    assert list(run(rows, seeds=(0,)).categories) == ["all"]


def test_table_shows_the_difference(evaluation: Evaluation) -> None:
    better = Evaluation(
        [replace(s, reward=s.reward and s.reward + 0.25, strict_pass=True) for s in evaluation.samples]
    )
    lines = {line.split()[0]: line for line in comparison_table(evaluation, better).splitlines()}
    assert {"one", "two", "three", "all"} <= lines.keys()
    assert "+0.250" in lines["one"] and "+100.0" in lines["one"]
    assert "+0.0" in lines["two"]


def test_an_image_that_is_kept_stays_as_it_is(
    run: Callable[..., Evaluation],
    make_shapes_bagel: Callable[[], BagelModel],
    shapes_processor: BagelProcessor,
    evaluation: Evaluation,
    tmp_path: Path,
) -> None:
    model, reward = make_shapes_bagel(), DVReward(TableJudge())

    def refine(initial: Evaluation, *stops: str, store: EvaluationStore | None = None) -> Evaluation:
        task = stop_after(TASKS.get("self_reflection")(think=True), *stops)
        generate = RolloutGenerator(model, shapes_processor, task)
        return evaluate(generate, ROWS, CONFIG, reward, (0, 1), 4, initial=initial, store=store)

    free = refine(evaluation)
    texts = [sample.text for sample in free.samples]
    with EvaluationStore(tmp_path, "digest") as store:
        first = refine(evaluation, texts[0], texts[7], store=store)
    kept = [text in (texts[0], texts[7]) for text in texts]
    assert 0 < sum(kept) < 10 and [sample.is_kept for sample in first.samples] == kept
    second = refine(first)
    for old, new, later, other in zip(evaluation.samples, first.samples, second.samples, free.samples, strict=True):
        assert new.text == other.text
        if not new.is_kept:
            assert not later.is_kept
            continue
        assert (new.reward, new.strict_pass, new.semantic) == (old.reward, old.strict_pass, old.semantic)
        assert (np.asarray(new.load_image()) == np.asarray(old.load_image())).all()
        assert later.is_kept and later.text == new.text and later.reward == new.reward
    rates = StopRates.from_evaluations(evaluation, first)
    scored = [i for i, sample in enumerate(evaluation.samples) if sample.reward is not None]
    right = [i for i in scored if evaluation.samples[i].strict_pass]
    wrong = [i for i in scored if not evaluation.samples[i].strict_pass]
    assert rates.right_kept == pytest.approx(np.mean([kept[i] for i in right]))
    assert rates.wrong_kept == pytest.approx(np.mean([kept[i] for i in wrong]))
    # The judge's answers are about the prompt alone.
    assert (rates.broken, rates.fixed) == (0.0, 0.0)
    table = refinement_table({"round 1": (evaluation, first)})
    assert f"{rates.right_kept:.1%}" in table and "of right: kept" in table
    assert "of right: kept" not in refinement_table({"round 1": (evaluation, free)})
