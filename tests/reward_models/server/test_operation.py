# SPDX-License-Identifier: Apache-2.0

"""Arguments, health, metrics and logs."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
import pytest
from trl import TrlParser

from alphagrpo_ext import __version__
from reward_models.server.app import create_app
from reward_models.server.arguments import KEY_VARIABLE, ServerArguments
from support.server_samples import KEY, SAMPLE, ScenePainter, metric, running, wait_until


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_items": 0}, "max_items must be at least 1, but is 0"),
        ({"max_questions": 0}, "max_questions must be at least 1"),
        ({"max_body_bytes": 0}, "max_body_bytes must be at least 1"),
        ({"max_queue": 0}, "max_queue must be at least 1"),
        ({"max_image_side": 0}, "max_image_side must be at least 1"),
        (
            {"painter": "openai", "image_height": 2304, "image_width": 2304},
            "image_width=2304 and image_height=2304 .*: raise max_image_side=4096 or max_image_pixels=4194304",
        ),
        ({"max_connections": 0}, "max_connections must be at least 1"),
        ({"request_timeout": 0.0}, "request_timeout must be positive"),
        ({"request_timeout": float("nan")}, "request_timeout must be positive, but is nan"),
        ({"request_timeout": float("inf")}, "request_timeout must be positive"),
        ({"shutdown_timeout": -1}, "shutdown_timeout must not be negative"),
        ({"port": 70_000}, "port must be in"),
        ({"judge": "shape"}, "unknown judge 'shape'. Did you mean 'shapes'"),
        ({"painter": "policy", "image_height": 20}, "the judge 'shapes' reads images of 24 x 24 pixels"),
    ],
)
def test_bad_arguments_are_named_at_the_start(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_app(ServerArguments(**changes))


def test_command_line_has_every_argument() -> None:
    command = "--judge shapes --painter policy --port 9000 --max_queue 5 --request_timeout 7.5 --cfg_interval 0.1 0.9"
    (args,) = TrlParser((ServerArguments,)).parse_args_and_config(command.split())
    assert (args.port, args.host, args.max_queue, args.request_timeout) == (9000, "127.0.0.1", 5, 7.5)
    assert (args.judge, args.painter, args.painter_model, args.cfg_interval) == (
        "shapes",
        "policy",
        "bagel-shapes",
        [0.1, 0.9],
    )


def test_policy_can_be_painter_and_judge_at_once() -> None:
    with running(judge="policy", painter="policy") as client:
        answer = client.post("/get_reward", json=SAMPLE.reward_body()).json()
        assert 0.0 <= answer["rewards"][0] <= 1.0


def test_health_says_what_is_running(shapes: httpx.Client, plain: httpx.Client) -> None:
    expected = {"status": "ok", "version": __version__, "judge": "shapes"}
    assert shapes.get("/health").json() == {**expected, "painter": "policy"}
    assert plain.get("/health").json() == {**expected, "painter": "none"}


def test_protocol_is_described(plain: httpx.Client) -> None:
    paths = plain.get("/openapi.json").json()["paths"]
    assert sorted(paths) == ["/generate", "/get_reward", "/health", "/metrics", "/score"]
    assert "/openapi.json" in plain.get("/docs").text


def test_metrics_count_what_happened() -> None:
    with running(judge="shapes") as client, running(judge="shapes") as other:
        client.post("/score", json={"items": [SAMPLE.score_item()] * 3})
        client.post("/score", json={})
        client.post("/generate", json={"items": []})
        for name in ("a", "b"):
            client.get(f"/{name}")
        response = client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        assert metric(client, "alphagrpo_requests_total", path="/score", status="200") == 1
        assert metric(client, "alphagrpo_requests_total", path="/score", status="422") == 1
        assert metric(client, "alphagrpo_requests_total", path="/generate", status="501") == 1
        assert metric(client, "alphagrpo_requests_total", path="other", status="404") == 2
        assert metric(client, "alphagrpo_request_seconds_count", path="/score") == 2
        assert metric(client, "alphagrpo_request_seconds_sum", path="/score") > 0
        assert metric(client, "alphagrpo_images_scored_total") == 3
        assert metric(client, "alphagrpo_images_failed_total") == 0
        assert metric(client, "alphagrpo_queue_length") == 0
        # Two servers of one process do not share their metrics.
        assert metric(other, "alphagrpo_images_scored_total") == 0


def test_every_request_is_one_line_without_secrets(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    caplog.set_level(logging.INFO)
    item, headers = SAMPLE.score_item(), {"authorization": f"Bearer {KEY}"}
    with running(None, ScenePainter(), judge="shapes") as client:
        client.post("/score?secret=query", json={"items": [item] * 2}, headers=headers)
        client.post("/generate", json={"items": [{"prompt": item["prompt"]}]}, headers=headers)
        client.post("/get_reward", json=SAMPLE.reward_body(), headers=headers)
        client.post("/score", json={"items": [{**item, "image": "?"}]}, headers=headers)
        client.post("/score", json={"items": 3}, headers=headers)
        client.get("/" + "x" * 300 + "%0A", headers={"authorization": "Bearer wrong-key"})
        client.get("/health")
        wait_until(lambda: len([r for r in caplog.records if r.name == "reward_models.server.request_log"]) == 7)
    lines = [record.getMessage() for record in caplog.records if record.name == "reward_models.server.request_log"]
    records = [json.loads(line) for line in lines]
    assert not any("\n" in line for line in lines)
    assert [(r["path"], r["status"], r["items"]) for r in records] == [
        ("/score", 200, 2),
        ("/generate", 200, 1),
        ("/get_reward", 200, 1),
        ("/score", 422, 1),
        ("/score", 422, None),
        ("/" + "x" * 199, 401, None),
        ("/health", 200, None),
    ]
    assert all(sorted(r) == ["client", "items", "path", "seconds", "status"] for r in records)
    assert all(r["client"] == "127.0.0.1" and 0 < r["seconds"] < 60 for r in records)
    everything = "\n".join(lines)
    for secret in (KEY, "wrong-key", "secret", item["prompt"], item["image"][:40], SAMPLE.plan):
        assert secret not in everything
