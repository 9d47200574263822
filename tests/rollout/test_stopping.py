# SPDX-License-Identifier: Apache-2.0

"""Stops at inference: by the words of a reflection, or by a threshold on the probability of its verdict."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from PIL import Image

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator, refine
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.rollout.pipeline import UnifiedPipeline
from alphagrpo_ext.rollout.stopping import best_threshold, keep_probabilities, verdict_choice, with_threshold
from alphagrpo_ext.shapes.scene import Scene, SceneObject
from alphagrpo_ext.shapes.text import reflection
from alphagrpo_ext.trajectory import TextSegment


RIGHT = Scene((SceneObject(0, 0, "circle", "red"),), "white")
WRONG = replace(RIGHT, background="gray")
KEEP, REPAINT = reflection(RIGHT, RIGHT), reflection(WRONG, RIGHT)
ROWS = [{"prompt": "a red circle", "image": Image.new("RGB", (24, 24), color)} for color in ("red", "blue")]
CONFIG = RolloutConfig(24, 24, max_new_tokens=4, denoising=DenoisingConfig(3, 1.0, GuidanceConfig(text_scale=1.0)))


@pytest.fixture(scope="module")
def model(make_shapes_bagel: Callable[[], BagelModel]) -> BagelModel:
    return make_shapes_bagel()


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, shapes_processor: BagelProcessor) -> Callable[..., None]:
    """Lets the policy write given texts, in this order."""

    def written(*texts: str) -> None:
        remaining = list(texts)

        def write(self: RolloutGenerator, cache: object, generators: list, config: object) -> list[TextSegment]:
            ids = [shapes_processor.encode_text(remaining.pop(0)) for _ in generators]
            return [TextSegment(own, sampled=True, ended=False, log_probs=[0.0] * len(own)) for own in ids]

        monkeypatch.setattr(RolloutGenerator, "_write", write)

    return written


def sampled(text: str, processor: BagelProcessor) -> TextSegment:
    return TextSegment(processor.encode_text(text), sampled=True, ended=False)


def test_a_verdict_is_told_by_its_first_token_that_differs(shapes_processor: BagelProcessor) -> None:
    ids = shapes_processor.tokenizer.get_vocab()
    for text in (KEEP, REPAINT):
        choice = verdict_choice(sampled(text, shapes_processor), shapes_processor)
        assert choice.prefix_ids == [ids["<think>"]]
        assert (choice.keep_id, choice.repaint_id) == (ids["nothing"], ids["wrong"])
    assert verdict_choice(sampled("red circle", shapes_processor), shapes_processor) is None


def test_probabilities_are_those_of_the_policy(model: BagelModel, shapes_processor: BagelProcessor) -> None:
    task = TASKS.get("self_reflection")(think=True, allow_stop=True)
    contexts = [task.context(row, shapes_processor, model, CONFIG.size) for row in ROWS]
    texts = [sampled(text, shapes_processor) for text in (REPAINT, KEEP)]
    together = keep_probabilities(model, shapes_processor, [*contexts, contexts[0]], [*texts, TextSegment([0])])
    assert together[2] is None
    ids = shapes_processor.tokenizer.get_vocab()
    for context, probability in zip(contexts, together, strict=False):
        options = [
            TextSegment([ids["<think>"], ids[word]], sampled=True, ended=False) for word in ("nothing", "wrong")
        ]
        keep, repaint = (values[-1].exp() for values in model.text_log_probs([context] * 2, options))
        assert probability == pytest.approx((keep / (keep + repaint)).item(), abs=1e-5)
    assert together[0] != pytest.approx(together[1], abs=1e-4)


@pytest.mark.parametrize("rounds", [1, 3])
def test_words_stop(
    model: BagelModel, shapes_processor: BagelProcessor, written: Callable[..., None], rounds: int
) -> None:
    texts = [KEEP, REPAINT] + [KEEP] * (rounds > 1)
    written(*texts)
    first, second = refine(model, shapes_processor, ROWS, CONFIG, num_rounds=rounds, allow_stop=True)
    assert first.verdict == KEEP and len(first.steps) == 1
    assert second.steps[-1].text == REPAINT and len(second.steps) == 2
    assert second.verdict == (KEEP if rounds > 1 else None)
    written(KEEP, REPAINT)
    assert [len(r.steps) for r in refine(model, shapes_processor, ROWS, CONFIG)] == [2, 2]


def test_a_threshold_stops_whatever_the_words_say(
    model: BagelModel, shapes_processor: BagelProcessor, written: Callable[..., None]
) -> None:
    task = TASKS.get("self_reflection")(think=True, allow_stop=True)
    contexts = [task.context(row, shapes_processor, model, CONFIG.size) for row in ROWS]
    sure = keep_probabilities(model, shapes_processor, contexts, [sampled(REPAINT, shapes_processor)] * 2)
    between = sum(sure) / 2
    for threshold, expected in ((0.0, [True, True]), (between, [p > between for p in sure]), (1.0, [False, False])):
        written(REPAINT, KEEP)
        results = refine(model, shapes_processor, ROWS, CONFIG, allow_stop=True, stop_threshold=threshold)
        assert [result.verdict is not None for result in results] == expected
    # Without a verdict there is nothing to keep.
    written("red circle", "red circle")
    results = refine(model, shapes_processor, ROWS, CONFIG, allow_stop=True, stop_threshold=0.0)
    assert [result.verdict for result in results] == [None, None]


def test_the_pipeline_finds_the_threshold_of_the_model(
    model: BagelModel, shapes_processor: BagelProcessor, written: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = {**CONFIG.to_settings(), "task": "self_reflection"}
    monkeypatch.setattr(model.config, "sampling", with_threshold(sampling, 0.0), raising=False)
    pipe = UnifiedPipeline(model, shapes_processor)

    def stops(**options: float | bool) -> bool:
        written(REPAINT)
        output = pipe("a red circle", image=ROWS[0]["image"], num_rounds=1, **options)
        return output.refinements[0].verdict is not None

    assert (stops(), stops(allow_stop=True), stops(allow_stop=True, stop_threshold=1.0)) == (False, True, False)


def test_the_best_threshold_is_the_one_with_which_most_images_pass() -> None:
    sure = [0.9, 0.7, 0.4, 0.2, None]
    assert best_threshold(sure, [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]) == pytest.approx(0.55)
    assert best_threshold(sure, [1] * 5, [0] * 5) == 0.0
    assert best_threshold(sure, [0] * 5, [1] * 5) == 1.0
    # Nothing to gain means that nothing is kept.
    assert best_threshold(sure, [1] * 5, [1] * 5) == 1.0
    with pytest.raises(ValueError, match="calibrated on images"):
        best_threshold([], [], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allow_stop": True, "stop_threshold": 1.5}, "stop_threshold must be in"),
        ({"stop_threshold": 0.5}, "stop_threshold=0.5 needs allow_stop"),
    ],
)
def test_bad_thresholds_are_refused(
    model: BagelModel, shapes_processor: BagelProcessor, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        refine(model, shapes_processor, ROWS, CONFIG, **options)


def test_the_verdicts_of_a_released_bagel_are_asked_for(shapes_processor: BagelProcessor) -> None:
    processor = BagelProcessor(shapes_processor.tokenizer)
    request = processor.reflection_request("a cat", may_stop=True)
    assert all(verdict in request for verdict in (processor.keep_verdict, processor.repaint_verdict))
    assert "<done/>" not in processor.reflection_request("a cat")
    assert processor.is_done("<think> fine </think> <done/>") and not processor.is_done("<think> fine </think>")
