# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image

from alphagrpo_ext.reward_client import client
from alphagrpo_ext.reward_client.client import Label, decode_image, encode_image
from alphagrpo_ext.reward_client.settings import PREFIX
from alphagrpo_ext.shapes.prompts import ObjectRequest, PromptSpec, prompts_of, quality_questions, semantic_questions
from alphagrpo_ext.shapes.scene import IMAGE_SIZE, render
from alphagrpo_ext.shapes.text import parse_thought
from reward_models.dvreward import DVReward
from reward_models.prompts.questions import from_row


PACKAGE = Path(client.__file__).parents[1] / "openrlhf"


@dataclass
class RewardServer:
    """
    The reward server's protocol around a painter that draws the scene which a thought plans, and gray where it plans none.
    Its judge is the real one of the shapes world. `faults` are answered first: status, headers and body, as bytes or as what
    JSON encodes.
    """

    key: str | None = None
    delay: float = 0.0
    url: str = ""
    faults: deque[tuple[int, dict[str, str], Any]] = field(default_factory=deque)
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    running: int = 0
    peak: int = 0

    @staticmethod
    def paint(text: str | None) -> Image.Image:
        scene = parse_thought(text or "")
        return Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "gray") if scene is None else render(scene)

    async def answer(self, request: Request) -> Response:
        body, path = await request.json(), request.url.path
        self.requests.append((path, body))
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await asyncio.sleep(self.delay)
            if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
                return JSONResponse({"detail": "wrong key"}, 401)
            if self.faults:
                status, headers, content = self.faults.popleft()
                kind = Response if isinstance(content, bytes) else JSONResponse
                return kind(content, status, headers)
            return JSONResponse(await {"/generate": self.generate, "/score": self.score}[path](body))
        finally:
            self.running -= 1

    async def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"images": [encode_image(self.paint(item["thought"])) for item in body["items"]]}

    async def score(self, body: dict[str, Any]) -> dict[str, Any]:
        images = [decode_image(item["image"]) for item in body["items"]]
        scores = await DVReward("shapes").score(images, [from_row(item) for item in body["items"]])
        fields = ("reward", "semantic", "quality", "strict_pass")
        return {"scores": [{name: getattr(score, name) for name in fields} for score in scores]}


@pytest.fixture
def make_server() -> Iterator[Callable[..., RewardServer]]:
    """Starts reward servers on loopback, each in a thread of its own."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(**settings: Any) -> RewardServer:
        reward_server = RewardServer(**settings)
        app = FastAPI()
        app.add_route("/{path:path}", reward_server.answer, methods=["POST"])
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        running.append((server, thread))
        reward_server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        return reward_server

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(timeout=60)


@pytest.fixture
def server(make_server: Callable[..., RewardServer]) -> RewardServer:
    return make_server()


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting from outside, and retries that do not take long."""
    for name in list(os.environ):
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)
    monkeypatch.setattr(client, "INITIAL_BACKOFF", 0.01)


@pytest.fixture
def load_file() -> Iterator[Callable[[str], ModuleType]]:
    """Loads a file of the plug-in as OpenRLHF does: by path, under a name of its own."""
    modules = []

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"loaded_{name}", PACKAGE / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        modules.append(module)
        return module

    yield load
    for module in modules:
        # OpenRLHF keeps the client of the reward file for as long as its process lives.
        if hasattr(module, "_client") and module._client.cache_info().currsize:
            module._client().close()


@dataclass(frozen=True)
class Example:
    """A request with its questions, and what a policy could write about it."""

    label: Label
    right: str = "<think> white : red circle top left </think>"
    wrong: str = "<think> white : blue square top left </think>"
    repair: str = (
        "<think> wrong : blue square top left must be red circle ; plan : white : red circle top left </think>"
    )


@pytest.fixture
def example() -> Example:
    spec = PromptSpec("colors", (ObjectRequest("circle", "red"),), "white")
    return Example(Label(prompts_of(spec)[0], semantic_questions(spec), quality_questions()))
