# SPDX-License-Identifier: Apache-2.0

"""An endpoint on loopback whose answers a test scripts, down to single bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response

from support.loopback import serve


@dataclass
class Reply:
    """
    An answer.

    Args:
        content (`Any`): Body, as bytes or as what JSON encodes. NaN and infinity are written as Python writes them.
        status (`int`): Status code.
        headers (`Mapping[str, str]`): Further headers.
    """

    content: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    def response(self) -> Response:
        body = self.content if isinstance(self.content, bytes) else json.dumps(self.content).encode()
        return Response(body, self.status, {"content-type": "application/json", **self.headers})


@dataclass
class ScriptedEndpoint:
    """
    The running endpoint.

    Args:
        answer (`Callable[[dict, int], Reply]`): Answers a POST, from its body and its number from 0.
        models (`Reply`): Answers the list of models.
        root (`str`): Its URL without path.
        bodies (`list[dict]`): Bodies of all POSTs.
        headers (`list[Mapping[str, str]]`): Their headers.
    """

    answer: Callable[[dict[str, Any], int], Reply]
    models: Reply = field(default_factory=lambda: Reply({"data": [{"id": "judge"}]}))
    root: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{self.root}/v1"


@contextmanager
def scripted_endpoint(answer: Callable[[dict[str, Any], int], Reply] | Reply) -> Iterator[ScriptedEndpoint]:
    """Run an endpoint. One reply answers everything."""
    endpoint = ScriptedEndpoint(answer if callable(answer) else lambda body, number: answer)
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> Response:
        return endpoint.models.response()

    @app.post("/v1/{route:path}")
    async def post(route: str, request: Request) -> Response:
        endpoint.headers.append(request.headers)
        endpoint.bodies.append(await request.json())
        return endpoint.answer(endpoint.bodies[-1], len(endpoint.bodies) - 1).response()

    with serve(app) as server:
        endpoint.root = server.url
        yield endpoint


def chat_body(
    text: str | None = "Yes", tokens: Sequence[tuple[str, Sequence[tuple[str, Any]]]] | None = None
) -> dict[str, Any]:
    """A chat completion; `tokens` are the written tokens, each with its candidates and their log-probabilities."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    if tokens is not None:
        choice["logprobs"] = {
            "content": [
                {
                    "token": token,
                    "logprob": -0.1,
                    "top_logprobs": [{"token": name, "logprob": value} for name, value in candidates],
                }
                for token, candidates in tokens
            ]
        }
    return {"id": "0", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}
