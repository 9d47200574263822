# SPDX-License-Identifier: Apache-2.0

"""Bounds on what an endpoint sends."""

from __future__ import annotations

import asyncio
import gzip
import json
import resource
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_models.endpoints.answers import ChatChoice, _decompress
from reward_models.endpoints.endpoint import OpenAIEndpoint
from reward_models.endpoints.errors import EndpointError, InvalidAnswerError
from support.scripted_endpoint import Reply, ScriptedEndpoint, chat_body, scripted_endpoint


def packed(data: bytes) -> bytes:
    """The same gzip file every time, so that names of tests are the same in all workers."""
    return gzip.compress(data, mtime=0)


BODY = json.dumps(chat_body()).encode()
LIMIT = 2**16


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


@pytest.fixture(scope="module")
def stub() -> Iterator[ScriptedEndpoint]:
    with scripted_endpoint(Reply({})) as endpoint:
        yield endpoint


def read(stub: ScriptedEndpoint, content: Any, encoding: str = "", status: int = 200, **arguments: Any) -> str | None:
    headers = {"content-encoding": encoding} if encoding else {}
    stub.answer = lambda body, number: Reply(content, status, headers)

    async def run() -> str | None:
        endpoint = OpenAIEndpoint(stub.url, "judge", max_retries=0, **{"max_answer_bytes": LIMIT, **arguments})
        try:
            return await endpoint.complete_chat(lambda choice: choice.message.content, messages=[])
        finally:
            await endpoint.aclose()

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (BODY, ""),
        (BODY, "identity"),
        (packed(BODY), "gzip"),
        (packed(BODY), "X-GZIP"),
        (zlib.compress(BODY), "deflate"),
        (raw_deflate(BODY), "deflate"),
        (packed(zlib.compress(BODY)), "deflate, gzip"),
        (BODY + b" " * (LIMIT - len(BODY)), ""),
        (packed(BODY + b" " * (LIMIT - len(BODY))), "gzip"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_answers_of_usual_size_are_read(stub: ScriptedEndpoint, content: bytes, encoding: str) -> None:
    assert read(stub, content, encoding) == "Yes"
    assert stub.headers[-1]["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize(
    ("content", "encoding", "cause"),
    [
        (BODY + b" " * LIMIT, "", "larger than 65536 bytes"),
        (packed(BODY + b" " * LIMIT), "gzip", "larger than 65536 bytes"),
        (packed(packed(b" " * 10**8)), "gzip, gzip", "larger than 65536 bytes"),
        (zlib.compress(b" " * 10**8), "deflate", "larger than 65536 bytes"),
        (raw_deflate(b" " * 10**8), "deflate", "larger than 65536 bytes"),
        (BODY, "br", "compressed by 'br', which was not asked for"),
        (BODY, "zstd", "compressed by 'zstd', which was not asked for"),
        (BODY, "gzip", "not gzip, as its header says"),
        (BODY, "deflate", "not deflate, as its header says"),
        (packed(BODY)[:-9], "gzip", "is cut off"),
        (b"", "gzip", "is cut off"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("status", [200, 400, 500])
def test_other_answers_are_unreadable(
    stub: ScriptedEndpoint, content: bytes, encoding: str, cause: str, status: int
) -> None:
    with pytest.raises(InvalidAnswerError, match=cause):
        read(stub, content, encoding, status)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"[" + b"[]," * 200_000 + b"0]", "holds more than 100000 values"),
        (b'{"choices": [' + b'{"message":{}},' * 60_000 + b"0]}", "holds more than 100000 values"),
        (b"[" * 90_000, "not JSON|answered 400"),
    ],
    ids=["lists", "choices", "depth"],
)
@pytest.mark.parametrize("status", [200, 400])
def test_the_memory_of_a_parsed_answer_is_bounded(
    stub: ScriptedEndpoint, content: bytes, cause: str, status: int
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((InvalidAnswerError, EndpointError), match=cause):
        read(stub, content, status=status, max_answer_bytes=2**20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate", "br", "compress", "gzip;q=1", "x"]))
@settings(max_examples=50)
def test_any_bytes_are_unreadable_or_small(data: bytes, encoding: str) -> None:
    try:
        assert len(_decompress(data, encoding, 100)) <= 100
    except InvalidAnswerError as error:
        assert str(error)


def test_a_bomb_neither_takes_memory_nor_blocks_the_event_loop(stub: ScriptedEndpoint) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join([packer.compress(b" " * 2**20) for _ in range(150)] + [packer.compress(BODY), packer.flush()])
    stub.answer = lambda body, number: Reply(bomb, headers={"content-encoding": "gzip"})
    gaps = []

    async def watch() -> None:
        while True:
            started = time.perf_counter()
            await asyncio.sleep(0.01)
            gaps.append(time.perf_counter() - started)

    async def run() -> None:
        endpoint = OpenAIEndpoint(stub.url, "judge", max_retries=0)
        # The first request imports modules.
        with pytest.raises(InvalidAnswerError):
            await endpoint.complete_chat(lambda choice: choice, messages=[])
        watching = asyncio.create_task(watch())
        results = await asyncio.gather(
            *(endpoint.complete_chat(lambda choice: choice, messages=[]) for _ in range(4)), return_exceptions=True
        )
        watching.cancel()
        await endpoint.aclose()
        assert all(isinstance(result, InvalidAnswerError) for result in results)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    asyncio.run(run())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    assert max(gaps) < 1.0


def test_refusals_and_reasons_are_shortened() -> None:
    choice = ChatChoice.model_validate(
        {"message": {"refusal": "\x1b[2Jno\n" + "x" * 5000}, "finish_reason": "\x07stop"}
    )
    assert choice.message.refusal.startswith("[2Jno xxx") and len(choice.message.refusal) == 500
    assert choice.finish_reason == "stop"


def test_the_models_of_an_endpoint_are_bounded_too(stub: ScriptedEndpoint) -> None:
    stub.models = Reply({"data": [{"id": "m" * LIMIT}]})

    async def run() -> None:
        endpoint = OpenAIEndpoint(stub.url, max_retries=0, max_answer_bytes=LIMIT)
        try:
            await endpoint.complete_chat(lambda choice: choice, messages=[])
        finally:
            await endpoint.aclose()

    with pytest.raises(InvalidAnswerError, match="larger than 65536 bytes"):
        asyncio.run(run())
