# SPDX-License-Identifier: Apache-2.0

"""
Clients of the reward server, which paints and judges images: one for threads and one for event loops.

OpenRLHF calls its reward file in threads and its agents in event loops, so both exist. The one for threads runs the other in an
event loop of its own, because only there a try has a deadline: a socket's limits begin anew at every byte.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import math
import random
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alphagrpo_ext.images import open_image, read_image, to_rgb
from alphagrpo_ext.reward_client.addresses import without_password
from alphagrpo_ext.reward_client.answers import RewardServerError, UnreadableAnswerError, send
from alphagrpo_ext.reward_client.compression import ACCEPTED_ENCODINGS
from alphagrpo_ext.reward_client.connection_variables import describe_unmade_client, proxy_hint
from alphagrpo_ext.reward_client.json_values import has_more_values
from alphagrpo_ext.reward_client.retry_after import retry_after_seconds
from alphagrpo_ext.reward_client.server_texts import shortened
from alphagrpo_ext.reward_client.settings import ClientSettings, variable


if TYPE_CHECKING:
    import httpx
    from tenacity import RetryCallState


T = TypeVar("T")

TRANSIENT_STATUS_CODES = (408, 425, 429)
"""Status codes below 500 that a later attempt may not get."""
INITIAL_BACKOFF, MAX_BACKOFF = 0.5, 30.0
"""Seconds."""
PERMANENT_STATUS_CODES = (501, 505)
"""Status codes of 500 and above that a later attempt gets as well, e.g. of a server without a painter."""
MAX_IMAGE_PIXELS = 2**24
"""Largest number of pixels of an image that the server sends."""
# JSON values in an answer; those of an item are its questions and a few more.
_MAX_VALUES, _MAX_VALUES_PER_ITEM = 1000, 10_000


@dataclass(frozen=True)
class Label:
    """
    A prompt with its questions. OpenRLHF carries it through a run as the column `label`.

    Args:
        prompt (`str`): The prompt, without a chat template.
        semantic_questions, quality_questions (`list[dict]`): Each with `question`, `tag` and perhaps `is_valid`.
    """

    prompt: str
    semantic_questions: list[dict[str, Any]]
    quality_questions: list[dict[str, Any]]


@dataclass(frozen=True)
class PaintRequest:
    """
    An image to paint.

    Args:
        prompt (`str`): The prompt.
        thought (`str`, *optional*): Text that the policy wrote: a plan, or a reflection on `image` if that is given.
        image (`PIL.Image.Image`, *optional*): An image to refine.
        seed (`int`, *optional*): Seed of the noise; with `None` the server draws the noise.
    """

    prompt: str
    thought: str | None = None
    image: Image.Image | None = None
    seed: int | None = None


@dataclass(frozen=True)
class ImageScore:
    """
    Score of one image.

    Args:
        reward (`float`): DVReward, in [0, 1].
        semantic, quality (`tuple[float | None, ...]`): P(yes) of each question, `None` without an answer.
        strict_pass (`bool`): Whether every answer is yes.
    """

    reward: float
    semantic: tuple[float | None, ...]
    quality: tuple[float | None, ...]
    strict_pass: bool

    @property
    def logs(self) -> dict[str, float]:
        """Metrics: the means `semantic` and `quality` (NaN without an answer), and `strict_pass`, 0 or 1."""
        return {
            "semantic": _mean(self.semantic),
            "quality": _mean(self.quality),
            "strict_pass": float(self.strict_pass),
        }


_UnitNumber = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _ScoreFields(BaseModel):
    """A score as the server sends it."""

    # So numbers are neither texts nor booleans.
    model_config = ConfigDict(strict=True)

    reward: _UnitNumber | None
    semantic: list[_UnitNumber | None]
    quality: list[_UnitNumber | None]
    strict_pass: bool | None


class RewardClient:
    """
    Client of the reward server for threads, any number of which may share it.

    A request is repeated after connections that fail or time out, after the status codes 408, 425, 429 and 500 or above, and
    after answers that are damaged or cut off; see [`retry_policy`].

    Args:
        config ([`ClientSettings`]): URL, key, limits and number of retries.
    """

    def __init__(self, config: ClientSettings) -> None:
        self.config = config
        self._client = AsyncRewardClient(config)
        self._lock = threading.Lock()
        self._thread: _LoopThread | None = None
        self._stop: weakref.finalize | None = None

    def generate(self, requests: Sequence[PaintRequest]) -> list[Image.Image]:
        """
        Paint one RGB image per request.

        Raises:
            [`RewardServerError`]: If the server is out of reach, refuses, or sends an unexpected answer.
        """
        return self._run(self._client.generate(requests))

    def score(self, images: Sequence[Image.Image], labels: Sequence[Label]) -> list[ImageScore]:
        """
        Score each image by the questions of its label.

        Raises:
            [`RewardServerError`]: As for [`RewardClient.generate`], and if an image could not be scored. A missing score never
                becomes a reward.
        """
        return self._run(self._client.score(images, labels))

    def close(self) -> None:
        """Close the connections. A later request opens new ones."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is not None and thread.is_alive():
                asyncio.run_coroutine_threadsafe(self._client.aclose(), thread.loop).result()
                self._stop()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            # A process that was forked has no threads.
            if self._thread is None or not self._thread.is_alive():
                self._thread = _LoopThread()
                self._stop = weakref.finalize(self, self._thread.stop)
            future = asyncio.run_coroutine_threadsafe(work, self._thread.loop)
        try:
            return future.result()
        except BaseException:
            # An interrupted caller waits for no answer.
            future.cancel()
            raise


class _LoopThread(threading.Thread):
    """A thread with a running event loop. It ends with the process."""

    def __init__(self) -> None:
        super().__init__(name="reward client", daemon=True)
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self.loop = self._runner.get_loop()
        self.start()

    def run(self) -> None:
        # What still runs when the loop stops is cancelled.
        with self._runner:
            self.loop.run_forever()

    def stop(self) -> None:
        """Stop the loop. This must be called once: a second call would disturb the end."""
        self.loop.call_soon_threadsafe(self.loop.stop)


class AsyncRewardClient:
    """
    [`RewardClient`] for event loops. Several loops may share it: each gets a connection pool of its own.

    Args:
        config ([`ClientSettings`]): URL, key, limits and number of retries.
        max_seconds (`float`, *optional*): No try begins later than this after a request's first.
    """

    def __init__(self, config: ClientSettings, max_seconds: float | None = None) -> None:
        self.config = config
        self.max_seconds = max_seconds
        self._pools: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[httpx.AsyncClient, asyncio.Semaphore]] = (
            WeakKeyDictionary()
        )

    async def generate(self, requests: Sequence[PaintRequest]) -> list[Image.Image]:
        """Like [`RewardClient.generate`]."""
        # Compression takes milliseconds, which would block the event loop.
        body = await asyncio.to_thread(generate_body, requests)
        return await self._post("generate", body, lambda response: read_images(response, len(requests), self.config))

    async def score(self, images: Sequence[Image.Image], labels: Sequence[Label]) -> list[ImageScore]:
        """Like [`RewardClient.score`]."""
        body = await asyncio.to_thread(score_body, images, labels)
        return await self._post("score", body, lambda response: read_scores(response, labels, self.config))

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        pool = self._pools.pop(asyncio.get_running_loop(), None)
        if pool is not None:
            await pool[0].aclose()

    async def _post(self, path: str, body: dict[str, Any], read: Callable[[httpx.Response], T]) -> T:
        from tenacity import AsyncRetrying

        loop = asyncio.get_running_loop()
        if loop not in self._pools:
            self._pools[loop] = (_make_http(self.config), asyncio.Semaphore(self.config.max_concurrency))
        http, slots = self._pools[loop]

        async def attempt() -> T | httpx.Response:
            # Requests that wait for a free slot are a queue, so they do not time out.
            async with slots:
                response = await send(http, self.config, path, body)
            # Images take milliseconds to decode, which would block the event loop.
            return await asyncio.to_thread(read, response) if response.is_success else response

        return await AsyncRetrying(**retry_policy(self.config, self.max_seconds))(attempt)


def parse_label(label: str) -> Label:
    """
    Read a label of OpenRLHF's dataset, as `recipes/openrlhf_prompts.py` writes it.

    Args:
        label (`str`): A JSON object with `prompt`, `semantic_questions` and `quality_questions`.

    Raises:
        `ValueError`: If it is anything else; the message names the field.
    """
    advice = "make the dataset with recipes/openrlhf_prompts.py and name its column with --data.label_key label"
    try:
        record = json.loads(label)
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"the label is not JSON ({error}): {str(label)[:100]!r}; {advice}") from error
    if not isinstance(record, dict):
        raise ValueError(f"the label must be a JSON object, but is {label[:100]!r}; {advice}")
    if not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise ValueError(f"the label's 'prompt' must be a text, but is {record.get('prompt')!r}; {advice}")
    for name in ("semantic_questions", "quality_questions"):
        if not isinstance(record.get(name), list):
            raise ValueError(f"the label's '{name}' must be a list, but is {record.get(name)!r}; {advice}")
    return Label(record["prompt"], record["semantic_questions"], record["quality_questions"])


def noise_seed(seed: int | None, prompt: str, turn: int) -> int | None:
    """Seed in [0, 2^31) of the image of a turn (0-based), equal for a whole group, or `None` if `seed` is `None`."""
    if seed is None:
        return None
    digest = hashlib.sha256(f"{seed} {turn} {prompt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def generate_body(requests: Sequence[PaintRequest]) -> dict[str, Any]:
    """Body of `POST /generate`. Images are sent as PNG, which is lossless."""
    return {
        "items": [
            {
                "prompt": request.prompt,
                "thought": request.thought,
                "image": None if request.image is None else encode_image(request.image),
                "seed": request.seed,
            }
            for request in requests
        ]
    }


def score_body(images: Sequence[Image.Image], labels: Sequence[Label]) -> dict[str, Any]:
    """Body of `POST /score`."""
    return {
        "items": [{"image": encode_image(image), **vars(label)} for image, label in zip(images, labels, strict=True)]
    }


def read_images(response: httpx.Response, count: int, config: ClientSettings) -> list[Image.Image]:
    """
    Read the images in the answer to `POST /generate`.

    Raises:
        [`UnreadableAnswerError`]: If the answer is damaged or cut off.
        [`RewardServerError`]: If there are not `count` images in it.
    """
    try:
        return [decode_image(data) for data in _read_list(response, "images", count, config)]
    except (OSError, ValueError, TypeError) as error:
        raise RewardServerError(f"{_address(response)} sent an image that cannot be read: {error}") from error


def read_scores(response: httpx.Response, labels: Sequence[Label], config: ClientSettings) -> list[ImageScore]:
    """
    Read the scores in the answer to `POST /score`.

    Raises:
        [`UnreadableAnswerError`]: If the answer is damaged or cut off.
        [`RewardServerError`]: If there is not one per label, an image could not be scored, a number is not in [0, 1], or there is
            not one answer per valid question.
    """
    items = _read_list(response, "scores", len(labels), config)
    return [
        _read_score(item, label, _address(response), index)
        for index, (item, label) in enumerate(zip(items, labels, strict=True))
    ]


def _read_score(item: Any, label: Label, address: str, index: int) -> ImageScore:
    try:
        score = _ScoreFields.model_validate(item)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, ("scores", index, *first["loc"])))
        raise RewardServerError(
            f"{address} sent a score that cannot be read, field '{place}': {first['msg']}, but is "
            f"{ascii(first['input'])[:200]}"
        ) from error
    if score.reward is None:
        raise RewardServerError(
            f"{address} could not score image {index}, and a missing score must not become a reward: see "
            "the server's log for what its judge said"
        )
    if score.strict_pass is None:
        raise RewardServerError(f"{address} sent a score that cannot be read: image {index} has no strict_pass")
    for name in ("semantic", "quality"):
        questions = [q for q in getattr(label, f"{name}_questions") if q.get("is_valid") is not False]
        if len(getattr(score, name)) != len(questions):
            raise RewardServerError(
                f"{address} sent a score that cannot be read: image {index} has {len(getattr(score, name))} {name} answers, "
                f"but {len(questions)} valid {name}_questions"
            )
    return ImageScore(score.reward, tuple(score.semantic), tuple(score.quality), score.strict_pass)


def encode_image(image: Image.Image) -> str:
    """Encode an image as PNG in base64, without transparency."""
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def decode_image(data: str) -> Image.Image:
    """
    Decode a PNG in base64 to an RGB image.

    Raises:
        `ValueError`: If it is damaged, or has more than [`MAX_IMAGE_PIXELS`].
    """
    with open_image(base64.b64decode(data, validate=True), formats=["PNG"]) as image:
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_IMAGE_PIXELS}")
        return read_image(image)


def retry_policy(config: ClientSettings, max_seconds: float | None = None) -> dict[str, Any]:
    """
    Arguments of tenacity's `AsyncRetrying`.

    An attempt returns what was read from a successful answer, or the [`httpx.Response`] of another. An attempt that failed, or
    whose answer is damaged or cut off, is repeated up to `config.max_retries` times and in the first `max_seconds`, unless the
    server refused the request itself. The pause is an exponential back-off or what the server asks for (see
    [`retry_after_seconds`]) but at most `config.timeout`, whichever is longer. After the last attempt a [`RewardServerError`] is raised.
    """
    import httpx
    from tenacity import retry_if_exception_type, retry_if_result, stop_after_attempt, stop_any, stop_before_delay

    latest = math.inf if max_seconds is None else max_seconds
    return {
        "retry": retry_if_exception_type((httpx.TransportError, UnreadableAnswerError))
        | retry_if_result(lambda result: isinstance(result, httpx.Response)),
        "stop": stop_any(_is_refused, stop_after_attempt(config.max_retries + 1), stop_before_delay(latest)),
        "wait": partial(_seconds_to_wait, config),
        "retry_error_callback": partial(_give_up, config),
    }


def _failed_response(state: RetryCallState) -> httpx.Response | None:
    """The response of a failed attempt, or `None` if the attempt ended without a response."""
    return None if state.outcome.failed else state.outcome.result()


def _is_refused(state: RetryCallState) -> bool:
    response = _failed_response(state)
    if response is None:
        return False
    status = response.status_code
    return status in PERMANENT_STATUS_CODES or status < 500 and status not in TRANSIENT_STATUS_CODES


def _seconds_to_wait(config: ClientSettings, state: RetryCallState) -> float:
    backoff = min(INITIAL_BACKOFF * 2 ** (state.attempt_number - 1), MAX_BACKOFF)
    response = _failed_response(state)
    asked = None if response is None else retry_after_seconds(response.headers, time.time())
    # Without jitter, all clients that were turned away would come back at the same moment.
    jitter = 1 + random.random() / 4
    return max(backoff * jitter, min((asked or 0.0) * jitter, config.timeout))


def _give_up(config: ClientSettings, state: RetryCallState) -> NoReturn:
    server = _named(config)
    attempts = f"after {state.attempt_number} {'try' if state.attempt_number == 1 else 'tries'}"
    response = _failed_response(state)
    if response is None:
        error = state.outcome.exception()
        if isinstance(error, UnreadableAnswerError):
            raise RewardServerError(f"{error} ({attempts})") from error
        raise RewardServerError(f"{server} {_explain_transport(error, attempts, config)}") from error
    answer = f"{response.status_code} {attempts}: {shortened(response.text)}"
    wait = retry_after_seconds(response.headers, time.time())
    asked = f". It asks to wait {wait:.0f} s" if wait else ""
    raise RewardServerError(f"{server} {_explain_status(response, config)} ({answer}){asked}")


def _explain_transport(error: BaseException, attempts: str, config: ClientSettings) -> str:
    import httpx

    proxy = proxy_hint(config.server_url)
    if isinstance(error, httpx.TimeoutException):
        return (
            f"did not answer in {config.timeout} s {attempts}: raise {config.setting_name('timeout')}, or send it fewer "
            f"requests{proxy}"
        )
    return (
        f"is out of reach {attempts} ({type(error).__name__}: {error}): start it with `python -m reward_models.server`, or set "
        f"{config.setting_name('server_url')} to its URL{proxy}"
    )


def _explain_status(response: httpx.Response, config: ClientSettings) -> str:
    address = config.setting_name("server_url")
    if response.status_code in (401, 403):
        return f"refused the key: set {variable('server_key')} to the server's own"
    if response.status_code == 429:
        return f"is too busy: lower {config.setting_name('max_concurrency')} or raise {config.setting_name('max_retries')}"
    if response.is_redirect:
        return f"is at another address, {response.headers.get('location')}: set {address} to it"
    if response.status_code in (404, 405):
        return (
            f"has no route {response.url.path}, so it is probably not the reward server, or its address has a path too many: "
            f"check {address}"
        )
    if response.status_code >= 500 and response.status_code not in PERMANENT_STATUS_CODES:
        return "failed, see its log"
    return f"refused a request to {response.url.path}"


def _named(config: ClientSettings) -> str:
    return f"the reward server at {without_password(config.server_url)} ({config.setting_name('server_url')})"


def _address(response: httpx.Response) -> str:
    return without_password(str(response.url))


def _make_http(config: ClientSettings) -> httpx.AsyncClient:
    import httpx

    try:
        return httpx.AsyncClient(**_http_options(config))
    except Exception as error:
        raise RewardServerError(f"{_named(config)} cannot be asked: {describe_unmade_client(error)}") from error


def _http_options(config: ClientSettings) -> dict[str, Any]:
    import httpx

    key = config.server_key
    return {
        "base_url": config.server_url,
        "headers": {
            "Accept-Encoding": ACCEPTED_ENCODINGS,
            **({} if key is None else {"Authorization": f"Bearer {key.get_secret_value()}"}),
        },
        # The whole try has a deadline; see `send`.
        "timeout": None,
        "limits": httpx.Limits(
            max_connections=config.max_concurrency, max_keepalive_connections=config.max_concurrency
        ),
    }


def _read_list(response: httpx.Response, name: str, count: int, config: ClientSettings) -> list[Any]:
    if has_more_values(response.content, _MAX_VALUES + _MAX_VALUES_PER_ITEM * count):
        raise RewardServerError(f"{_address(response)} sent an answer with far more values than {count} {name} have")
    try:
        items = response.json()[name]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        # A web page is what another server answers. Other text that is not JSON may be an answer that was cut off.
        is_cut = isinstance(error, ValueError) and not response.content.lstrip().startswith(b"<")
        raise (UnreadableAnswerError if is_cut else RewardServerError)(
            f"{_address(response)} did not answer with '{name}', so it is probably not the reward server; check "
            f"{config.setting_name('server_url')} (it sent {response.text[:200]!r})"
        ) from error
    if not isinstance(items, list) or len(items) != count:
        raise RewardServerError(f"{_address(response)} must send {count} {name}, but sent {ascii(items)[:200]}")
    return items


def _mean(answers: Sequence[float | None]) -> float:
    given = [answer for answer in answers if answer is not None]
    return sum(given) / len(given) if given else math.nan
