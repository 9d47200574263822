# SPDX-License-Identifier: Apache-2.0

"""Tries, waits and causes."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any

import pytest

from reward_models.endpoints import endpoint as endpoint_module
from reward_models.endpoints.endpoint import OpenAIEndpoint
from reward_models.endpoints.errors import EndpointError, InvalidAnswerError, ThrottledWarning
from support.scripted_endpoint import Reply, ScriptedEndpoint, chat_body, scripted_endpoint


@pytest.fixture
def stub() -> Iterator[ScriptedEndpoint]:
    with scripted_endpoint(Reply(chat_body())) as endpoint:
        yield endpoint


def complete(endpoint: OpenAIEndpoint, count: int = 1) -> list[Any]:
    """Texts of the answers, or errors."""

    async def run() -> list[Any]:
        requests = (endpoint.complete_chat(lambda choice: choice.message.content, messages=[]) for _ in range(count))
        try:
            return await asyncio.gather(*requests, return_exceptions=True)
        finally:
            await endpoint.aclose()

    return asyncio.run(run())


def error_of(endpoint: OpenAIEndpoint) -> str:
    (error,) = complete(endpoint)
    assert isinstance(error, EndpointError | InvalidAnswerError)
    return str(error)


def refused(number: int) -> Callable[[dict[str, Any], int], Reply]:
    """The first requests are refused."""
    return lambda body, n: Reply({"error": {"message": "slow down"}}, 429) if n < number else Reply(chat_body())


@pytest.mark.parametrize(
    "form", ["seconds", *(pytest.param(f, marks=pytest.mark.slow) for f in ("date", "milliseconds"))]
)
def test_a_wait_that_is_asked_for_is_kept(stub: ScriptedEndpoint, form: str) -> None:
    until = time.time() + 1.5

    def answer(body: dict[str, Any], number: int) -> Reply:
        left = until - time.time()
        headers = {
            "seconds": {"Retry-After": str(math.ceil(left))},
            "date": {"Retry-After": formatdate(until + 1, usegmt=True)},
            "milliseconds": {"Retry-After-Ms": str(int(left * 1000) + 20)},
        }
        return Reply({"error": {"message": "slow down"}}, 429, headers[form]) if left > 0 else Reply(chat_body())

    stub.answer = answer
    # The wait is longer than the time for one try.
    assert complete(OpenAIEndpoint(stub.url, "judge", max_retries=1, timeout=1.0)) == ["Yes"]
    assert len(stub.bodies) == 2


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "3600"},
        {"Retry-After": "IN AN HOUR"},
        {"Retry-After-Ms": "3600000"},
        {"Retry-After": "9" * 400},
    ],
    ids=["seconds", "date", "milliseconds", "infinite"],
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_wait_without_end_is_refused(stub: ScriptedEndpoint, headers: dict[str, str], status: int) -> None:
    if headers.get("Retry-After") == "IN AN HOUR":
        headers = {"Retry-After": formatdate(time.time() + 3600, usegmt=True)}
    stub.answer = lambda body, number: Reply({"error": {"message": "come back later"}}, status, headers)
    started = time.perf_counter()
    message = error_of(OpenAIEndpoint(stub.url, "judge"))
    assert time.perf_counter() - started < 5
    assert re.search(rf"answered {status} come back later \(1 try\). It asks to wait (3[56]\d\d|inf) s", message)


def test_waits_are_bounded_in_all(stub: ScriptedEndpoint) -> None:
    stub.answer = lambda body, number: Reply({}, 429, {"Retry-After-Ms": "2000"})
    message = error_of(OpenAIEndpoint(stub.url, "judge", max_wait=3.0))
    assert "(2 tries). It asks to wait 2 s, more than max_wait allows" in message


@pytest.fixture
def without_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module._Waits, "__call__", lambda self, state: 0.0)


@pytest.mark.usefixtures("without_backoff")
@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 529])
def test_faults_that_pass_are_tried_again(stub: ScriptedEndpoint, status: int) -> None:
    stub.answer = lambda body, number: Reply({"detail": "not now"}, status) if number < 2 else Reply(chat_body())
    endpoint = OpenAIEndpoint(stub.url, "judge", max_retries=2)
    assert complete(endpoint) == ["Yes"]
    stub.bodies.clear()
    endpoint.max_retries = 1
    assert f"{stub.url}/chat/completions answered {status} not now (2 tries)" in error_of(endpoint)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"error": {"message": "no\n such  thing"}}, "no such thing"),
        ([{"error": {"message": "in a list"}}], "in a list"),
        ({"error": "as text"}, "as text"),
        ({"message": "at the top"}, "at the top"),
        ({"detail": "of FastAPI"}, "of FastAPI"),
        ({"detail": [{"loc": ["body", "n"], "msg": "too large", "input": "x" * 999}]}, "body.n: too large"),
        (b"<html>bad \x1b[31mgateway</html>", "<html>bad [31mgateway</html>"),
        (b"\xff\xfe", ""),
        (b"", ""),
        ({"a": {"b": ["c"]}}, "{'a': {'b': ['c']}}"),
        ({"error": {"message": "\ud83d"}}, ""),
        ({"error": {"message": "x" * 10_000}}, "x" * 500),
    ],
    ids=lambda value: str(value)[:30],
)
def test_the_message_of_the_server_is_passed_on(stub: ScriptedEndpoint, content: Any, text: str) -> None:
    stub.answer = lambda body, number: Reply(content, 418)
    (error,) = complete(OpenAIEndpoint(stub.url, "judge"))
    assert error.status_code == 418 and error.reason == "HTTP status 418"
    assert f"{stub.url}/chat/completions answered 418 {text}" in str(error)
    assert str(error).isprintable() and len(str(error)) < 700


@pytest.mark.parametrize(
    ("status", "message", "hint"),
    [
        (401, "no key", "Set the environment variable OPENAI_API_KEY"),
        (404, "The model `judge` does not exist.", "It serves a, b: name one of them"),
        (404, "model 'judge' not found, try pulling it first", "It serves a, b: name one of them"),
        (400, "Invalid model name", "It serves a, b: name one of them"),
        (404, "Not Found", "Check the address"),
        (400, "the image is odd", None),
    ],
)
def test_refusals_say_what_to_change(stub: ScriptedEndpoint, status: int, message: str, hint: str | None) -> None:
    stub.answer = lambda body, number: Reply({"error": {"message": message}}, status)
    stub.models = Reply({"data": [{"id": "a"}, {"id": "b"}]})
    text = error_of(OpenAIEndpoint(stub.url, "judge"))
    assert f"answered {status} {message} (1 try)" in text
    assert text.endswith("(1 try)") if hint is None else hint in text
    assert len(stub.bodies) == 1


def test_a_missing_v1_is_named(stub: ScriptedEndpoint) -> None:
    for model in ("judge", None):
        message = error_of(OpenAIEndpoint(stub.root, model))
        assert message.startswith(f"{stub.root}/") and message.endswith(f"The address has no /v1: try {stub.root}/v1")


@pytest.mark.parametrize("body", [b"<html>", b" " * 2000], ids=["page", "large"])
def test_an_unreadable_list_of_models_is_not_called_a_completion(stub: ScriptedEndpoint, body: bytes) -> None:
    stub.models = Reply(body)
    message = error_of(OpenAIEndpoint(stub.url, max_retries=0, max_answer_bytes=1000))
    assert message.startswith(f"{stub.url}/models (1 try): the answer is ")


def test_the_route_that_was_asked_is_named(stub: ScriptedEndpoint) -> None:
    async def paint(endpoint: OpenAIEndpoint) -> None:
        try:
            await endpoint.paint(lambda answer: answer, "a cat")
        finally:
            await endpoint.aclose()

    stub.answer = lambda body, number: Reply({"error": {"message": "Not Found"}}, 404)
    with pytest.raises(EndpointError, match="it must end where /images/generations begins"):
        asyncio.run(paint(OpenAIEndpoint(stub.url, "judge")))
    assert "it must end where /chat/completions begins" in error_of(OpenAIEndpoint(stub.url, "judge"))


@pytest.mark.parametrize("names", [[], ["a", "b"]])
def test_a_model_must_be_named_where_several_are_served(stub: ScriptedEndpoint, names: list[str]) -> None:
    stub.models = Reply({"data": [{"id": name} for name in names]})
    assert f"/v1/ serves {len(names)} models ({', '.join(names)}): name one" in error_of(OpenAIEndpoint(stub.url))
    assert stub.bodies == []


def test_names_of_models_are_shortened(stub: ScriptedEndpoint) -> None:
    name = "\x1b[2J" + "x" * 5000
    stub.models = Reply({"data": [{"id": name}, {"id": "b"}]})
    stub.answer = lambda body, number: Reply({"error": {"message": "model not found"}}, 404)
    for endpoint in (OpenAIEndpoint(stub.url), OpenAIEndpoint(stub.url, "judge")):
        message = error_of(endpoint)
        assert re.search(r"\[2Jx+, b\)?: name one of them$", message)
        assert "\x1b" not in message and len(message) < 400


def test_address_that_a_redirect_led_to_is_named(stub: ScriptedEndpoint) -> None:
    stub.answer = lambda body, number: Reply({}, 307, {"Location": "http://127.0.0.1:9/v1/elsewhere"})
    message = error_of(OpenAIEndpoint(stub.url, "judge", max_retries=0))
    assert message.startswith("http://127.0.0.1:9/v1/elsewhere cannot be reached")


def test_proxy_out_of_reach_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://user:secret@127.0.0.1:9")
    message = error_of(OpenAIEndpoint("http://judge.example/v1", "judge", max_retries=0))
    assert "Requests go through the proxy http://127.0.0.1:9: check" in message and "secret" not in message


@pytest.mark.parametrize("quote", [str, repr])
def test_key_is_not_printed_in_either_form(stub: ScriptedEndpoint, quote: Callable[[str], str]) -> None:
    key = "sk-\\12345'6"
    stub.answer = lambda body, number: Reply({"error": {"message": f"wrong key {quote(key)}"}}, 401)
    message = error_of(OpenAIEndpoint(stub.url, "judge", key))
    assert "12345" not in message and "***" in message


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:80/v1", "localhost:80/v1", "ftp://a/v1", "http://", "//a/v1", "http://a:b/v1", "http://a:99999/v1"],
)
def test_an_address_without_scheme_or_host_fails_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.perf_counter()
    assert f"must begin with the scheme http:// or https:// and a host, but is '{url}'" in error_of(
        OpenAIEndpoint(url)
    )
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    assert url in error_of(OpenAIEndpoint())
    assert time.perf_counter() - started < 2


@pytest.mark.usefixtures("without_backoff")
def test_an_endpoint_out_of_reach_is_named_with_the_cause() -> None:
    endpoint = OpenAIEndpoint("http://user:password@127.0.0.1:9/v1", "judge", max_retries=2)
    assert repr(endpoint) == "OpenAIEndpoint(base_url='http://127.0.0.1:9/v1', model='judge')"
    message = error_of(endpoint)
    assert message.startswith("http://127.0.0.1:9/v1/chat/completions cannot be reached (3 tries): ConnectError")
    assert "Errno" in message


def test_a_timeout_is_named(stub: ScriptedEndpoint) -> None:
    def answer(body: dict[str, Any], number: int) -> Reply:
        time.sleep(0.3)
        return Reply(chat_body())

    stub.answer = answer
    (error,) = complete(OpenAIEndpoint(stub.url, "judge", max_retries=0, timeout=0.1))
    assert str(error) == f"{stub.url}/chat/completions did not answer in 0.1 s (1 try)"
    assert error.reason == "timeout"


def test_a_key_is_never_repeated(stub: ScriptedEndpoint, caplog: pytest.LogCaptureFixture) -> None:
    stub.answer = lambda body, number: Reply({"error": {"message": "wrong key sk-12345678"}}, 401 if number else 500)
    with caplog.at_level(logging.WARNING):
        message = error_of(OpenAIEndpoint(stub.url, "judge", api_key="sk-12345678\n", max_retries=1))
    assert "answered 401 wrong key *** (2 tries)" in message
    assert "wrong key ***" in caplog.text and "sk-1" not in caplog.text
    assert stub.headers[0]["authorization"] == "Bearer sk-12345678"


def test_an_account_without_money_is_not_asked_again(stub: ScriptedEndpoint) -> None:
    error = {"message": "You exceeded your quota", "code": "insufficient_quota"}
    stub.answer = lambda body, number: Reply({"error": error}, 429)
    assert "answered 429 You exceeded your quota (1 try)" in error_of(OpenAIEndpoint(stub.url, "judge"))


@pytest.mark.usefixtures("without_backoff")
def test_retries_are_logged_once_per_minute(stub: ScriptedEndpoint, caplog: pytest.LogCaptureFixture) -> None:
    endpoint = OpenAIEndpoint(stub.url, "judge", max_retries=20)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            stub.bodies.clear()
            stub.answer = refused(5)
            assert complete(endpoint, 2) == ["Yes", "Yes"]
            # A minute later.
            endpoint._retry_log._silent_until -= 61.0
    first, second = caplog.messages
    assert f"{stub.url}" in first and first.endswith(
        "a try of /chat/completions failed and is repeated: 429 slow down"
    )
    assert second.endswith("429 slow down (4 more since the last such warning)")


def test_warnings_left_out_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    warning = ThrottledWarning(logging.getLogger("test"), seconds=0.05)
    for _ in range(3):
        warning.warn("a %s")
    time.sleep(0.06)
    warning.warn("b")
    assert caplog.messages == ["a %s", "b (2 more since the last such warning)"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("name", ["max_concurrency", "timeout", "max_retries", "max_wait", "max_answer_bytes"])
def test_settings_are_finite_and_in_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must .*, but is {value}"):
        OpenAIEndpoint("http://127.0.0.1:9/v1", **{name: value})
