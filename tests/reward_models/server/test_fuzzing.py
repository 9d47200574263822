# SPDX-License-Identifier: Apache-2.0

"""Random requests, by Hypothesis: never a fault of the server."""

from __future__ import annotations

import json
from typing import Any

import httpx
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from support.server_samples import JSON, SAMPLE, SAMPLES, encode


TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | TEXTS
    | st.sampled_from(["\ud800", "<|im_end|>", "<think>", encode(SAMPLE.right), "data:image/png;base64,", "[]", "{}"])
)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=12
)
FUZZ = settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def paths_of(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(path for key, child in children for path in paths_of(child, (*prefix, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value in one place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


def without(value: Any, path: tuple[Any, ...]) -> Any:
    """A copy without one place."""
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    rest = parent.copy()
    del rest[path[-1]]
    return replaced(value, path[:-1], rest)


@st.composite
def nearly(draw: st.DrawFn, valid: Any) -> Any:
    """A valid body in which up to three places are gone, or hold something else."""
    body = valid
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(paths_of(body)))
        body = without(body, path) if path and draw(st.booleans()) else replaced(body, path, draw(ANYTHING))
        if not isinstance(body, (dict, list)):
            break
    return body


@st.composite
def nearly_rewards(draw: st.DrawFn) -> Any:
    """Such a request for rewards, whose label may itself be nearly right."""
    label = draw(nearly(SAMPLE.record))
    return draw(nearly(SAMPLE.reward_body() | {"labels": [json.dumps(label)]}))


def assert_no_server_error(client: httpx.Client, path: str, body: Any, documented: set[int]) -> None:
    response = client.post(path, content=json.dumps(body), headers=JSON)
    assert response.status_code < 500 or response.status_code in documented, (response.status_code, body)
    assert isinstance(response.json(), dict)


@FUZZ
@given(path=st.sampled_from(["/score", "/generate", "/get_reward"]), body=ANYTHING)
def test_any_json_is_no_server_error(shapes: httpx.Client, path: str, body: Any) -> None:
    assert_no_server_error(shapes, path, body, set())


@FUZZ
@given(path=st.sampled_from(["/score", "/generate", "/get_reward"]), body=st.binary(max_size=200))
def test_any_bytes_are_no_server_error(shapes: httpx.Client, path: str, body: bytes) -> None:
    response = shapes.post(path, content=body, headers=JSON)
    assert 400 <= response.status_code < 500


@FUZZ
@given(body=nearly({"items": [SAMPLE.score_item(), SAMPLES[1].score_item()]}))
def test_nearly_a_score_request_is_no_server_error(shapes: httpx.Client, body: Any) -> None:
    assert_no_server_error(shapes, "/score", body, set())


@FUZZ
@given(
    body=nearly(
        {
            "items": [
                {"prompt": "x", "thought": SAMPLE.plan, "image": encode(SAMPLE.wrong), "seed": 1},
                {"prompt": SAMPLE.record["prompt"], "thought": None, "image": None, "seed": None},
            ]
        }
    )
)
@example(body={"items": [{"prompt": "", "thought": ""}]})
@example(body={"items": [{"prompt": "<|vision_start|><|im_end|>", "thought": "\x00"}]})
def test_nearly_a_paint_request_is_no_server_error(shapes: httpx.Client, body: Any) -> None:
    assert_no_server_error(shapes, "/generate", body, set())


@FUZZ
@given(body=nearly_rewards())
def test_nearly_a_reward_request_is_no_server_error(shapes: httpx.Client, body: Any) -> None:
    # A question that the pixel judge does not know has no answer, and the image no reward.
    assert_no_server_error(shapes, "/get_reward", body, {503})
