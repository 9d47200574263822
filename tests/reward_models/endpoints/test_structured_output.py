# SPDX-License-Identifier: Apache-2.0

import asyncio
import json
from typing import Any

import pytest

from reward_models.endpoints.endpoint import OpenAIEndpoint
from reward_models.endpoints.structured_output import StructuredChat, json_objects
from reward_models.format import WANTED_VERDICT, ReflectionStructure
from support.chat_stub import ChatRequest, chat_stub


def test_json_objects_are_found_whole() -> None:
    text = 'a {"x": {"y": "}"}} b {broken} {"z": 1'
    assert list(json_objects(text)) == [{"x": {"y": "}"}}]


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
