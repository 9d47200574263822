# Copyright 2026 The AlphaGRPO-Ext Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""A chat endpoint that speaks OpenAI's protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from reward_models.endpoint import InvalidAnswerError, OpenAIEndpoint


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
