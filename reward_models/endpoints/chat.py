# SPDX-License-Identifier: Apache-2.0

"""A chat endpoint that speaks OpenAI's protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from reward_models.endpoints.endpoint import InvalidAnswerError, OpenAIEndpoint


if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletion


T = TypeVar("T")


class ChatEndpoint(OpenAIEndpoint):
    """
    A model behind an OpenAI-compatible chat endpoint. Arguments and errors are those of [`OpenAIEndpoint`]; without `model`,
    the only one that the endpoint serves is taken.
    """

    async def create(self, read: Callable[[ChatCompletion], T], **request: Any) -> T:
        """
        Ask for a chat completion and read the answer.

        Args:
            read (`Callable[[ChatCompletion], T]`):
                Takes from the completion what was asked for. What it raises as [`InvalidAnswerError`] counts as a fault
                of the endpoint, and the request is tried again.
            request:
                Arguments of OpenAI's `chat.completions.create` but for `model`, e.g. `messages` and `max_tokens`.

        Raises:
            `openai.OpenAIError`, `TimeoutError` or [`InvalidAnswerError`]: The error of the last try.
        """
        from openai.types.chat import ChatCompletion

        async def attempt(client: AsyncOpenAI) -> T:
            completion = await client.chat.completions.create(model=await self._model_name(client), **request)
            # A body that does not call itself JSON comes back as a plain string.
            if not isinstance(completion, ChatCompletion) or not completion.choices:
                raise InvalidAnswerError(f"expected a chat completion, got {str(completion)[:200]!r}")
            return read(completion)

        return await self.request(attempt)

    async def _model_name(self, client: AsyncOpenAI) -> str:
        if self.model is None:
            names = [model.id async for model in client.models.list()]
            if len(names) != 1:
                raise ValueError(
                    f"{client.base_url} serves {len(names)} models ({', '.join(names)}): name one of them"
                )
            self.model = names[0]
        return self.model
