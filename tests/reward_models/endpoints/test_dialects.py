# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_models.endpoints.dialects import CHAT_OPTIONS, Dialect, request_fields
from reward_models.endpoints.endpoint import OpenAIEndpoint
from reward_models.endpoints.errors import EndpointError
from support.scripted_endpoint import Reply, ScriptedEndpoint, chat_body, scripted_endpoint


FIELDS = {"temperature": 0.0, "max_tokens": 16, "logprobs": True, "top_logprobs": 20}
MESSAGES = [{"role": "user", "content": "Is it red?"}]


def refusal(message: str, param: str | None = None, status: int = 400) -> Reply:
    return Reply({"error": {"message": message, "type": "invalid_request_error", "param": param}}, status)


def learn_all(refuse: Callable[[dict[str, Any]], tuple[str, str | None] | None]) -> dict[str, Any] | None:
    """The fields that are sent in the end; `None` if a refusal taught nothing."""
    dialect = Dialect()
    for _ in range(12):
        sent = dialect.apply(FIELDS)
        refused = refuse(sent)
        if refused is None:
            return sent
        dialect = dialect.learn(sent, *refused, CHAT_OPTIONS)
        if dialect is None:
            return None
    raise AssertionError("the refusals had no end")


@pytest.mark.parametrize("param", ["top_logprobs", "logprobs", None])
@pytest.mark.parametrize(
    "message",
    [
        "'top_logprobs' is above the maximum of {limit}",
        "top_logprobs: must be between 0 and {limit}",
        "top_logprobs: Input should be less than or equal to {limit}",
        "Requested sample logprobs of {asked}, which is greater than max allowed: {limit}",
        "Invalid value for 'top_logprobs': {asked}. At most {limit} are supported by gpt-4o-mini-2024-07-18",
        "top_logprobs = {asked} exceeds the limit ({limit})",
        "top_logprobs must be smaller than {beyond}",
    ],
)
@given(limit=st.integers(2, 19))
def test_a_named_limit_is_kept(message: str, param: str | None, limit: int) -> None:
    def refuse(sent: dict[str, Any]) -> tuple[str, str | None] | None:
        asked = sent["top_logprobs"]
        return (message.format(asked=asked, limit=limit, beyond=limit + 1), param) if asked > limit else None

    sent = learn_all(refuse)
    assert sent is not None and 2 <= sent["top_logprobs"] <= limit
    if "smaller" not in message and "2024" not in message:
        assert sent == {**FIELDS, "top_logprobs": limit}


@pytest.mark.parametrize(
    ("message", "param"),
    [("topLogprobs must be <= 5", None), ("at most 5", "topLogprobs"), ("TOP_LOGPROBS > 5", None)],
)
def test_names_in_another_spelling_are_known(message: str, param: str | None) -> None:
    for dialect in (
        Dialect().learn(FIELDS, message, param, CHAT_OPTIONS),
        Dialect().learn_stated_limit(FIELDS, message, param),
    ):
        assert dialect == Dialect(max_top_logprobs=5)


@pytest.mark.parametrize(
    "message",
    [
        "failed at temperature 0, top_logprobs 20",
        "'temperature' is at most 5",
        "top_logprobs failed",
        "use max_completion_tokens in place of max_tokens",
    ],
)
def test_a_failure_teaches_nothing_but_a_limit_that_it_states(message: str) -> None:
    assert Dialect().learn_stated_limit(FIELDS, message, None) is None


@pytest.mark.parametrize("status", [403, 413, 500])
def test_a_limit_is_learned_from_a_status_code_by_mistake(status: int) -> None:
    def answer(body: dict[str, Any], number: int) -> Reply:
        is_refused = body["top_logprobs"] > 5
        return refusal("top_logprobs must be at most 5", status=status) if is_refused else Reply(chat_body())

    with scripted_endpoint(answer) as stub:
        assert complete(OpenAIEndpoint(stub.url, "judge", max_retries=0), 1) == ["Yes"]
    assert [body["top_logprobs"] for body in stub.bodies] == [20, 5]


@pytest.mark.parametrize("limit", [2, 3, 4, 5, 8, 10, 19])
def test_a_limit_that_is_not_named_is_found(limit: int) -> None:
    sent = learn_all(lambda sent: ("top_logprobs is too large", None) if sent["top_logprobs"] > limit else None)
    assert sent is not None and 2 <= sent["top_logprobs"] <= limit


@pytest.mark.parametrize(
    ("field", "message", "param"),
    [
        ("temperature", "'temperature' does not support 0 with this model. Only the default (1) is.", "temperature"),
        ("temperature", "body.temperature: Extra inputs are not permitted", "temperature"),
        ("temperature", "unknown parameter `temperature`", None),
        (
            "max_tokens",
            "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
            "max_tokens",
        ),
        ("max_tokens", "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.", None),
    ],
)
def test_other_fields_are_left_out_or_renamed(field: str, message: str, param: str | None) -> None:
    sent = learn_all(lambda sent: (message, param) if field in sent else None)
    expected = {name: value for name, value in FIELDS.items() if name != field}
    assert sent == (expected | {"max_completion_tokens": 16} if field == "max_tokens" else expected)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("logprobs are not supported by this model", "logprobs"),
        ("'max_tokens' is too large: 16. This model's maximum context length is 512 tokens", None),
        ("content policy", None),
        ("", None),
        ("invalid image", "messages"),
    ],
)
def test_refusals_of_another_kind_teach_nothing(message: str, param: str | None) -> None:
    assert Dialect().learn(FIELDS, message, param, CHAT_OPTIONS) is None


@given(st.text(max_size=60), st.none() | st.sampled_from(sorted(FIELDS)))
def test_any_series_of_refusals_ends(message: str, param: str | None) -> None:
    assert learn_all(lambda sent: (message, param)) is None


def test_users_fields_have_precedence_and_null_leaves_a_field_out() -> None:
    assert request_fields(FIELDS, None) == FIELDS
    assert request_fields(FIELDS, {"top_logprobs": 5, "top_k": 1}) == {**FIELDS, "top_logprobs": 5, "top_k": 1}
    for name in FIELDS:
        assert request_fields(FIELDS, {name: None}) == {key: value for key, value in FIELDS.items() if key != name}
    assert "max_tokens" not in request_fields(FIELDS, {"max_completion_tokens": 2000})


def strict_model(body: dict[str, Any], number: int) -> Reply:
    """A model that takes neither `max_tokens` nor a temperature, and lists 5 candidates."""
    if "max_tokens" in body:
        return refusal("'max_tokens' is not supported, use 'max_completion_tokens'", "max_tokens")
    if "temperature" in body:
        return refusal("Only the default temperature is supported", status=422)
    if body["top_logprobs"] > 5:
        return refusal("too many candidates", "top_logprobs")
    return Reply(chat_body())


def complete(endpoint: OpenAIEndpoint, count: int, **settings: Any) -> list[str | None]:
    async def run() -> list[str | None]:
        try:
            return await asyncio.gather(
                *(
                    endpoint.complete_chat(
                        lambda choice: choice.message.content, messages=MESSAGES, **FIELDS, **settings
                    )
                    for _ in range(count)
                )
            )
        finally:
            await endpoint.aclose()

    return asyncio.run(run())


def test_a_dialect_is_learned_once_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    with scripted_endpoint(strict_model) as stub, caplog.at_level(logging.WARNING):
        endpoint = OpenAIEndpoint(stub.url, "judge", max_retries=0)
        assert complete(endpoint, 4) == ["Yes"] * 4
        stub.bodies.clear()
        # Another event loop, later.
        assert complete(endpoint, 3) == ["Yes"] * 3
    expected = {"logprobs": True, "top_logprobs": 5, "max_completion_tokens": 16}
    assert stub.bodies == [{"model": "judge", "messages": MESSAGES, **expected}] * 3
    (message,) = caplog.messages
    assert (
        "without temperature, with max_completion_tokens in place of max_tokens, with top_logprobs of at most 5"
        in message
    )


def test_what_was_tried_in_vain_is_not_kept() -> None:
    def answer(body: dict[str, Any], number: int) -> Reply:
        return Reply(chat_body()) if number > 2 else refusal("the temperature of the image is too high", "image")

    with scripted_endpoint(answer) as stub:
        endpoint = OpenAIEndpoint(stub.url, "judge", max_retries=0)
        with pytest.raises(EndpointError, match="answered 400 the temperature of the image is too high"):
            complete(endpoint, 1)
        assert len(stub.bodies) == 2
        stub.bodies += [{}]
        assert complete(endpoint, 1) == ["Yes"]
    assert stub.bodies[-1] == {"model": "judge", "messages": MESSAGES, **FIELDS}


def test_a_dialect_survives_the_tries_of_a_request() -> None:
    def answer(body: dict[str, Any], number: int) -> Reply:
        return Reply({}, 500) if number == 1 else strict_model(body, number)

    def sent(stub: ScriptedEndpoint) -> list[bool]:
        return ["max_tokens" in body for body in stub.bodies]

    with scripted_endpoint(answer) as stub:
        assert complete(OpenAIEndpoint(stub.url, "judge", max_retries=1), 1) == ["Yes"]
    assert sent(stub) == [True, *[False] * (len(stub.bodies) - 1)]


def test_fields_can_be_left_out() -> None:
    with scripted_endpoint(Reply(chat_body())) as stub:
        complete(OpenAIEndpoint(stub.url, "judge"), 1, extra_body={"temperature": None, "max_completion_tokens": 99})
    fields = {"logprobs": True, "top_logprobs": 20, "max_completion_tokens": 99}
    assert stub.bodies == [{"model": "judge", "messages": MESSAGES, **fields}]
