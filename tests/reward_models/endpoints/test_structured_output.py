# SPDX-License-Identifier: Apache-2.0

import asyncio
import json
import time
from typing import Any

import pytest

from reward_models.endpoints.endpoint import OpenAIEndpoint
from reward_models.endpoints.errors import InvalidAnswerError
from reward_models.endpoints.structured_output import MAX_READS, MAX_STARTS, StructuredChat, json_objects, parse_answer
from reward_models.format import WANTED_VERDICT, ReflectionStructure, ReflectionVerdict
from support.chat_stub import ChatRequest, chat_stub


def test_json_objects_are_found_whole() -> None:
    text = 'a {"x": {"y": "}"}} b {broken} {"z": 1'
    assert list(json_objects(text)) == [{"x": {"y": "}"}}]


@pytest.mark.parametrize(
    ("begin", "end"), [("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]")]
)
def test_drafts_in_a_thought_are_passed_over(begin: str, end: str) -> None:
    assert list(json_objects(f'{begin}{{"x": 1}}{end} {{"x": 2}}')) == [{"x": 2}]


def test_the_search_for_objects_is_bounded() -> None:
    assert list(json_objects("{a} " * (MAX_STARTS - 1) + '{"x": 1}')) == [{"x": 1}]
    assert list(json_objects("{a} " * MAX_STARTS + '{"x": 1}')) == []
    assert len(list(json_objects("{}" * 10 * MAX_STARTS))) == MAX_STARTS


@pytest.mark.parametrize("part", ['{"a":[', '{"a":', "{", "{}", '{"'])
def test_a_long_answer_is_read_in_linear_time(part: str) -> None:
    text = part * (480_000 // len(part))
    started = time.perf_counter()
    with pytest.raises(InvalidAnswerError):
        parse_answer(text, ReflectionVerdict)
    # It takes a tenth of that at most. Objects in objects took 26 s when each opening brace was tried.
    assert time.perf_counter() - started < 5


def test_the_end_of_an_answer_is_not_read_for_each_of_its_braces(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []
    decode = json.JSONDecoder.raw_decode

    def counted(self: json.JSONDecoder, text: str, start: int) -> Any:
        starts.append(start)
        return decode(self, text, start)

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", counted)
    assert list(json_objects('{"a":' * 900 + "[" + "1," * 50_000)) == []
    assert len(starts) <= MAX_READS + 1


@pytest.mark.parametrize("format_status", [None, 400], ids=["structured", "plain"])
def test_a_chat_endpoint_answers_for_reflection_structure(format_status: int | None) -> None:
    good = WANTED_VERDICT.model_dump()

    def judge_reflection(request: ChatRequest) -> Any:
        assert "Request:\na cat\n" in request.text
        if "Reflection:\ngood" in request.text:
            return f"My verdict: {json.dumps(good | {'remark': 'fine'})}"
        if "Reflection:\nrambling" in request.text:
            return good | {"has_junk": True}
        return good | {"has_junk": "maybe"}

    async def run(url: str) -> list[float | None]:
        chat = StructuredChat(OpenAIEndpoint(url, "stub", max_retries=1))
        rewards = await ReflectionStructure(chat)(["a cat"] * 3, ["good", "rambling", "vague"])
        await chat.aclose()
        return rewards

    with chat_stub(judge_reflection, format_status) as stub:
        assert asyncio.run(run(stub.url)) == [1.0, pytest.approx(0.8), None]
        answered = [request for request in stub.requests if format_status is None or not request.has_format]
        assert sum("Reflection:\nvague" in request.text for request in answered) == 2
    assert {body["temperature"] for body in stub.bodies} == {0.0}
