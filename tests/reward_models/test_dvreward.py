# SPDX-License-Identifier: Apache-2.0
import asyncio
import json
import logging
import random
import threading
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from PIL import Image
from trl import GRPOTrainer
from trl.trainer.utils import get_callable_name, is_async_callable

from alphagrpo_ext.registry import UnknownNameError
from alphagrpo_ext.report.answers import parse_answers
from alphagrpo_ext.shapes.prompts import (
    quality_questions,
    sample_prompt,
    sample_scene,
    sample_spec,
    sample_violation,
    semantic_questions,
)
from alphagrpo_ext.shapes.scene import render
from reward_models.dvreward import DVReward, JudgeFailedError, Score, batch_metrics, judge_metrics
from reward_models.judges import Judge
from reward_models.prompts.questions import from_row


def make_image(value):
    return Image.new("RGB", (2, 2), (value, 0, 0))


def make_row(semantic=("Count",), quality=("Geometry",)):
    def questions(side, tags):
        return [{"question": f"{side} {index}?", "tag": tag} for index, tag in enumerate(tags)]

    return {
        "prompt": "a prompt",
        "semantic_questions": questions("semantic", semantic),
        "quality_questions": questions("quality", quality),
    }


def call(reward, images, rows, **kwargs):
    return asyncio.run(
        reward(
            [row["prompt"] for row in rows],
            ["a thought"] * len(rows),
            images=images,
            semantic_questions=[row["semantic_questions"] for row in rows],
            quality_questions=[row["quality_questions"] for row in rows],
            **kwargs,
        )
    )


class RedJudge(Judge):
    """P(yes) is the amount of red, for every question."""

    async def answer(self, image, questions):
        return [image.getpixel((0, 0))[0] / 255] * len(questions)


class TableJudge(Judge):
    """Looks the answers up by the amount of red; an exception among them is raised."""

    def __init__(self, table):
        self.table = table
        self.asked = []

    async def answer(self, image, questions):
        self.asked.append(list(questions))
        answers = self.table[image.getpixel((0, 0))[0]]
        if isinstance(answers, BaseException):
            raise answers
        return answers


class SlowJudge(RedJudge):
    """Answers dark images last, and counts how many calls are under way."""

    def __init__(self, unit=0.002):
        self.unit = unit
        self.running = self.peak = 0

    async def answer(self, image, questions):
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await asyncio.sleep(self.unit * (10 - image.getpixel((0, 0))[0]))
            return await super().answer(image, questions)
        finally:
            self.running -= 1


def test_trl_sees_an_async_function_with_our_name():
    assert is_async_callable(DVReward(RedJudge()))
    assert get_callable_name(DVReward(RedJudge())) == "dvreward"
    assert get_callable_name(DVReward(RedJudge(), name="fine")) == "fine"


def test_trl_computes_rewards_with_it():
    reward = DVReward(TableJudge({0: [0.25, 1.0], 1: ConnectionError("down"), 2: [1.0, 1.0]}))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    metrics, extra = defaultdict(list), defaultdict(list)
    trainer = SimpleNamespace(
        accelerator=PartialState(),
        args=SimpleNamespace(report_to=[]),
        state=SimpleNamespace(global_step=0),
        environments=None,
        reward_funcs=[reward],
        reward_processing_classes=[None],
        reward_func_names=[get_callable_name(reward)],
        async_loop=loop,
        _log_completion_extra=lambda column, values: extra[column].extend(values),
        _log_metric=lambda name, value: metrics[name].append(value),
    )
    inputs = [{**make_row(), "images": [make_image(value)]} for value in range(3)]
    try:
        rewards = GRPOTrainer._calculate_rewards(
            trainer, inputs, [row["prompt"] for row in inputs], ["a thought"] * 3, [[1], [2], [3]]
        )
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    assert rewards.shape == (3, 1)
    torch.testing.assert_close(rewards[:, 0].cpu(), torch.tensor([0.5, torch.nan, 1.0]), equal_nan=True)
    assert metrics["dvreward/semantic"] == [pytest.approx(0.625)]
    assert metrics["judge/failed_frac"] == [pytest.approx(1 / 3)]
    assert extra["dvreward/semantic"] == [0.25, None, 1.0]


def test_order_is_kept_and_concurrency_is_bounded_and_used():
    judge = SlowJudge()
    images = [make_image(value) for value in range(10)]
    rewards = call(DVReward(judge, max_concurrency=3), images, [make_row()] * 10)
    assert rewards == pytest.approx([value / 255 for value in range(10)])
    assert judge.peak == 3


def test_concurrency_bound_holds_across_calls_and_the_object_outlives_its_event_loop():
    judge = SlowJudge()
    reward = DVReward(judge, max_concurrency=2)
    images, records = [make_image(value) for value in range(4)], [from_row(make_row())] * 4

    async def score_twice():
        return await asyncio.gather(reward.score(images, records), reward.score(images, records))

    for _ in range(2):
        first, second = asyncio.run(score_twice())
        assert first == second
        assert [score.reward for score in first] == pytest.approx([value / 255 for value in range(4)])
    assert judge.peak == 2


def test_failures_are_none_and_never_zero():
    nan = float("nan")
    table = {
        0: [0.0, 0.0],
        1: [None, 1.0],
        2: RuntimeError("broken"),
        3: [1.0],
        4: [1.5, 1.0],
        5: [nan, 1.0],
        6: None,
        7: [1.0, 1.0],
    }
    rewards = call(
        DVReward(TableJudge(table), max_failed_frac=1.0), [make_image(value) for value in range(8)], [make_row()] * 8
    )
    assert rewards == [0.0, None, None, None, None, None, None, 1.0]


def test_timeout_is_a_failure_of_the_one_image():
    reward = DVReward(SlowJudge(unit=1), timeout=0.5)
    assert call(reward, [make_image(0), make_image(10)], [make_row()] * 2) == [None, pytest.approx(10 / 255)]


def test_waiting_for_a_free_slot_does_not_count_as_time_out():
    reward = DVReward(SlowJudge(unit=0.01), max_concurrency=1, timeout=0.6)
    rewards = call(reward, [make_image(0)] * 8, [make_row()] * 8)
    assert rewards == [0.0] * 8


def test_each_kind_of_error_is_logged_once_with_its_cause(caplog):
    judge = TableJudge({0: ConnectionError("no route"), 1: KeyError("choices"), 2: ConnectionError("refused")})
    reward = DVReward(judge, max_failed_frac=1.0)
    with caplog.at_level(logging.WARNING, logger="reward_models.dvreward"):
        for _ in range(2):
            assert call(reward, [make_image(value) for value in range(3)], [make_row()] * 3) == [None] * 3
    assert [record.exc_info[1] for record in caplog.records] == [judge.table[0], judge.table[1]]
    assert "TableJudge" in caplog.messages[0] and "ConnectionError: no route" in caplog.messages[0]


def test_cancellation_reaches_the_judge_and_the_caller():
    judge = SlowJudge(unit=10)
    started, cancelled = [], []

    async def run():
        task = asyncio.create_task(DVReward(judge).score([make_image(0), make_image(0)], [from_row(make_row())] * 2))
        while judge.running < 2:
            await asyncio.sleep(0)
        started.append(judge.running)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            cancelled.append(judge.running)

    asyncio.run(asyncio.wait_for(run(), timeout=5))
    assert started == [2]
    assert cancelled == [0]


def test_cancellation_inside_a_judge_is_not_taken_for_a_failure():
    reward = DVReward(TableJudge({0: asyncio.CancelledError()}))
    with pytest.raises(asyncio.CancelledError):
        call(reward, [make_image(0)], [make_row()])


def test_an_image_that_is_missing_is_not_judged():
    judge = TableJudge({9: [1.0, 1.0]})
    rewards = call(DVReward(judge), [None, [make_image(9)], [], [None]], [make_row()] * 4)
    assert rewards == [None, 1.0, None, None]
    assert len(judge.asked) == 1


def test_only_valid_questions_are_asked_semantic_first():
    row = make_row(semantic=("Count", "Style", "Text"), quality=("Geometry", "Texture"))
    row["semantic_questions"][1]["is_valid"] = False
    row["quality_questions"] = json.dumps(row["quality_questions"])
    judge = TableJudge({0: [0.9, 0.7, 0.5, 0.3]})
    (score,) = asyncio.run(DVReward(judge, aggregation="pooled").score([make_image(0)], [from_row(row)]))
    assert judge.asked == [["semantic 0?", "semantic 2?", "quality 0?", "quality 1?"]]
    assert score.semantic == (0.9, 0.7)
    assert score.quality == (0.5, 0.3)
    assert score.reward == pytest.approx(0.6)
    assert score.strict_pass is False


def test_metrics_against_hand_computation():
    rows = [
        make_row(semantic=("Count", "Count", "Spatial"), quality=("Geometry",)),
        make_row(semantic=("Count",), quality=()),
        make_row(semantic=("Count", "Text"), quality=("Geometry",)),
        make_row(semantic=("Style",), quality=("Texture",)),
    ]
    judge = TableJudge({0: [1.0, 0.3, 0.5, 0.8], 1: [0.9], 2: [0.1, None, 0.7], 3: RuntimeError("broken")})
    metrics, extra = {}, {}
    rewards = call(
        DVReward(judge, name="fine"),
        [make_image(value) for value in range(4)],
        rows,
        log_metric=metrics.__setitem__,
        log_extra=extra.__setitem__,
    )
    assert rewards == [pytest.approx((0.6 * 0.8) ** 0.5), pytest.approx(0.9), None, None]
    about_judge = {name: metrics.pop(name) for name in list(metrics) if name.startswith("judge/")}
    assert about_judge["judge/failed_frac"] == 2 / 4
    assert 0 < about_judge["judge/latency_p50"] <= about_judge["judge/latency_p99"]
    assert about_judge["judge/questions_per_second"] > 0
    assert metrics == pytest.approx(
        {
            "fine/strict_pass": 1 / 2,
            "fine/semantic": (0.6 + 0.9) / 2,
            "fine/quality": 0.8,
            "fine/semantic/Count": 2 / 4,
            "fine/semantic/Spatial": 1.0,
            "fine/quality/Geometry": 2 / 2,
        }
    )
    answers = [[answer.p_yes for answer in parse_answers(text)] for text in extra.pop("fine/answers")]
    assert answers == [[1.0, 0.3, 0.5, 0.8], [0.9], [0.1, None, 0.7], [None, None]]
    assert extra == {
        "fine/semantic": [pytest.approx(0.6), pytest.approx(0.9), None, None],
        "fine/quality": [pytest.approx(0.8), None, pytest.approx(0.7), None],
    }


def test_a_tag_of_ones_own_is_logged_as_it_is():
    metrics, extra = {}, {}
    rows = [make_row(("Brand colour", "size/large"), ("Brand colour",))]
    call(DVReward(RedJudge()), [make_image(255)], rows, log_metric=metrics.__setitem__, log_extra=extra.__setitem__)
    named = {"dvreward/semantic/Brand colour", "dvreward/semantic/size/large", "dvreward/quality/Brand colour"}
    assert {name: metrics.get(name) for name in named} == dict.fromkeys(named, 1.0)
    (text,) = extra["dvreward/answers"]
    assert [answer.tag for answer in parse_answers(text)] == ["Brand colour", "size/large", "Brand colour"]


def test_metrics_of_a_batch_in_which_everything_failed():
    records = [from_row(make_row())] * 2
    scores = asyncio.run(DVReward(RedJudge()).score([None, None], records))
    assert batch_metrics(scores, records) == {}
    assert judge_metrics(scores) == {"failed_frac": 1.0}


def test_metrics_of_the_judge_against_hand_computation():
    def score(asked_at, answered_at, *answers):
        reward = None if None in answers else 1.0
        return Score(reward, answers, (), None, asked_at=asked_at, answered_at=answered_at)

    scores = [
        score(10.0, 11.0, 1.0, 1.0),
        score(10.5, 13.5, 1.0, None),
        score(12.0, 14.0, 1.0),
        score(None, None, None),
    ]
    assert judge_metrics(scores) == pytest.approx(
        {
            "failed_frac": 2 / 4,
            "latency_p50": 2.0,
            "latency_p99": 2.98,
            # Four answers from second 10 to second 14.
            "questions_per_second": 1.0,
        }
    )


def test_more_failures_than_allowed_raise():
    judge = TableJudge({0: [1.0, 1.0], 1: ConnectionError("down"), 2: ConnectionError("down")})
    images, rows = [make_image(value) for value in range(3)], [make_row()] * 3
    with pytest.raises(JudgeFailedError, match=r"left 2 of 3 images .*=0.5 allows \(ConnectionError: down\)"):
        call(DVReward(judge), images, rows)
    assert call(DVReward(judge, max_failed_frac=0.7), images, rows) == [1.0, None, None]
    # What was never painted is no failure of the judge.
    assert call(DVReward(RedJudge()), [make_image(255), None, None], rows) == [1.0, None, None]


def test_images_that_are_under_way_are_not_asked_about_again():
    judge = TableJudge({value: [value / 255] * 2 for value in range(4)})
    images, rows = [make_image(value) for value in range(4)], [make_row()] * 4
    records = [from_row(row) for row in rows]

    async def run():
        reward = DVReward(judge)
        await reward.start(images[:2], rows[:2])
        # The judge works while nobody waits for it.
        await asyncio.sleep(0.05)
        assert len(judge.asked) == 2
        # One that was started is not asked for, and another has other questions.
        other = from_row(make_row(semantic=("Text",)))
        scores = await reward.score([images[1], images[2]], [records[1], records[2]])
        assert [score.reward for score in scores] == pytest.approx([1 / 255, 2 / 255])
        assert len(judge.asked) == 3
        await reward.start([images[3]], [rows[3]])
        await reward.score([images[3]], [other])
        await reward.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
    assert len(judge.asked) <= 5


def test_one_image_of_several_samples_is_judged_once():
    judge = TableJudge({0: [1.0, 1.0], 1: [0.0, 1.0]})
    kept, painted = make_image(0), make_image(1)
    images, rows = [kept, painted, kept, None, None], [make_row()] * 5

    async def run(starts: bool):
        reward = DVReward(judge)
        if starts:
            await reward.start(images, rows)
        scores = await reward.score(images, [from_row(row) for row in rows])
        await reward.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return [score.reward for score in scores]

    for starts in (False, True):
        judge.asked.clear()
        assert asyncio.run(run(starts)) == [1.0, 0.0, 1.0, None, None]
        assert len(judge.asked) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": 3}, "judge must be a Judge"),
        ({"max_concurrency": 0}, "max_concurrency must be at least 1, but is 0"),
        ({"timeout": 0.0}, "timeout must be positive, but is 0.0"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        DVReward(**{"judge": RedJudge(), **changes})


def test_unknown_names_fail_when_the_reward_is_made():
    with pytest.raises(UnknownNameError, match="unknown judge 'shape'. Did you mean 'shapes'"):
        DVReward("shape")
    with pytest.raises(UnknownNameError, match="unknown aggregation 'man'. Did you mean 'mean'"):
        DVReward(RedJudge(), aggregation="man")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([make_image(0)], "images has 1 entries for 2 prompts"),
        ([make_image(0), [make_image(0)] * 2], r"images\[1\] holds 2 images"),
        (["a.png", make_image(0)], r"images\[0\] must be a PIL image or None, got str"),
    ],
)
def test_bad_images_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        call(DVReward(RedJudge()), images, [make_row()] * 2)


def test_bad_questions_name_the_sample():
    bad = make_row(semantic=("two\nlines",))
    with pytest.raises(ValueError, match=r"sample 1: semantic_questions\[0\]: 'tag' holds a character"):
        call(DVReward(RedJudge()), [make_image(0)] * 2, [make_row(), bad])


def test_shapes_judge_rewards_right_images_and_not_wrong_ones():
    rng = random.Random(0)
    records, right, wrong = [], [], []
    for _ in range(40):
        spec = sample_spec(rng, "train")
        scene = sample_scene(spec, rng)
        row = {
            "prompt": sample_prompt(spec, rng),
            "semantic_questions": semantic_questions(spec),
            "quality_questions": quality_questions(),
        }
        records.append(from_row(row))
        right.append(render(scene))
        wrong.append(render(sample_violation(scene, spec, rng)))
    reward = DVReward("shapes")
    right_scores = asyncio.run(reward.score(right, records))
    wrong_scores = asyncio.run(reward.score(wrong, records))
    for good, bad in zip(right_scores, wrong_scores, strict=True):
        assert good.strict_pass is True and bad.strict_pass is False
        assert good.reward > 0.9 and good.reward > bad.reward


def test_shapes_judge_gives_none_for_what_it_cannot_judge():
    row = make_row()
    row["quality_questions"] = quality_questions()
    image = Image.new("RGB", (24, 24))
    (unknown_question,) = asyncio.run(DVReward("shapes").score([image], [from_row(row)]))
    assert unknown_question.reward is None
    assert unknown_question.semantic == (None,) and None not in unknown_question.quality
    row["semantic_questions"] = []
    rewards = call(DVReward("shapes"), [image, image.resize((32, 32))], [row] * 2)
    assert rewards[0] is not None and rewards[1] is None


def test_validate_dataset_names_the_row():
    reward = DVReward(RedJudge())
    rows = [make_row() for _ in range(4)]
    reward.validate_dataset(rows)
    del rows[2]["quality_questions"][0]["question"]
    with pytest.raises(ValueError, match="row 2.*quality_questions.*question"):
        reward.validate_dataset(rows)


def test_an_image_size_that_the_judge_cannot_read_is_refused_before_training():
    reward = DVReward("shapes")
    reward.validate_image_size(24, 24)
    with pytest.raises(ValueError, match="24 x 24.*image_height x image_width is 20 x 24"):
        reward.validate_image_size(20, 24)
