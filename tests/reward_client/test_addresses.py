# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest

from alphagrpo_ext.reward_client.addresses import is_header_text, is_http_address, without_password


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:8001",
        "https://judge.example/v1/",
        "http://[::1]:8000/v1",
        "http://user:password@10.0.0.1",
        "http://b\u00fccher.example",
        "http://my_host/with space",
    ],
)
def test_addresses_that_can_be_asked(url: str) -> None:
    assert is_http_address(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8001",
        "ftp://a",
        "http://",
        "http:///v1",
        "http://a:99999",
        "http://a:0",
        "http://a:b",
        "http://[::1",
        "http://a..b",
        "http://" + "a" * 64,
        "http://a b/v1",
        " http://a",
        "http://a\n",
    ],
)
def test_addresses_that_cannot_be_asked(url: str) -> None:
    assert not is_http_address(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:password@host:1/v1?key=password", "http://host:1/v1"),
        ("user:password@host:1", "host:1"),
        ("http://user:password@[::1", "http://[::1"),
        ("localhost:8001", "localhost:8001"),
    ],
)
def test_passwords_of_addresses_are_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown


@pytest.mark.parametrize(("text", "is_sent"), [("sk-1 2/+=~", True), ("k\u00e4se", False), ("a\nb", False)])
def test_texts_of_headers(text: str, is_sent: bool) -> None:
    assert is_header_text(text) is is_sent
