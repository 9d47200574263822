# SPDX-License-Identifier: Apache-2.0

"""What is no request: each is explained, and none is a fault of the server."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from support.server_samples import JSON, SAMPLE, encode, refusal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "items.0.image: Input should be a valid string"),
        ({"image": ""}, "items[0].image: the image is not a readable PNG, JPEG, WEBP file"),
        ({"image": "?"}, "items[0].image: the image is not base64"),
        ({"image": "data:image/png,x"}, "items[0].image: the data URL must hold base64"),
        (
            {"image": f"data:{'a' * 100};base64,{encode(SAMPLE.right)}"},
            "items[0].image: the data URL must hold base64",
        ),
        ({"image": f"data:\u0100;base64,{encode(SAMPLE.right)}"}, "items[0].image: the data URL must hold base64"),
        ({"image": encode(SAMPLE.right, "GIF")}, "items[0].image: the image is not a readable PNG, JPEG, WEBP file"),
        ({"image": encode(SAMPLE.right, "BMP")}, "items[0].image: the image is not a readable PNG, JPEG, WEBP file"),
        ({"image": encode(SAMPLE.right)[:80]}, "items[0].image: the image cannot be decoded"),
        ({"prompt": 3}, "items.0.prompt: Input should be a valid string"),
        ({"prompt": " "}, "items[0]: prompt is empty"),
        ({"semantic_questions": 3}, "items[0]: semantic_questions must be a list of questions, got int"),
        ({"semantic_questions": "["}, "items[0]: semantic_questions is a string but not valid JSON"),
        ({"semantic_questions": [{"tag": "Count"}]}, "items[0]: semantic_questions[0] has no 'question'"),
        ({"quality_questions": [{"question": "x", "tag": "a" * 41}]}, "quality_questions[0]: 'tag' has 41 characters"),
        (
            {"semantic_questions": [{"question": "\ud800", "tag": "Count"}]},
            "items[0]: semantic_questions[0]: the text is not valid Unicode",
        ),
        ({"semantic_questions": [{"question": "x", "tag": "\ud800"}]}, "not printed: '\\ud800'"),
        ({"semantic_questions": [], "quality_questions": []}, "no valid question between them"),
        ({"semantic_question": []}, "items.0.semantic_question: Extra inputs are not permitted"),
        ({"semantic_questions": [{"question": "x", "tag": "Count"}] * 6}, "more than the 8"),
    ],
)
def test_malformed_items_are_named_by_field(plain: httpx.Client, changes: dict[str, Any], message: str) -> None:
    body = json.dumps({"items": [{**SAMPLE.score_item(), **changes}]})
    assert message in refusal(plain.post("/score", content=body, headers=JSON), 422)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "items.0.prompt"),
        ({"seed": -1}, "items.0.seed"),
        ({"seed": 2**63}, "items.0.seed"),
        ({"seed": 1.5}, "items.0.seed"),
        ({"seed": "1"}, "items.0.seed"),
        ({"thougth": "x"}, "items.0.thougth"),
        ({"prompt": "\ud800"}, "items.0.prompt"),
        ({"image": "?"}, "items[0].image: the image is not base64"),
        ({"image": encode(SAMPLE.right)[:80]}, "items[0].image: the image cannot be decoded"),
    ],
)
def test_malformed_paint_requests_are_named_by_field(
    shapes: httpx.Client, changes: dict[str, Any], message: str
) -> None:
    body = json.dumps({"items": [{"prompt": "x", **changes}]})
    assert message in refusal(shapes.post("/generate", content=body, headers=JSON), 422)


def test_number_of_items_is_bounded(plain: httpx.Client, shapes: httpx.Client) -> None:
    response = plain.post("/score", json={"items": [SAMPLE.score_item()] * 4})
    assert "items has 4 entries, more than the 3" in refusal(response, 422)
    response = shapes.post("/generate", json={"items": [{"prompt": "x"}] * 9})
    assert "items has 9 entries, more than the 8" in refusal(response, 422)


def test_wrong_methods_and_types_are_refused(plain: httpx.Client) -> None:
    assert plain.get("/score").status_code == 405
    assert plain.put("/score", json={}).status_code == 405
    assert plain.post("/health").status_code == 405
    assert plain.get("/").status_code == 404
    body = json.dumps({"items": [SAMPLE.score_item()]}).encode()
    for content_type in ("text/plain", "image/png", "application/x-www-form-urlencoded", ""):
        response = plain.post("/score", content=body, headers={"content-type": content_type})
        assert response.status_code == 422


def test_answers_to_malformed_bodies_do_not_repeat_them(plain: httpx.Client) -> None:
    body = json.dumps({"items": [{"image": ["x" * 50_000], "prompt": [7] * 1000}] * 2})
    response = plain.post("/score", content=body, headers=JSON)
    assert len(refusal(response, 422)) < 1100 and "xxx" not in response.text


NESTED = (10, 200, 800, 900, 940, 960, 980, 1000, 5000, 50_000)
BROKEN = [
    b"",
    b"null",
    b"nul",
    b"NaN",
    b'{"items": NaN}',
    b'{"items": [-Infinity]}',
    b"1" * 5000,
    b"-1e999999",
    b'{"items": [%s]}' % (b"9" * 5000),
    b'"\\ud800"',
    b'{"\\udfff": 1}',
    b"\xff\xfe\x00",
    b'{"items": [{"prompt": "\xff"}]}',
    b"\xef\xbb\xbf{}",
    b"[" * 100_000,
    b'{"items":' * 20_000,
    b"[1" + b",1" * 50_000 + b"]",
    b'{"items": [1' + b",1" * 50_000 + b"]}",
]


@pytest.mark.parametrize("path", ["/score", "/generate", "/get_reward"])
def test_bodies_that_are_no_request_are_4xx(shapes: httpx.Client, path: str) -> None:
    for body in BROKEN:
        status = shapes.post(path, content=body, headers=JSON).status_code
        assert 400 <= status < 500, (status, body[:40])


@pytest.mark.parametrize("depth", NESTED)
def test_deep_nesting_is_4xx_wherever_it_stands(shapes: httpx.Client, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    item, question = SAMPLE.score_item(), {"question": "x", "tag": "Count"}
    score_items = [
        item | {"prompt": 0},
        item | {"semantic_questions": 0},
        item | {"semantic_questions": [0]},
        item | {"semantic_questions": [question | {"question": 0}]},
        item | {"semantic_questions": [question | {"tag": 0}]},
        item | {"semantic_questions": [question | {"is_valid": 0}]},
    ]
    for score_item in score_items:
        body = json.dumps({"items": [score_item]}).replace(": 0", f": {nested}").replace("[0]", f"[{nested}]")
        assert 400 <= shapes.post("/score", content=body, headers=JSON).status_code < 500
        label = json.dumps(score_item).replace(": 0", f": {nested}").replace("[0]", f"[{nested}]")
        reward_body = {**SAMPLE.reward_body(), "labels": [label]}
        assert 400 <= shapes.post("/get_reward", json=reward_body).status_code < 500
    text = json.dumps({"items": [item | {"semantic_questions": nested}]})
    assert 400 <= shapes.post("/score", content=text, headers=JSON).status_code < 500
