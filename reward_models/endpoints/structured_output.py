# SPDX-License-Identifier: Apache-2.0

"""Answers of a chat endpoint as pydantic models, whether or not the endpoint can be constrained to a JSON schema."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from alphagrpo_ext.ranges import NonNegativeFloat, PositiveInt, check_ranges
from reward_models.endpoints.answers import ChatChoice
from reward_models.endpoints.endpoint import OpenAIEndpoint
from reward_models.endpoints.errors import EndpointError, InvalidAnswerError, describe_mismatch
from reward_models.endpoints.kept_settings import kept_settings
from reward_models.endpoints.thoughts import end_of_thought


logger = logging.getLogger(__name__)

MAX_STARTS = 1000
"""Number of opening braces in an answer at which an object is looked for. Formulas and drafts before it have dozens."""
MAX_READS = 8
"""How many times the length of an answer is read in the search. Each opening brace may begin an object that is damaged at its end."""

_REFUSAL_STATUS_CODES = (400, 404, 422)


def check_unicode(text: str) -> str:
    """
    Return the text unchanged if it is valid Unicode. JSON can encode half a surrogate pair, but no tokenizer and no file in
    UTF-8 can hold it.

    Raises:
        `ValueError`: If it holds half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text is not valid Unicode: it holds half a surrogate pair") from error
    return text


UnicodeText = Annotated[str, AfterValidator(check_unicode)]


class StructuredAnswer(BaseModel):
    """
    Base class of the answers that [`StructuredChat`] asks for. Types are strict. The schema allows no other fields, but an
    answer may have them: they are dropped. The docstring of a subclass and the descriptions of its fields are part of the
    schema that the endpoint receives.
    """

    model_config = ConfigDict(strict=True, json_schema_extra={"additionalProperties": False})


AnswerT = TypeVar("AnswerT", bound=StructuredAnswer)
T = TypeVar("T")


@dataclass
class StructuredChat:
    """
    Asks a chat endpoint for JSON that fits a pydantic model.

    The schema is sent as `response_format`. If the endpoint refuses that, this request and all later ones are sent without
    it. In both cases an answer may have text around the JSON, but the JSON must fit the model. An answer that
    does not fit is asked for again, up to the endpoint's `max_retries`.

    Args:
        endpoint ([`OpenAIEndpoint`]):
            The endpoint.
        max_tokens (`int`, *optional*):
            Longest answer, in tokens. `None` leaves the limit to the endpoint.
        temperature (`float`, *optional*, defaults to `0.0`):
            Temperature of the answers. At 0 a retry may get the same answer again.
        extra_body (`dict`, *optional*):
            Further fields of a request.

    Raises:
        `ValueError`: If an argument is out of range.
    """

    endpoint: OpenAIEndpoint
    max_tokens: PositiveInt | None = None
    temperature: NonNegativeFloat = 0.0
    extra_body: dict[str, Any] | None = None
    takes_schema: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_ranges(self)
        # As it was given: an endpoint without a name of a model learns one from the first answer.
        self._named_model = self.endpoint.model

    @property
    def run_settings(self) -> dict[str, Any]:
        """What the answers depend on beside the request, without a key or an address."""
        return kept_settings(self._named_model, self.extra_body, temperature=self.temperature)

    async def ask(
        self,
        request: str,
        answer_type: type[AnswerT],
        read: Callable[[AnswerT], T] = lambda answer: answer,
    ) -> T:
        """
        Ask for an answer that fits a model.

        Args:
            request (`str`):
                The request. It describes the answer, at best by an example, since not every endpoint receives the schema.
            answer_type (`type[StructuredAnswer]`):
                Model of the answer.
            read (`Callable[[StructuredAnswer], T]`, *optional*):
                Checks and converts an answer that fits the model. If it raises [`InvalidAnswerError`], the endpoint is asked
                again. The default returns the answer unchanged.

        Raises:
            [`EndpointError`] or [`InvalidAnswerError`]: As in [`OpenAIEndpoint.complete_chat`].
        """

        def read_choice(choice: ChatChoice) -> T:
            return read(_parse_choice(choice, answer_type))

        refusal: EndpointError | None = None
        if self.takes_schema:
            json_schema = {"name": answer_type.__name__, "strict": True, "schema": answer_type.model_json_schema()}
            response_format = {"type": "json_schema", "json_schema": json_schema}
            try:
                return await self._complete(read_choice, request, response_format=response_format)
            except EndpointError as error:
                # Some servers fail with a 500 where they should refuse.
                if error.status_code not in _REFUSAL_STATUS_CODES and "response_format" not in str(error):
                    raise
                refusal = error

        def read_plain_choice(choice: ChatChoice) -> T:
            # An answer shows that the endpoint had refused the schema and not the rest of the request.
            if refusal is not None:
                self._stop_sending_schema(refusal)
            return read_choice(choice)

        return await self._complete(read_plain_choice, request)

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        await self.endpoint.aclose()

    async def _complete(self, read: Callable[[ChatChoice], T], request: str, **arguments: Any) -> T:
        if self.max_tokens is not None:
            arguments["max_tokens"] = self.max_tokens
        return await self.endpoint.complete_chat(
            read,
            messages=[{"role": "user", "content": request}],
            temperature=self.temperature,
            extra_body=self.extra_body,
            **arguments,
        )

    def _stop_sending_schema(self, refusal: Exception) -> None:
        if self.takes_schema:
            self.takes_schema = False
            logger.warning(
                "%r does not accept a JSON schema as response_format (%s); later requests are sent without it",
                self.endpoint,
                str(refusal)[:300],
            )


def json_objects(text: str) -> Iterator[dict[str, Any]]:
    """
    Yield the outermost JSON objects in a text, in order, whatever text is around them. The search ends after [`MAX_STARTS`] opening
    braces, or [`MAX_READS`] times the length of the text.
    """
    # A reasoning model may think aloud first, often in drafts of the answer.
    text = text[end_of_thought(text) :]
    # Models write line breaks into strings without escaping them.
    decoder = json.JSONDecoder(strict=False)
    position, left = text.find("{"), MAX_READS * len(text)
    for _ in range(MAX_STARTS):
        if position == -1 or left < 0:
            return
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            end = position + 1
            # Where nothing says how far it got, it got to the end.
            left -= getattr(error, "pos", len(text)) - position
        else:
            yield value
        position = text.find("{", end)


def parse_answer(text: str, answer_type: type[AnswerT]) -> AnswerT:
    """
    Return the first JSON object in a text that fits a model, as an instance of the model.

    Raises:
        [`InvalidAnswerError`]: If no object fits. The message names the fields that are wrong in the longest object.
    """
    mismatches = []
    for value in json_objects(text):
        try:
            return answer_type.model_validate(value)
        except ValidationError as error:
            mismatches.append((len(str(value)), describe_mismatch(error)))
    if not mismatches:
        raise InvalidAnswerError(f"the answer holds no JSON object: {text[:200]!r}")
    raise InvalidAnswerError(max(mismatches)[1])


def _parse_choice(choice: ChatChoice, answer_type: type[AnswerT]) -> AnswerT:
    if not choice.message.content:
        raise InvalidAnswerError(f"the answer has no text ({choice.message.refusal or choice.finish_reason})")
    try:
        return parse_answer(choice.message.content, answer_type)
    except InvalidAnswerError as error:
        if choice.finish_reason == "length":
            raise InvalidAnswerError(
                f"the answer was cut off, at max_tokens or at the end of the model's context: {error}"
            ) from error
        raise
