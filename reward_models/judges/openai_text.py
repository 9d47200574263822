# SPDX-License-Identifier: Apache-2.0

"""A judge of texts behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from typing import Any

from reward_models.endpoints.endpoint import OpenAIEndpoint
from reward_models.endpoints.structured_output import AnswerT, StructuredChat
from reward_models.judges.base import TextJudge


class OpenAITextJudge(TextJudge):
    """
    Asks a language model behind an OpenAI-compatible endpoint, e.g. for [`~reward_models.format.ReflectionStructure`]. See
    [`StructuredChat`] for the format of the answers.

    Args:
        base_url, model, api_key, max_concurrency, timeout, max_retries:
            As in [`OpenAIEndpoint`].
        max_tokens, temperature, extra_body:
            As in [`StructuredChat`]. At temperature 0 equal texts get equal verdicts, as far as the endpoint allows.

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
        endpoint = OpenAIEndpoint(base_url, model, api_key, max_concurrency, timeout, max_retries)
        self.chat = StructuredChat(endpoint, max_tokens, temperature, extra_body)

    async def complete(self, request: str, answer_type: type[AnswerT]) -> AnswerT:
        return await self.chat.ask(request, answer_type)

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        await self.chat.aclose()
