# SPDX-License-Identifier: Apache-2.0

"""Answers in JSON from a chat endpoint, whether or not it can be held to a schema."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from reward_models.endpoints.chat import ChatEndpoint
from reward_models.endpoints.endpoint import InvalidAnswerError


if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion


logger = logging.getLogger(__name__)

T = TypeVar("T")

REFUSAL_STATUS_CODES = (400, 404, 422)
"""With which endpoints answer that they do not know a field of a request."""

_PYTHON_TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}
# The request comes last, so that what it asks about stands nearest to the answer.
_PLAIN_REQUEST = """\
Answer with one JSON object and nothing else. It fits this JSON schema:
{schema}

{request}"""


class StructuredChat:
    """
    Asks a chat endpoint for JSON that fits a schema.

    The schema goes along as `response_format`. Where the endpoint refuses that, the request says in words what is wanted,
    then and from then on. Either way an answer is read tolerantly, with text around the JSON, and checked strictly: one
    that does not fit is asked for again, as often as the endpoint's `max_retries` says.

    Args:
        endpoint ([`ChatEndpoint`]):
            Who is asked.
        max_tokens (`int`, *optional*):
            Longest answer, in tokens. `None` leaves it to the endpoint.
        temperature (`float`, *optional*, defaults to `0.0`):
            Temperature of the answers. Only above 0 can another try differ from the one before.
        extra_body (`dict`, *optional*):
            Further fields of a request.

    Raises:
        `ValueError`: If an argument is out of range.
    """

    def __init__(
        self,
        endpoint: ChatEndpoint,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        extra_body: dict[str, Any] | None = None,
    ) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1 or None, but is {max_tokens}")
        if temperature < 0:
            raise ValueError(f"temperature must not be negative, but is {temperature}")
        self.endpoint = endpoint
        self.takes_schema = True
        self._settings: dict[str, Any] = {"temperature": temperature, "extra_body": extra_body}
        if max_tokens is not None:
            self._settings["max_tokens"] = max_tokens

    async def ask(
        self,
        request: str,
        name: str,
        schema: dict[str, Any],
        read: Callable[[Any], T] = lambda value: value,
        shows_answer: bool = False,
    ) -> T:
        """
        Args:
            request (`str`):
                What is asked.
            name (`str`):
                Name of the schema: letters, digits, `_` and `-`.
            schema (`dict[str, Any]`):
                JSON schema of the answer, an object; see [`fit_to_schema`] for what it may say.
            read (`Callable[[Any], T]`, *optional*):
                Checks and converts an answer that fits the schema. Where it raises [`InvalidAnswerError`], the endpoint is
                asked again. The default leaves the answer as it is.
            shows_answer (`bool`, *optional*, defaults to `False`):
                Whether the request shows by an example what the answer looks like. It then never needs the schema in words,
                which small models rather copy than follow.

        Raises:
            `openai.OpenAIError`, `TimeoutError` or [`InvalidAnswerError`]: The error of the last try.
        """
        from openai import APIStatusError

        def read_completion(completion: ChatCompletion) -> T:
            return read(read_answer(completion, schema))

        refusal: APIStatusError | None = None
        if self.takes_schema:
            json_schema = {"name": name, "strict": True, "schema": schema}
            response_format = {"type": "json_schema", "json_schema": json_schema}
            try:
                return await self._create(read_completion, request, response_format=response_format)
            except APIStatusError as error:
                # Some servers fail with a 500 where they should refuse.
                if error.status_code not in REFUSAL_STATUS_CODES and "response_format" not in str(error):
                    raise
                refusal = error

        def read_plain_completion(completion: ChatCompletion) -> T:
            # Any answer shows that the schema was what the endpoint had refused, and not the rest of the request.
            if refusal is not None:
                self._give_up_schema(refusal)
            return read_completion(completion)

        if not shows_answer:
            request = _PLAIN_REQUEST.format(request=request, schema=json.dumps(schema))
        return await self._create(read_plain_completion, request)

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        await self.endpoint.aclose()

    async def _create(self, read: Callable[[ChatCompletion], T], request: str, **settings: Any) -> T:
        messages = [{"role": "user", "content": request}]
        return await self.endpoint.create(read, messages=messages, **self._settings, **settings)

    def _give_up_schema(self, refusal: Exception) -> None:
        if self.takes_schema:
            self.takes_schema = False
            logger.warning(
                "%r does not take a JSON schema as response_format (%s); from now on requests do without",
                self.endpoint,
                str(refusal)[:300],
            )


def read_answer(completion: ChatCompletion, schema: dict[str, Any]) -> Any:
    """
    The JSON object in an answer; see [`fit_any_to_schema`].

    Raises:
        [`InvalidAnswerError`]: If there is none that fits.
    """
    choice = completion.choices[0]
    if not choice.message.content:
        raise InvalidAnswerError(f"the answer has no text ({choice.message.refusal or choice.finish_reason})")
    try:
        return fit_any_to_schema(choice.message.content, schema)
    except InvalidAnswerError as error:
        if choice.finish_reason == "length":
            raise InvalidAnswerError(
                f"the answer was cut off, at max_tokens or at the end of the model's context: {error}"
            ) from error
        raise


def json_objects(text: str) -> Iterator[dict[str, Any]]:
    """All JSON objects in a text that are not part of another one, in order, whatever stands around them."""
    # Reasoning models that are not told otherwise think aloud first, often in drafts of the answer.
    text = text.rpartition("</think>")[2]
    # Models write line breaks into strings as they are.
    decoder = json.JSONDecoder(strict=False)
    position = text.find("{")
    while position != -1:
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            end = position + 1
        else:
            yield value
        position = text.find("{", end)


def fit_any_to_schema(text: str, schema: dict[str, Any]) -> Any:
    """
    The first JSON object in a text that fits a schema, as [`fit_to_schema`] makes it.

    Raises:
        [`InvalidAnswerError`]: If none does. The message says what is wrong with the longest.
    """
    mismatches = []
    for value in json_objects(text):
        try:
            return fit_to_schema(value, schema)
        except InvalidAnswerError as error:
            mismatches.append((len(str(value)), str(error)))
    if not mismatches:
        raise InvalidAnswerError(f"the answer holds no JSON object: {text[:200]!r}")
    raise InvalidAnswerError(max(mismatches)[1])


def fit_to_schema(value: Any, schema: dict[str, Any], where: str = "the answer") -> Any:
    """
    Check a JSON value against a schema. What a schema says besides `type` (one of object, array, string, boolean, integer),
    `properties`, `items` and `enum` is not looked at.

    Args:
        value (`Any`): The value.
        schema (`dict[str, Any]`): The schema. All its properties are required.
        where (`str`, *optional*, defaults to `"the answer"`): How error messages call the value.

    Returns:
        `Any`: The value without fields that are not in the schema, and with the schema's own spelling where a string differs
        from an entry of `enum` in case or surrounding blanks only.

    Raises:
        [`InvalidAnswerError`]: If it does not fit. The message names the field.
    """
    kind = schema["type"]
    # In Python a truth value is an integer, too.
    if not isinstance(value, _PYTHON_TYPES[kind]) or (kind == "integer" and isinstance(value, bool)):
        raise InvalidAnswerError(f"{where} must be of type {kind}, but is {_excerpt(value)}")
    if kind == "object":
        missing = [name for name in schema["properties"] if name not in value]
        if missing:
            raise InvalidAnswerError(f"{where} has no field '{missing[0]}': {_excerpt(value)}")
        return {
            name: fit_to_schema(value[name], part, f"{where}, field '{name}'")
            for name, part in schema["properties"].items()
        }
    if kind == "array":
        return [fit_to_schema(item, schema["items"], f"{where}[{index}]") for index, item in enumerate(value)]
    if kind == "string":
        return _fit_string(value, schema.get("enum"), where)
    return value


def _fit_string(value: str, allowed: list[str] | None, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a character, which no file in UTF-8 can hold.
        raise InvalidAnswerError(f"{where} has half of a character: {value[:200]!a}") from error
    if allowed is None:
        return value
    for entry in allowed:
        if entry.lower() == value.strip().lower():
            return entry
    raise InvalidAnswerError(f"{where} must be one of {', '.join(allowed)}, but is {_excerpt(value)}")


def _excerpt(value: Any) -> str:
    return repr(value)[:200]
