# SPDX-License-Identifier: Apache-2.0

import asyncio
from typing import Any

import pytest

from alphagrpo_ext.reward_client.client import AsyncRewardClient, RewardClient
from alphagrpo_ext.reward_client.settings import ClientSettings
from support.reward_server import (  # noqa: F401
    clean_environment,
    example,
    free_port,
    load_file,
    make_server,
    server,
)


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Any:
    """Calls a method of either client and closes it."""

    async def ask_async(config: ClientSettings, method: str, *args: Any) -> Any:
        reward_client = AsyncRewardClient(config)
        try:
            return await getattr(reward_client, method)(*args)
        finally:
            await reward_client.aclose()

    def call(url: str, method: str, *args: Any, **settings: Any) -> Any:
        config = ClientSettings(server_url=url, **{"max_retries": 3, "timeout": 60.0, **settings})
        if request.param == "async":
            return asyncio.run(ask_async(config, method, *args))
        reward_client = RewardClient(config)
        try:
            return getattr(reward_client, method)(*args)
        finally:
            reward_client.close()

    return call
