# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest

from alphagrpo_ext.reward_client.settings import ClientSettings


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "http://[::1", "http://", "http://a b"])
def test_address_that_cannot_be_asked_is_named(url: str) -> None:
    with pytest.raises(ValueError, match="ALPHAGRPO_SERVER_URL must be http:// or https:// and a host") as caught:
        ClientSettings(server_url=url)
    assert str(caught.value).endswith(f"but is {url!r}")


@pytest.mark.parametrize("url", ["user:secret@host", "http://user:secret@host:99999"])
def test_password_of_an_address_is_not_printed(url: str) -> None:
    with pytest.raises(ValueError, match="host") as caught:
        ClientSettings(server_url=url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["k\u00e4se-key", "first\nsecond", "nul\0l"])
def test_key_that_cannot_be_sent_is_named_and_not_printed(key: str) -> None:
    with pytest.raises(ValueError, match="ALPHAGRPO_SERVER_KEY must consist of printable ASCII characters") as caught:
        ClientSettings(server_key=key)
    assert key[:3] not in str(caught.value)


def test_white_space_around_a_key_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPHAGRPO_SERVER_KEY", " a-key\n")
    assert ClientSettings().server_key.get_secret_value() == "a-key"
