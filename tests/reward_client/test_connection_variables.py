# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os

import pytest

from alphagrpo_ext.reward_client.client import PaintRequest, RewardServerError
from alphagrpo_ext.reward_client.connection_variables import describe_unmade_client, proxy_hint


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().endswith("_PROXY") or name.startswith("SSL_CERT_"):
            monkeypatch.delenv(name)


def test_certificates_that_cannot_be_read_are_named(ask, server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such.pem")
    monkeypatch.setenv("SSL_CERT_DIR", "/etc/ssl/certs")
    with pytest.raises(RewardServerError, match="check the environment variable SSL_CERT_FILE='/no/such.pem'$"):
        ask(server.url, "generate", [PaintRequest("a")])


def test_proxy_that_no_client_can_use_is_named(ask, server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "gopher://user:secret@127.0.0.1:9")
    with pytest.raises(RewardServerError, match="cannot be asked: .*check the environment variable HTTP_PROXY$"):
        ask(server.url, "generate", [PaintRequest("a")])


def test_error_without_variables_is_described_alone() -> None:
    assert describe_unmade_client(OSError("no room")) == "OSError: no room"


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_proxy_out_of_reach_is_named(ask, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "http://user:secret@127.0.0.1:9")
    with pytest.raises(RewardServerError, match="is out of reach") as caught:
        ask("http://judge.example:8001", "generate", [PaintRequest("a")], max_retries=0)
    assert "Requests go through the proxy http://127.0.0.1:9: check" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_proxy_is_no_hint_where_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxy_hint("http://judge.example") == ""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert proxy_hint("http://judge.example") == ""
    assert "127.0.0.1:9" in proxy_hint("https://judge.example")
    monkeypatch.setenv("NO_PROXY", ".example")
    assert proxy_hint("https://judge.example") == ""
