# SPDX-License-Identifier: Apache-2.0

"""A chat endpoint on loopback that decomposes prompts by rules instead of a language model."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from reward_models.decomposition.answers import CRITERIA
from reward_models.endpoints.structured_output import json_objects
from support.loopback import serve


NUMBERS = ("two", "three", "four")
INVENTED = "Is the weather nice?"


@dataclass(frozen=True)
class ChatRequest:
    """
    A request as the endpoint reads it.

    Args:
        text (`str`): The request.
        kind (`str`): First field of the answer's schema: `"facts"`, `"questions"`, `"verdicts"`, or that of another request.
        prompt (`str`, *optional*): The prompt that the request is about.
        questions (`list[str]`): Questions of a verification.
        has_format (`bool`): Whether the schema came as `response_format`.
        num_before (`int`): How often the same text was sent before.
    """

    text: str
    kind: str
    prompt: str | None
    questions: list[str]
    has_format: bool
    num_before: int


def good_answer(request: ChatRequest) -> dict[str, Any]:
    """One question per word of the prompt, and an invented one, which the verification rejects. It also tags numbers."""
    if request.kind == "facts":
        words = request.prompt.split()
        facts = [{"fact": word, "tag": "Existence", "question": f'Can "{word}" be seen?'} for word in words]
        return {"facts": [*facts, {"fact": "the weather", "tag": "Environment", "question": INVENTED}]}
    if request.kind == "questions":
        return {"questions": [{"tag": "Aesthetics", "question": f"Is the picture of {request.prompt} well composed?"}]}
    assert request.kind == "verdicts"
    return {"verdicts": [good_verdict(number, text) for number, text in enumerate(request.questions, start=1)]}


def good_verdict(number: int, question: str) -> dict[str, Any]:
    tag = "Environment" if question == INVENTED else "Aesthetics" if "composed" in question else "Existence"
    if any(f'"{word}"' in question for word in NUMBERS):
        tag = "Count"
    return {"number": number, **dict.fromkeys(CRITERIA, True), "required": question != INVENTED, "tag": tag}


Answer = Callable[[ChatRequest], "dict[str, Any] | str | Response"]


class ChatStub:
    """
    The running endpoint.

    Args:
        answer (`Callable`, *optional*, defaults to [`good_answer`]):
            Returns the answer as JSON, as text or as the whole response. It may be replaced while the endpoint runs.
        format_status (`int`, *optional*):
            Status code that refuses requests with a `response_format`. `None` accepts them.

    Attributes:
        url (`str`): Base URL for an OpenAI client.
        requests (`list[ChatRequest]`): All requests.
        bodies (`list[dict]`): Their bodies.
        keeps_requests (`bool`): Whether to record requests and bodies; 10,000 prompts would take hundreds of megabytes.
        num_asked (`Counter[str]`): Number of requests by kind.
    """

    def __init__(self, answer: Answer = good_answer, format_status: int | None = None) -> None:
        self.answer = answer
        self.format_status = format_status
        self.url = ""
        self.requests: list[ChatRequest] = []
        self.bodies: list[dict[str, Any]] = []
        self.keeps_requests = True
        self.num_asked: Counter[str] = Counter()
        self._seen: Counter[int] = Counter()

    def respond(self, body: dict[str, Any]) -> Response:
        request = self._read(body)
        self.num_asked[request.kind] += 1
        if self.keeps_requests:
            self.bodies.append(body)
            self.requests.append(request)
        if request.has_format and self.format_status is not None:
            error = {"message": "unknown field: response_format", "type": "invalid_request_error"}
            return JSONResponse({"error": error}, status_code=self.format_status)
        answer = self.answer(request)
        if isinstance(answer, Response):
            return answer
        return JSONResponse(completion(answer if isinstance(answer, str) else json.dumps(answer)))

    def _read(self, body: dict[str, Any]) -> ChatRequest:
        (message,) = body["messages"]
        text = message["content"]
        has_format = "response_format" in body
        if has_format:
            assert body["response_format"]["type"] == "json_schema"
            assert body["response_format"]["json_schema"]["strict"] is True
            shown = body["response_format"]["json_schema"]["schema"]
        else:
            # The answer of the worked example, if there is one.
            shown = next(json_objects(text), {"": None})
        prompts = re.findall(r'^Prompt: (".*")$', text, flags=re.MULTILINE)
        # The first ones belong to the worked example.
        asked = re.findall(r'^\d+\. \[\w+\] (".*")$', text[text.rfind("\nPrompt: ") :], flags=re.MULTILINE)
        self._seen[hash(text)] += 1
        return ChatRequest(
            text=text,
            kind=next(iter(shown.get("properties", shown))),
            prompt=json.loads(prompts[-1]) if prompts else None,
            questions=[json.loads(question) for question in asked],
            has_format=has_format,
            num_before=self._seen[hash(text)] - 1,
        )


def completion(content: str | None, finish_reason: str = "stop") -> dict[str, Any]:
    """The body of a chat completion."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
    return {"id": "0", "object": "chat.completion", "created": 0, "model": "stub", "choices": [choice]}


@contextmanager
def chat_stub(answer: Answer = good_answer, format_status: int | None = None) -> Iterator[ChatStub]:
    """Run the endpoint."""
    stub = ChatStub(answer, format_status)
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "stub", "object": "model", "created": 0, "owned_by": "tests"}]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return stub.respond(await request.json())

    with serve(app) as server:
        stub.url = f"{server.url}/v1"
        yield stub
