# SPDX-License-Identifier: Apache-2.0

"""The server as a process: start, end, and many clients at once."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import uvicorn

from reward_models.dvreward import DVReward
from reward_models.server.app import create_app
from reward_models.server.arguments import KEY_VARIABLE, ServerArguments
from support.readme_commands import blocks
from support.server_samples import JSON, SAMPLE, SAMPLES, GatedJudge, ScenePainter, wait_until


def test_requests_under_way_are_finished_before_judge_and_painter_are_closed() -> None:
    judge, painter = GatedJudge(), ScenePainter()
    app = create_app(ServerArguments(), DVReward(judge), painter)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=60))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with ThreadPoolExecutor(1) as pool:
        body = {"items": [SAMPLE.score_item()]}
        under_way = pool.submit(httpx.post, f"{url}/score", json=body, timeout=60)
        wait_until(lambda: judge.waiting == 1)
        server.should_exit = True
        with pytest.raises(httpx.TransportError):
            # What was accepted before the port closed may still be answered.
            while httpx.get(f"{url}/health", timeout=60):
                time.sleep(0.01)
        assert not judge.closed and not painter.closed
        judge.gate.set()
        assert under_way.result().json()["scores"][0]["reward"] == 1.0
    thread.join(60)
    assert not thread.is_alive()
    assert judge.closed and painter.closed


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server_process(*options: str) -> Iterator[tuple[subprocess.Popen, str]]:
    port = free_port()
    command = [sys.executable, "-m", "reward_models.server", "--port", str(port), *options]
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    # Read all the time, or a full pipe would halt the server.
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None and time.monotonic() < deadline, "".join(lines)
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        process.lines = lines
        yield process, url
    finally:
        process.kill()
        process.wait()
        reader.join()


@pytest.mark.slow
def test_process_refuses_to_be_open_to_others() -> None:
    command = [sys.executable, "-m", "reward_models.server", "--host", "0.0.0.0", "--port", str(free_port())]
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert result.returncode != 0
    assert f"set {KEY_VARIABLE}" in result.stderr


@pytest.mark.slow
def test_process_finishes_what_is_under_way_when_it_is_told_to_stop() -> None:
    # Long enough to be under way, and patience enough for a busy machine.
    steps = ["--painter", "policy", "--num_timesteps", "400", "--painter_batch_size", "1", "--shutdown_timeout", "170"]
    with server_process(*steps) as (process, url), ThreadPoolExecutor(1) as pool:
        body = {"items": [{"prompt": "x", "seed": i} for i in range(2)]}
        under_way = pool.submit(httpx.post, f"{url}/generate", json=body, timeout=180)
        wait_until(lambda: "alphagrpo_queue_length 1.0" in httpx.get(f"{url}/metrics", timeout=60).text)
        process.send_signal(signal.SIGTERM)
        assert under_way.result().status_code == 200
        process.wait(60)
        line = next(line for line in process.lines if '"/generate"' in line)
        assert json.loads(line)["status"] == 200


@dataclass
class Load:
    """What many clients at once have seen, and the server's memory meanwhile."""

    statuses: dict[int, int]
    memory: list[tuple[float, int]]


async def press(url: str, process: psutil.Process, num_clients: int, seconds: float) -> Load:
    load, end = Load({}, []), time.monotonic() + seconds
    bodies = [json.dumps({"items": [sample.score_item()] * 2}) for sample in SAMPLES]

    async def client(index: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            while time.monotonic() < end:
                response = await http.post("/score", content=bodies[index % len(bodies)], headers=JSON)
                load.statuses[response.status_code] = load.statuses.get(response.status_code, 0) + 1
                if response.status_code == 429:
                    await asyncio.sleep(float(response.headers["retry-after"]))

    async def watch() -> None:
        while time.monotonic() < end:
            load.memory.append((time.monotonic(), process.memory_info().rss))
            await asyncio.sleep(0.25)

    await asyncio.gather(watch(), *(client(index) for index in range(num_clients)))
    return load


@pytest.mark.slow
def test_two_hundred_clients_for_a_minute() -> None:
    with server_process("--judge", "shapes") as (process, url):
        load = asyncio.run(press(url, psutil.Process(process.pid), num_clients=200, seconds=60))
        assert set(load.statuses) <= {200, 429}
        assert load.statuses[200] > 200
        middle = (load.memory[0][0] + load.memory[-1][0]) / 2
        first, second = ([rss for at, rss in load.memory if (at < middle) is half] for half in (True, False))
        print(f"{load.statuses}, RSS up to {max(first) / 1e6:.0f} MB, then {max(second) / 1e6:.0f} MB")  # noqa: T201
        assert max(second) <= 1.1 * max(first)
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        assert "alphagrpo_queue_length 0.0" in httpx.get(f"{url}/metrics", timeout=60).text
        lines = [json.loads(line) for line in process.lines if line.startswith('{"path": "/score"')]
        assert len(lines) == sum(load.statuses.values())


@pytest.mark.slow
def test_the_commands_of_the_readme_work(tmp_path: Path) -> None:
    (block,) = [block for block in blocks("reward_models/README.md", "bash") if "curl" in block]
    assert {"/health", "/metrics", "/generate", "/score", "/get_reward"} == set(re.findall(r":8001(/\w+)", block))
    with server_process("--painter", "policy") as (_, url):
        script = "set -e\n" + block.replace("http://127.0.0.1:8001", url)
        result = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert '"status":"ok"' in result.stdout
    scores, rewards = (
        re.search(r'\{"scores":\[\{"reward":([\d.e-]+)', result.stdout),
        re.search(r'"rewards":\[([\d.e-]+)', result.stdout),
    )
    assert 0 <= float(scores[1]) <= 1 and 0 <= float(rewards[1]) <= 1
