# SPDX-License-Identifier: Apache-2.0

"""Who is let in."""

from __future__ import annotations

import httpx
import pytest

from reward_models.server.app import create_app
from reward_models.server.arguments import KEY_VARIABLE, ServerArguments, is_loopback, server_key
from support.server_samples import JSON, KEY, SAMPLE, ScenePainter, refusal, running


ROUTES = [("POST", "/score"), ("POST", "/generate"), ("POST", "/get_reward"), ("GET", "/metrics")]


def test_key_is_wanted_everywhere_but_for_health(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    wrong = ["", KEY, f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer", "Bearer x y", f"bearer x{KEY}"]
    with running(None, ScenePainter(), judge="shapes") as client:
        for method, path in [*ROUTES, ("GET", "/openapi.json"), ("GET", "/nothing")]:
            assert "Bearer <key>" in refusal(client.request(method, path), 401)
            for value in wrong:
                response = client.request(method, path, headers={"authorization": value})
                assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
            bytes_key = {b"authorization": b"Bearer \xff\xfe"}
            assert client.request(method, path, headers=bytes_key).status_code == 401
        assert client.get("/health").status_code == 200
        for scheme in ("Bearer", "bearer"):
            headers = {"authorization": f"{scheme} {KEY}"}
            assert client.post("/score", json={"items": [SAMPLE.score_item()]}, headers=headers).status_code == 200
            assert client.get("/metrics", headers=headers).status_code == 200


def test_key_is_checked_before_a_body_is_measured_or_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with running(judge="shapes", max_body_bytes=1000) as client:
        for body in (b"x" * 1001, b"{"):
            assert client.post("/score", content=body, headers=JSON).status_code == 401
        headers = JSON | {"authorization": f"Bearer {KEY}"}
        assert client.post("/score", content=b"x" * 1001, headers=headers).status_code == 413
        assert client.post("/score", content=b"{", headers=headers).status_code == 422


def test_key_that_no_client_can_send_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "k\u00e4se-key")
    with pytest.raises(ValueError, match=f"{KEY_VARIABLE} must consist of printable ASCII") as caught:
        server_key("127.0.0.1")
    assert "se-key" not in str(caught.value)


def test_without_a_key_nobody_is_asked_for_one(plain: httpx.Client) -> None:
    assert plain.get("/metrics", headers={"authorization": "Bearer x"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_server_that_others_reach_needs_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for empty in (None, "", " \n"):
        if empty is not None:
            monkeypatch.setenv(KEY_VARIABLE, empty)
        with pytest.raises(ValueError, match=f"set {KEY_VARIABLE}"):
            create_app(ServerArguments(host=host))
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    create_app(ServerArguments(host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    create_app(ServerArguments(host=host))
