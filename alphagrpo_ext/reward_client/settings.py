# SPDX-License-Identifier: Apache-2.0

"""
Settings of the reward client, read from environment variables.

OpenRLHF passes nothing to the files that it loads, so there is no command line and no configuration file here. Nothing heavy is
imported.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, SecretStr, StringConstraints, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from alphagrpo_ext.reward_client.addresses import is_header_text, is_http_address, without_password


PREFIX = "ALPHAGRPO_"
# A misspelt name is at least this similar to the right one. Variables of other programs are less similar.
SIMILARITY = 0.85


def _checked_address(url: str) -> str:
    if not is_http_address(url):
        raise ValueError("must be http:// or https:// and a host, perhaps with a port of at most 65535 and a path")
    return url


def _checked_key(key: SecretStr) -> SecretStr:
    value = key.get_secret_value().strip()
    if not is_header_text(value):
        raise ValueError("must consist of printable ASCII characters, since it is sent in a header")
    return SecretStr(value)


ServerURL = Annotated[
    str, StringConstraints(strip_whitespace=True, pattern="^https?://"), AfterValidator(_checked_address)
]
ServerKey = Annotated[SecretStr, AfterValidator(_checked_key)]


class ClientSettings(BaseSettings):
    """
    How the reward server is reached.

    A field that is not passed is read from the environment variable `ALPHAGRPO_` plus its name in capitals: `server_url`
    from `ALPHAGRPO_SERVER_URL`. An empty variable counts as not set.

    Args:
        server_url (`str`, *optional*, defaults to `"http://127.0.0.1:8001"`):
            URL of the reward server.
        server_key (`SecretStr`, *optional*):
            Bearer key of the reward server, if it requires one. It is never printed.
        timeout (`float`, *optional*, defaults to `180.0`):
            Seconds that one attempt of a request may take, and the longest wait that the server can ask for by `Retry-After`.
        max_retries (`int`, *optional*, defaults to `10`):
            Number of further attempts. Ten attempts take about two and a half minutes if no connection can be made.
        max_concurrency (`int`, *optional*, defaults to `8`):
            Number of requests that one process has open at the server; further ones wait. Each vLLM engine is a process. All
            of them together should not open more requests than the server's `max_queue`, 64 by default.
        max_answer_bytes (`int`, *optional*, defaults to `2**26`):
            Largest answer, as it is sent and after decompression. Eight images of 1024 pixels are about 20 MB.
        seed (`int`, *optional*):
            If set, the noise of an image follows from the seed, the prompt and the turn. It is then equal for a whole group,
            so that rewards in the group differ by their texts only. If not set, the server draws the noise.

    Raises:
        `ValueError`: If a value is invalid or a variable's name looks misspelt; the message names the environment variable.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    server_url: ServerURL = "http://127.0.0.1:8001"
    server_key: ServerKey | None = None
    timeout: float = Field(180.0, gt=0, allow_inf_nan=False)
    max_retries: int = Field(10, ge=0)
    max_concurrency: int = Field(8, ge=1)
    max_answer_bytes: int = Field(2**26, ge=1)
    seed: int | None = None

    def __init__(self, **values: Any) -> None:
        check_spelling(type(self).model_fields)
        try:
            super().__init__(**values)
        except ValidationError as error:
            # Not chained: Pydantic's own message would print a key.
            raise ValueError("; ".join(describe_error(part, self.setting_name) for part in error.errors())) from None

    @classmethod
    def setting_name(cls, field: str) -> str:
        """What messages call a field: the name by which a user sets it, here its environment variable."""
        return variable(field)

    @model_validator(mode="before")
    @classmethod
    def drop_empty_values(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Leave out values that are blank, so that fields keep their defaults."""
        return {name: value for name, value in values.items() if not isinstance(value, str) or value.strip()}


def variable(name: str) -> str:
    """The environment variable of a field of [`ClientSettings`] or of a subclass."""
    return PREFIX + name.upper()


def check_spelling(fields: Iterable[str]) -> None:
    """
    Look for environment variables whose names are nearly those of settings.

    Args:
        fields (`Iterable[str]`): Names of the settings.

    Raises:
        `ValueError`: If there is one; the message names the variable that is probably meant.
    """
    known = [variable(name) for name in fields]
    for name in os.environ:
        if name.startswith(PREFIX) and name not in known:
            similar = difflib.get_close_matches(name, known, n=1, cutoff=SIMILARITY)
            if similar:
                raise ValueError(f"there is no environment variable {name}; did you mean {similar[0]}?")


def describe_error(error: Mapping[str, Any], setting_name: Callable[[str], str]) -> str:
    """One of Pydantic's errors in a sentence that names the setting."""
    name = str(error["loc"][0])
    expected = {
        "bool_parsing": "must be true or false",
        "string_pattern_mismatch": "must start with http:// or https://",
    }
    rule = error["msg"].removeprefix("Value error, ").replace("Input should", "must")
    shown = without_password(str(error["input"])) if name == "server_url" else error["input"]
    value = "" if name == "server_key" else f", but is {shown!r}"
    return f"{setting_name(name)} {expected.get(error['type'], rule)}{value}"
