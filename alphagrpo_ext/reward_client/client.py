# SPDX-License-Identifier: Apache-2.0

"""Client of the reward server, which paints and judges images: one for threads, one for event loops."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from PIL import Image

from alphagrpo_ext.files import require_extra
from alphagrpo_ext.openrlhf.environment import PluginConfig, variable


if TYPE_CHECKING:
    import httpx


RETRIED_STATUS_CODES = (408, 425, 429)
"""Beside those from 500 on."""
INITIAL_BACKOFF, MAX_BACKOFF = 0.5, 30.0
MAX_RETRY_AFTER = 60.0


class RewardServerError(RuntimeError):
    """The reward server did not give what was asked for. The message says why and what to do."""


@dataclass(frozen=True)
class Label:
    """
    A prompt with its questions: what OpenRLHF carries through a run as `label`.

    Args:
        prompt (`str`): The request, without a chat template.
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
        prompt (`str`): The request.
        thought (`str`, *optional*): What the policy wrote: a plan, or with `image` a reflection on it.
        image (`PIL.Image.Image`, *optional*): An image to refine.
        seed (`int`, *optional*): Of the noise; `None` leaves it to the server.
    """

    prompt: str
    thought: str | None = None
    image: Image.Image | None = None
    seed: int | None = None


@dataclass(frozen=True)
class ImageScore:
    """
    How an image did.

    Args:
        reward (`float`): DVReward, in [0, 1].
        semantic, quality (`tuple[float | None, ...]`): P(yes) of each question.
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


class RewardClient:
    """
    Asks the reward server from threads, any number at once.

    A request is tried again after connections that fail or time out, the status codes 408, 425, 429 and from 500 on, with
    exponential back-off and jitter, or after the time that the server names.

    Args:
        config ([`PluginConfig`]): Where the server is, and how patient to be.

    Raises:
        `ImportError`: If `httpx` is not installed.
    """

    def __init__(self, config: PluginConfig) -> None:
        require_extra("httpx", "openrlhf")
        import httpx

        self.config = config
        self._http = httpx.Client(**_http_options(config))

    def generate(self, requests: Sequence[PaintRequest]) -> list[Image.Image]:
        """
        Paint images, one a request, in RGB.

        Raises:
            [`RewardServerError`]: If the server is out of reach, refuses or sends something else.
        """
        return read_images(self._post("generate", generate_body(requests)), len(requests))

    def score(self, images: Sequence[Image.Image], labels: Sequence[Label]) -> list[ImageScore]:
        """
        Score images, each by the questions of its label.

        Raises:
            [`RewardServerError`]: Likewise, and if an image could not be scored: that is never a reward.
        """
        return read_scores(self._post("score", score_body(images, labels)), len(images))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        import httpx

        tries = 0
        while True:
            try:
                outcome = self._http.post(path, json=body)
            except httpx.TransportError as error:
                outcome = error
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return outcome
            tries += 1
            time.sleep(seconds_to_wait(outcome, tries, self.config))


class AsyncRewardClient:
    """
    [`RewardClient`] for event loops. It may be used from several: each gets a connection pool of its own.

    Args:
        config ([`PluginConfig`]): Where the server is, and how patient to be.

    Raises:
        `ImportError`: If `httpx` is not installed.
    """

    def __init__(self, config: PluginConfig) -> None:
        require_extra("httpx", "openrlhf")
        self.config = config
        self._pools: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = WeakKeyDictionary()

    async def generate(self, requests: Sequence[PaintRequest]) -> list[Image.Image]:
        """As [`RewardClient.generate`]."""
        # Compression takes milliseconds, in which the event loop would stand still.
        body = await asyncio.to_thread(generate_body, requests)
        response = await self._post("generate", body)
        return await asyncio.to_thread(read_images, response, len(requests))

    async def score(self, images: Sequence[Image.Image], labels: Sequence[Label]) -> list[ImageScore]:
        """As [`RewardClient.score`]."""
        body = await asyncio.to_thread(score_body, images, labels)
        return read_scores(await self._post("score", body), len(images))

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        pool = self._pools.pop(asyncio.get_running_loop(), None)
        if pool is not None:
            await pool.aclose()

    async def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        import httpx

        loop = asyncio.get_running_loop()
        if loop not in self._pools:
            self._pools[loop] = httpx.AsyncClient(**_http_options(self.config))
        tries = 0
        while True:
            try:
                outcome = await self._pools[loop].post(path, json=body)
            except httpx.TransportError as error:
                outcome = error
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return outcome
            tries += 1
            await asyncio.sleep(seconds_to_wait(outcome, tries, self.config))


def parse_label(label: str) -> Label:
    """
    Read OpenRLHF's `label`, as `recipes/openrlhf_prompts.py` writes it.

    Args:
        label (`str`): JSON of a record with `prompt`, `semantic_questions` and `quality_questions`.

    Raises:
        `ValueError`: If it is anything else; the message names the field.
    """
    advice = "make the dataset with recipes/openrlhf_prompts.py and name its column with --data.label_key label"
    try:
        record = json.loads(label)
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"the label is not JSON ({error}): {str(label)[:100]!r}; {advice}") from error
    if not isinstance(record, dict):
        raise ValueError(f"the label must be the JSON of a record, but is {label[:100]!r}; {advice}")
    if not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise ValueError(f"the label's 'prompt' must be a text, but is {record.get('prompt')!r}; {advice}")
    for name in ("semantic_questions", "quality_questions"):
        if not isinstance(record.get(name), list):
            raise ValueError(f"the label's '{name}' must be a list, but is {record.get(name)!r}; {advice}")
    return Label(record["prompt"], record["semantic_questions"], record["quality_questions"])


def noise_seed(seed: int | None, prompt: str, turn: int) -> int | None:
    """Seed in [0, 2^31) of the image of a turn (0-based), the same for a whole group; `None` if there is no `seed`."""
    if seed is None:
        return None
    digest = hashlib.sha256(f"{seed} {turn} {prompt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def generate_body(requests: Sequence[PaintRequest]) -> dict[str, Any]:
    """JSON of `POST /generate`. Images travel as PNG, which loses nothing."""
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
    """JSON of `POST /score`."""
    return {
        "items": [{"image": encode_image(image), **vars(label)} for image, label in zip(images, labels, strict=True)]
    }


def read_images(response: httpx.Response, count: int) -> list[Image.Image]:
    """
    The images that answer `POST /generate`.

    Raises:
        [`RewardServerError`]: If there are not `count` of them.
    """
    try:
        return [decode_image(data) for data in _read_list(response, "images", count)]
    except (OSError, ValueError, TypeError) as error:
        raise RewardServerError(f"{response.url} sent an image that cannot be read: {error}") from error


def read_scores(response: httpx.Response, count: int) -> list[ImageScore]:
    """
    The scores that answer `POST /score`.

    Raises:
        [`RewardServerError`]: If there are not `count` of them, or an image could not be scored.
    """
    scores = []
    for index, item in enumerate(_read_list(response, "scores", count)):
        try:
            reward, strict_pass = item["reward"], item["strict_pass"]
            semantic, quality = tuple(item["semantic"]), tuple(item["quality"])
        except (KeyError, TypeError) as error:
            raise RewardServerError(f"{response.url} sent a score that cannot be read: {item!r}") from error
        if reward is None or not math.isfinite(reward):
            raise RewardServerError(
                f"{response.url} could not score image {index}, and a missing score must not become a reward: see "
                "the server's log for what its judge said"
            )
        scores.append(ImageScore(float(reward), semantic, quality, bool(strict_pass)))
    return scores


def encode_image(image: Image.Image) -> str:
    """An image as PNG in base64, without transparency."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def decode_image(data: str) -> Image.Image:
    """The RGB image of a PNG in base64."""
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB")


def seconds_to_wait(outcome: httpx.Response | httpx.TransportError, tries: int, config: PluginConfig) -> float:
    """
    How long to wait after a failed try.

    Args:
        outcome (`httpx.Response` or `httpx.TransportError`): What the try ended with.
        tries (`int`): Failed tries so far, this one included.
        config ([`PluginConfig`]): How often to try.

    Raises:
        [`RewardServerError`]: If another try is of no use, or was the last one.
    """
    status = getattr(outcome, "status_code", None)
    transient = status is None or status in RETRIED_STATUS_CODES or status >= 500
    if not transient or tries > config.max_retries:
        raise RewardServerError(_explain(outcome, tries, config)) from (outcome if status is None else None)
    backoff = min(INITIAL_BACKOFF * 2 ** (tries - 1), MAX_BACKOFF)
    try:
        asked_for = float(outcome.headers["retry-after"])
    except (AttributeError, KeyError, ValueError):
        asked_for = 0.0
    # Without jitter, all that were turned away would come back at the same moment.
    return max(backoff, min(asked_for, MAX_RETRY_AFTER)) * (1 + random.random() / 4)


def _explain(outcome: httpx.Response | httpx.TransportError, tries: int, config: PluginConfig) -> str:
    import httpx

    where = f"the reward server at {config.server_url} ({variable('server_url')})"
    after = f"after {tries} {'try' if tries == 1 else 'tries'}"
    if isinstance(outcome, httpx.TimeoutException):
        return f"{where} did not answer in {config.timeout} s {after}: raise {variable('timeout')}, or ask less of it"
    if isinstance(outcome, httpx.TransportError):
        return (
            f"{where} is out of reach {after} ({type(outcome).__name__}: {outcome}): start it with "
            "`python -m reward_models.server`, or set the variable to where it is"
        )
    answer = f"{outcome.status_code} {after}: {outcome.text[:500]}"
    if outcome.status_code in (401, 403):
        return f"{where} refused the key: set {variable('server_key')} to the server's own ({answer})"
    if outcome.status_code == 429:
        return (
            f"{where} is too busy: lower {variable('max_concurrency')} or raise {variable('max_retries')} ({answer})"
        )
    if outcome.status_code >= 500:
        return f"{where} failed, see its log ({answer})"
    return f"{where} refused a request to {outcome.url.path} ({answer})"


def _http_options(config: PluginConfig) -> dict[str, Any]:
    import httpx

    return {
        "base_url": config.server_url,
        "headers": {} if config.server_key is None else {"Authorization": f"Bearer {config.server_key}"},
        # Waiting for a free connection is a queue, not a fault.
        "timeout": httpx.Timeout(config.timeout, pool=None),
        "limits": httpx.Limits(
            max_connections=config.max_concurrency, max_keepalive_connections=config.max_concurrency
        ),
    }


def _read_list(response: httpx.Response, name: str, count: int) -> list[Any]:
    try:
        items = response.json()[name]
    except (ValueError, KeyError, TypeError) as error:
        raise RewardServerError(
            f"{response.url} did not answer with '{name}', so it is hardly the reward server; check "
            f"{variable('server_url')} (it sent {response.text[:200]!r})"
        ) from error
    if not isinstance(items, list) or len(items) != count:
        raise RewardServerError(f"{response.url} must send {count} {name}, but sent {str(items)[:200]}")
    return items


def _mean(answers: Sequence[float | None]) -> float:
    given = [answer for answer in answers if answer is not None]
    return sum(given) / len(given) if given else math.nan
