# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image

from reward_models import DVReward, Judge, dvreward
from reward_models.dvreward import JudgeFailedError
from reward_models.endpoints import preflight
from reward_models.judges.base import PREFLIGHT_QUESTION
from reward_models.judges.openai import OpenAIJudge
from reward_models.judges.server import ServerJudge
from reward_models.judges.shapes import ShapesJudge
from support.scripted_endpoint import Reply, ScriptedEndpoint, chat_body, scripted_endpoint


GOOD = Reply(chat_body("Yes", [("Yes", [("Yes", -0.1), ("No", -2.4)])]))
UNKNOWN_MODEL = Reply({"error": {"message": "The model `m` does not exist.", "code": 404}}, 404)
WRONG_KEY = Reply({"error": {"message": "Incorrect API key provided"}}, 401)
BUSY = Reply({"error": {"message": "still loading"}}, 503)


@pytest.fixture(autouse=True)
def quick_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "PAUSES", (0.01, 0.01, 0.01))
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def unused_address() -> Iterator[str]:
    # Bound and not listening, so that nobody else can take it.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{probe.getsockname()[1]}"


def check(judge: Judge, **settings: Any) -> None:
    asyncio.run(DVReward(judge, **settings).preflight(24, 32))


def cause_of(judge: Judge) -> str:
    with pytest.raises(JudgeFailedError) as caught:
        check(judge)
    return str(caught.value)


def test_judge_without_address_and_key() -> None:
    cause = cause_of(OpenAIJudge(None, "m"))
    assert "judge_base_url" in cause and "OPENAI_API_KEY" in cause


@pytest.mark.parametrize("model", ["m", None])
def test_path_without_v1(model: str | None) -> None:
    with scripted_endpoint(GOOD) as endpoint:
        assert f"try {endpoint.url}" in cause_of(OpenAIJudge(endpoint.root, model))
        assert not endpoint.bodies


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (UNKNOWN_MODEL, ["404 The model `m` does not exist.", "It serves judge"]),
        (WRONG_KEY, ["401 Incorrect API key provided", "OPENAI_API_KEY"]),
        (BUSY, ["503 still loading", "asked 4 times"]),
        (Reply(b"<html>"), ["not JSON"]),
        (Reply(chat_body("Yes")), ["judge_binary"]),
        (Reply(chat_body("<", [("<think>", [("<think>", -0.001)])])), ["judge_extra_body"]),
        (
            Reply({"error": {"message": "slow down"}}, 429, {"retry-after": "60"}),
            ["429 slow down", "asks to wait 60 s"],
        ),
    ],
    ids=["model", "key", "loading", "page", "no log-probabilities", "thinks", "limit"],
)
def test_refusals_say_what_the_server_said_and_what_to_change(answer: Reply, words: list[str]) -> None:
    with scripted_endpoint(answer) as endpoint:
        cause = cause_of(OpenAIJudge(endpoint.url, "m", max_retries=8))
        for word in [f"{endpoint.url}/chat/completions", *words]:
            assert word in cause


def test_address_that_nobody_listens_at() -> None:
    with unused_address() as address:
        for judge in (OpenAIJudge(f"{address}/v1", "m"), ServerJudge(address)):
            cause = cause_of(judge)
            assert address in cause and "judge_base_url" in cause
    assert "judge_base_url" in cause_of(OpenAIJudge("http://no-such-host.invalid/v1", "m"))


def test_address_without_scheme_and_with_the_wrong_one() -> None:
    assert "try http://localhost:8000/v1" in cause_of(OpenAIJudge("localhost:8000/v1", "m"))
    with scripted_endpoint(GOOD) as endpoint:
        assert "http://" in cause_of(OpenAIJudge(endpoint.url.replace("http:", "https:"), "m")).split("HTTPS")[1]


@pytest.mark.parametrize("make", [lambda url: OpenAIJudge(f"{url}/v1", "m", timeout=60), ServerJudge])
def test_endpoint_that_does_not_answer(make: Callable[[str], Judge], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dvreward, "PREFLIGHT_SECONDS", 0.5)
    judge = None
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        judge = make(address)
        start = time.monotonic()
        cause = cause_of(judge)
    assert time.monotonic() - start < 5
    assert address in cause and "did not answer in 0.5 s" in cause


def test_judge_that_keeps_to_no_time_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(Judge):
        async def answer(self, image: Any, questions: Any) -> list[float | None]:
            raise NotImplementedError

        async def preflight(self, image: Image.Image, seconds: float) -> None:
            await asyncio.sleep(3600)

    monkeypatch.setattr(dvreward, "PREFLIGHT_SECONDS", 0.1)
    monkeypatch.setattr(dvreward, "_GRACE_SECONDS", 0.1)
    assert "TimeoutError" in cause_of(Endless())


def test_one_question_about_a_blank_image_once() -> None:
    with scripted_endpoint(GOOD) as endpoint:
        judge = OpenAIJudge(endpoint.url, "m")
        reward = DVReward(judge)

        async def twice() -> None:
            await reward.preflight(24, 32)
            await reward.preflight(24, 32)

        asyncio.run(twice())
        (body,) = endpoint.bodies
        assert PREFLIGHT_QUESTION in str(body)
        # Neither a later answer nor a metric depends on it.
        assert not judge._answers and judge.take_answer_mass() is None and judge.last_failure is None
        assert judge.endpoint.max_retries == 8 and judge.endpoint.timeout == 60


def test_what_passes_by_itself_is_waited_for() -> None:
    with scripted_endpoint(lambda body, number: GOOD if number == 2 else BUSY) as endpoint:
        check(OpenAIJudge(endpoint.url, "m", max_retries=0))
        assert len(endpoint.bodies) == 3


def test_a_wait_that_the_endpoint_asks_for_is_kept_while_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dvreward, "PREFLIGHT_SECONDS", 2.0)
    busy = Reply({}, 503, {"retry-after-ms": "150"})
    # More tries than there are pauses, each after the wait.
    with scripted_endpoint(lambda body, number: GOOD if number == 5 else busy) as endpoint:
        start = time.monotonic()
        judge = OpenAIJudge(endpoint.url, "m")
        check(judge)
        assert 0.75 <= time.monotonic() - start < 2.0
        assert len(endpoint.bodies) == 6
        assert judge.endpoint.max_wait == 300


def test_a_wait_that_does_not_fit_is_named_at_once() -> None:
    with scripted_endpoint(Reply({}, 429, {"retry-after": "3600, 3600"})) as endpoint:
        cause = cause_of(OpenAIJudge(endpoint.url, "m"))
        assert cause.endswith(
            "It asks to wait 3600 s, which does not fit into the 10 s of this check: start again later."
        )
        assert len(endpoint.bodies) == 1


def test_what_the_endpoint_refuses_is_learned_for_the_run() -> None:
    def answer(body: dict[str, Any], number: int) -> Reply:
        message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        return Reply({"error": {"message": message, "param": "max_tokens"}}, 400) if "max_tokens" in body else GOOD

    with scripted_endpoint(answer) as endpoint:
        judge = OpenAIJudge(endpoint.url, "m")
        check(judge)
        refused = len(endpoint.bodies)
        assert asyncio.run(judge.answer(Image.new("RGB", (8, 8)), ["?"]))[0] == pytest.approx(0.909, abs=1e-3)
        assert len(endpoint.bodies) == refused + 1


def test_reward_server_that_refuses_the_key_or_has_another_path(scripted: ScriptedEndpoint) -> None:
    cause = cause_of(ServerJudge(scripted.url))
    assert "401" in cause and "ALPHAGRPO_SERVER_KEY" in cause
    cause = cause_of(ServerJudge(scripted.root))
    assert "404" in cause and "has a path too many: check judge_base_url" in cause


def test_reward_server_that_asks_for_a_long_wait() -> None:
    with scripted_endpoint(Reply({"detail": "busy"}, 429, {"Retry-After": "3600"})) as endpoint:
        cause = cause_of(ServerJudge(endpoint.url))
        assert "is too busy" in cause and cause.endswith("It asks to wait 3600 s")
        assert len(endpoint.bodies) == 1


@pytest.mark.parametrize("key", ["k\u00e4se-key", "first\nsecond"])
def test_key_that_cannot_be_sent_is_named_and_not_printed(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    cause = cause_of(OpenAIJudge("http://127.0.0.1:9/v1", "m"))
    assert cause.endswith("OPENAI_API_KEY must consist of printable ASCII characters, since it is sent in a header.")
    assert key[:3] not in cause


def test_certificates_that_cannot_be_read_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such.pem")
    cause = cause_of(OpenAIJudge("http://127.0.0.1:9/v1", "m"))
    assert cause.endswith("check the environment variable SSL_CERT_FILE='/no/such.pem'.")


@pytest.fixture
def scripted() -> Iterator[ScriptedEndpoint]:
    with scripted_endpoint(Reply({"detail": "wrong key"}, 401)) as endpoint:
        yield endpoint


def test_local_judges_are_not_asked() -> None:
    class Counting(ShapesJudge):
        async def answer(self, image: Any, questions: Any) -> list[float | None]:
            raise AssertionError("asked")

    check(Counting())


@pytest.mark.parametrize("question", ["Is there a dog?", "is there a red circle or a square ?"])
def test_shapes_judge_names_the_row_that_it_cannot_judge(question: str) -> None:
    good = {"question": "Is there a red circle?", "tag": "Existence"}
    rows = [
        {"prompt": "a red circle", "semantic_questions": [good], "quality_questions": []},
        {
            "prompt": "a dog",
            # A question that is not valid is not asked.
            "semantic_questions": [good, {"question": "Is it raining?", "tag": "Environment", "is_valid": False}],
            "quality_questions": [{"question": question, "tag": "Geometry"}],
        },
    ]
    reward = DVReward("shapes")
    reward.validate_dataset(rows[:1])
    with pytest.raises(ValueError, match=r"row 1 \('a dog'\): the judge 'shapes' .* choose another judge") as caught:
        reward.validate_dataset(rows)
    assert question in str(caught.value)
