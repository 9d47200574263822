# SPDX-License-Identifier: Apache-2.0

import asyncio
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from reward_models import DVReward, PromptRecord, Question
from reward_models.arguments import RewardArguments
from reward_models.dvreward import JudgeFailedError
from reward_models.endpoints.endpoint import OpenAIEndpoint
from reward_models.judges.openai import OpenAIJudge, png_bytes
from support.faulty_endpoint import Faults, faulty_endpoint, true_probability


QUESTIONS = ["Is there a cat?", "Is the cat red?", "Is the light right?", "Is the cat whole?"]


def make_images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]


def expected(image: Image.Image, question: str) -> float:
    return true_probability(hashlib.sha256(png_bytes(image)).hexdigest(), question)


def record(questions: list[str]) -> PromptRecord:
    return PromptRecord("a cat", tuple(Question(question, "Existence") for question in questions), ())


def score(judge: OpenAIJudge, images: list[Image.Image], questions: list[str]) -> list[tuple[float | None, ...]]:
    """Answers to all questions about all images; closes the judge and checks that it leaves nothing behind."""

    async def run() -> list[tuple[float | None, ...]]:
        scores = await DVReward(judge, max_concurrency=len(images)).score(images, [record(questions)] * len(images))
        await judge.aclose()
        # What is cancelled or closed needs a turn of the loop to end.
        for _ in range(10):
            await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return [score.semantic for score in scores]

    return asyncio.run(run())


def test_natural_calls_make_the_judge_with_its_settings() -> None:
    from reward_models.judges import OpenAIJudge as Lazy

    assert Lazy is OpenAIJudge
    url = "http://localhost:8000/v1"
    judges = [
        OpenAIJudge(url, "a model"),
        OpenAIJudge(base_url=url, model="a model"),
        DVReward("openai", base_url=url, model="a model").judge,
    ]
    assert {(judge.endpoint.base_url, judge.endpoint.model) for judge in judges} == {(url, "a model")}
    assert DVReward("openai", base_url=url, binary=True).judge.binary
    with pytest.raises(ValueError, match="give one of them"):
        OpenAIJudge(url, base_url=url)
    with pytest.raises(TypeError, match="no setting bas_url; the settings of its judge are model, base_url"):
        DVReward("openai", bas_url=url)
    with pytest.raises(ValueError, match="judge_model"):
        DVReward("transformers")
    with pytest.raises(ValueError, match="model: a judge that is given as an object has its settings already"):
        DVReward(judges[0], model="a model")


def open_sockets(port: int) -> list:
    """Connections of this process to a server on loopback."""
    connections = psutil.Process().net_connections("tcp")
    return [c for c in connections if c.raddr and c.raddr.port == port and c.status == psutil.CONN_ESTABLISHED]


def test_answers_are_read_from_log_probabilities() -> None:
    images = make_images(3)
    with faulty_endpoint(Faults()) as (endpoint, _):
        answers = score(OpenAIJudge(OpenAIEndpoint(endpoint.url, "judge")), images, QUESTIONS)
    for image, image_answers in zip(images, answers, strict=True):
        assert image_answers == pytest.approx([expected(image, question) for question in QUESTIONS], abs=1e-9)
    request = endpoint.requests[0]
    assert (request["max_tokens"], request["logprobs"], request["top_logprobs"]) == (16, True, 20)
    assert [part["type"] for part in request["messages"][0]["content"]] == ["image_url", "text"]


def test_equal_questions_about_equal_images_are_asked_once() -> None:
    image, other = make_images(2)
    with faulty_endpoint(Faults(seconds=0.05)) as (endpoint, _):
        judge = OpenAIJudge(OpenAIEndpoint(endpoint.url))
        first = score(judge, [image, other, image.copy()], QUESTIONS)
        # A second event loop, after the first is gone.
        second = score(judge, [image.copy()], [*QUESTIONS, "Is there a dog?"])
    assert first[0] == first[2] == second[0][:4]
    assert len(endpoint.asked) == 9
    assert set(endpoint.asked.values()) == {1}


def test_nothing_is_remembered_without_a_cache() -> None:
    with faulty_endpoint(Faults()) as (endpoint, _):
        judge = OpenAIJudge(OpenAIEndpoint(endpoint.url, "judge"), cache_size=0)
        for _ in range(2):
            score(judge, make_images(1), QUESTIONS[:1])
    assert list(endpoint.asked.values()) == [2]


def test_requests_at_once_are_bounded() -> None:
    with faulty_endpoint(Faults(seconds=0.05)) as (endpoint, _):
        score(OpenAIJudge(OpenAIEndpoint(endpoint.url, "judge", max_concurrency=3)), make_images(8), QUESTIONS)
    assert endpoint.peak == 3


def test_one_question_goes_ahead_to_fill_the_prefix_cache() -> None:
    with faulty_endpoint(Faults(seconds=0.05)) as (endpoint, _):
        started = time.perf_counter()
        score(OpenAIJudge(OpenAIEndpoint(endpoint.url, "judge"), image_first=True), make_images(1), QUESTIONS)
        assert time.perf_counter() - started > 0.1
    assert endpoint.peak == len(QUESTIONS) - 1
    assert "Is there a cat?" in endpoint.requests[0]["messages"][0]["content"][1]["text"]


def test_binary_answers_are_0_and_1() -> None:
    images = make_images(4)
    with faulty_endpoint(Faults(empty=1.0)) as (endpoint, _):
        answers = score(OpenAIJudge(OpenAIEndpoint(endpoint.url, "judge"), binary=True), images, QUESTIONS)
    assert "logprobs" not in endpoint.requests[0]
    for image, image_answers in zip(images, answers, strict=True):
        assert image_answers == tuple(float(expected(image, question) > 0.5) for question in QUESTIONS)


@pytest.mark.parametrize("fault", ["error", "hang", "garbage", "empty", "trickle"])
def test_a_fault_is_retried_and_then_no_answer(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    with faulty_endpoint(Faults(**{fault: 1.0})) as (endpoint, _):
        judge = OpenAIJudge(OpenAIEndpoint(endpoint.url, "judge", max_retries=1, timeout=0.5))
        with caplog.at_level(logging.WARNING):
            assert score(judge, make_images(1), QUESTIONS[:1]) == [(None,)]
        assert list(endpoint.asked.values()) == [2]
        assert "no answer to 'Is there a cat?'" in caplog.text
        # The failure was not remembered.
        endpoint.faults = Faults()
        assert score(judge, make_images(1), QUESTIONS[:1])[0][0] is not None


def test_a_fault_of_the_request_is_not_retried() -> None:
    with faulty_endpoint(Faults()) as (endpoint, _):
        judge = OpenAIJudge(OpenAIEndpoint(endpoint.url.replace("/v1", "/v2"), "judge"))
        started = time.perf_counter()
        assert score(judge, make_images(1), QUESTIONS[:1]) == [(None,)]
        assert time.perf_counter() - started < 5


def test_a_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    endpoint = OpenAIEndpoint("http://127.0.0.1:9", "judge")

    async def key() -> str:
        client, _ = endpoint._connection()
        await endpoint.aclose()
        return client.api_key

    assert asyncio.run(key()) == "secret-key"
    assert "secret-key" not in repr(endpoint) + repr(vars(endpoint))


@pytest.mark.parametrize(
    ("argument", "value"),
    [("max_concurrency", 0), ("timeout", 0.0), ("max_retries", -1)],
    ids=lambda value: str(value),
)
def test_arguments_are_checked(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=argument):
        OpenAIEndpoint("http://127.0.0.1:9", **{argument: value})


def test_arguments_of_a_recipe_reach_the_judge() -> None:
    args = RewardArguments(
        judge="openai", judge_base_url="http://127.0.0.1:9/v1", judge_model="m", judge_timeout=3.0, judge_binary=True
    )
    judge = args.make_reward().judge
    assert isinstance(judge, OpenAIJudge)
    assert (judge.endpoint.base_url, judge.endpoint.model) == ("http://127.0.0.1:9/v1", "m")
    assert (judge.endpoint.timeout, judge.binary) == (3.0, True)


def test_too_many_failures_stop_the_run() -> None:
    images = make_images(4)
    questions = [[{"question": QUESTIONS[0], "tag": "Existence"}]] * 4

    async def reward(judge: OpenAIJudge, log_metric: Callable[[str, float], None]) -> None:
        try:
            await DVReward(judge)(
                ["a cat"] * 4,
                [""] * 4,
                images=images,
                semantic_questions=questions,
                quality_questions=[[]] * 4,
                log_metric=log_metric,
            )
        finally:
            await judge.aclose()

    metrics: dict[str, float] = {}
    with faulty_endpoint(Faults(error=1.0)) as (endpoint, _):
        judge = OpenAIJudge(OpenAIEndpoint(endpoint.url, "judge", max_retries=0))
        with pytest.raises(JudgeFailedError, match="left 4 of 4 images .* judge_max_failed_frac=0.5"):
            asyncio.run(reward(judge, metrics.__setitem__))
    assert metrics["judge/failed_frac"] == 1.0
    assert metrics["judge/questions_per_second"] == 0.0


@pytest.mark.slow
def test_a_batch_survives_an_endpoint_that_misbehaves() -> None:
    """
    A fifth of the requests is answered with an error, a twentieth each not at all, with garbage, without
    log-probabilities, or byte by byte; and for 10 seconds nobody listens. Prints the times: a question takes 1 / 0.6 requests
    on average, so ideal is the time of a sound endpoint divided by 0.6, and those 10 seconds.
    """
    images = make_images(200)
    seconds = 0.5
    faults = Faults(error=0.2, hang=0.05, garbage=0.05, empty=0.05, trickle=0.05, cursed=0.01, seconds=seconds)
    num_threads = threading.active_count()

    def timed(faults: Faults, dead: float) -> tuple[list[tuple[float | None, ...]], float, list[tuple[float, ...]]]:
        with faulty_endpoint(faults) as (endpoint, server):
            judge = OpenAIJudge(OpenAIEndpoint(endpoint.url, "judge", max_concurrency=32, timeout=2.5))
            outage = threading.Timer(3.0, lambda: (server.stop(), time.sleep(dead), server.start()))
            if dead:
                outage.start()
            started = time.perf_counter()
            answers = score(judge, images, QUESTIONS)
            elapsed = time.perf_counter() - started
            outage.cancel()
            truth = [tuple(expected(image, question) for question in QUESTIONS) for image in images]
            digests = [hashlib.sha256(png_bytes(image)).hexdigest() for image in images]
            known = [
                tuple(
                    None if endpoint.is_cursed((digest, q)) else p
                    for q, p in zip(QUESTIONS, image_answers, strict=True)
                )
                for digest, image_answers in zip(digests, truth, strict=True)
            ]
            assert open_sockets(server.port) == []
        return answers, elapsed, known

    sound, healthy_seconds, truth = timed(Faults(seconds=seconds), dead=0.0)
    assert [list(a) for a in sound] == [pytest.approx(list(t), abs=1e-9) for t in truth]
    answers, faulty_seconds, truth = timed(faults, dead=10.0)
    print(f"sound {healthy_seconds:.1f} s, faulty {faulty_seconds:.1f} s")  # noqa: T201
    num_missing = 0
    for image_answers, image_truth in zip(answers, truth, strict=True):
        for answer, correct in zip(image_answers, image_truth, strict=True):
            if answer is None:
                num_missing += correct is not None
            else:
                assert answer == pytest.approx(correct, abs=1e-9)
    assert any(None in image_truth for image_truth in truth)
    # Nine tries, each of which fails with 0.4, leave one question in 4,000; those under way when the endpoint died have fewer.
    assert num_missing < 0.05 * len(images) * len(QUESTIONS)
    assert threading.active_count() <= num_threads + 1
    assert len(os.listdir("/proc/self/fd")) < 200


def test_a_run_keeps_what_answers_depend_on_and_no_key() -> None:
    def kept(url: str = "http://a/v1", **settings: Any) -> dict[str, Any]:
        # As a checkpoint keeps it.
        return json.loads(
            json.dumps(OpenAIJudge(url, **{"model": "judge", "api_key": "sk-secret", **settings}).run_settings)
        )

    body = {"temperature": 0.5, "chat_template_kwargs": {"enable_thinking": False}, "metadata": ["Bearer sk-secret"]}
    first = kept(extra_body=body)
    assert "sk-secret" not in json.dumps(first) and "http" not in json.dumps(first)
    assert first["extra_body"]["chat_template_kwargs"] == {"enable_thinking": False}
    assert first == kept("http://b/v1", extra_body=body, timeout=1.0, max_retries=0, image_first=True, api_key="other")
    for changed in (
        {"model": "other"},
        {"min_answer_mass": 0.0},
        {"binary": True},
        {"extra_body": body | {"temperature": 1.0}},
        {"extra_body": body | {"metadata": ["Bearer other"]}},
    ):
        assert kept(**{"extra_body": body, **changed}) != first
