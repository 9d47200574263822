# SPDX-License-Identifier: Apache-2.0

"""A judge of texts behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
from typing import Any

from reward_models.endpoints.chat import ChatEndpoint
from reward_models.endpoints.structured_output import StructuredChat
from reward_models.judges.base import TextJudge


class OpenAITextJudge(TextJudge):
    """
    Asks a language model behind an OpenAI-compatible endpoint, e.g. for [`~reward_models.format.ReflectionStructure`]. See
    [`StructuredChat`] for how its answers get their form; one that does not fit the schema is asked for again.

    Args:
        base_url, model, api_key, max_concurrency, timeout, max_retries:
            As in [`ChatEndpoint`].
        max_tokens (`int`, *optional*, defaults to `1024`):
            Longest answer, in tokens. `None` leaves it to the endpoint.
        temperature (`float`, *optional*, defaults to `0.0`):
            Temperature of the answers. At 0 equal texts get equal verdicts, as far as the endpoint allows.
        extra_body (`dict`, *optional*):
            Further fields of a request, e.g. `{"chat_template_kwargs": {"enable_thinking": False}}`.

    Example:

    ```python
    >>> reward = ReflectionStructure(OpenAITextJudge("http://localhost:8000/v1"))
    ```
    """

    def __init__(
        self,
        base_url: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
        max_concurrency: int = 64,
        timeout: float = 60.0,
        max_retries: int = 8,
        max_tokens: int | None = 1024,
        temperature: float = 0.0,
        extra_body: dict[str, Any] | None = None,
    ) -> None:
        endpoint = ChatEndpoint(base_url, model, api_key, max_concurrency, timeout, max_retries)
        self.chat = StructuredChat(endpoint, max_tokens, temperature, extra_body)

    async def complete(self, request: str, schema: dict[str, Any]) -> str:
        return json.dumps(await self.chat.ask(request, "answer", schema), ensure_ascii=False)

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        await self.chat.aclose()
