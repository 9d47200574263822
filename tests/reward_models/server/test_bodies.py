# SPDX-License-Identifier: Apache-2.0

"""What a body becomes in memory: bounded before it is parsed, wherever the bulk stands."""

from __future__ import annotations

import base64
import gzip
import json
import tracemalloc
from typing import Any

import httpx
import pytest

from reward_models.server.protocol import MAX_TEXT_LENGTH
from support.server_samples import JSON, SAMPLE, encode, refusal


NUM_BYTES = 900_000
BALLAST = {
    "lists": "[" + "[]," * (NUM_BYTES // 3) + "[]]",
    "objects": "[" + "{}," * (NUM_BYTES // 3) + "{}]",
    "nested lists": "[" + "[[[[[[1]]]]]]," * (NUM_BYTES // 14) + "1]",
    "nested objects": "[" + '{"a":{"b":{}}},' * (NUM_BYTES // 15) + "1]",
    "numbers": "[" + "1000," * (NUM_BYTES // 5) + "1]",
    "floats": "[" + "5e-9," * (NUM_BYTES // 5) + "1]",
    "texts": "[" + '"\u0100",' * (NUM_BYTES // 5) + "1]",
    "escapes": "[" + '"\\u0100",' * (NUM_BYTES // 9) + "1]",
    "quotation marks": "[" + '"\\"\\\\",' * (NUM_BYTES // 7) + "1]",
    "keys": "{" + ",".join(f'"k{i}":1' for i in range(NUM_BYTES // 11)) + "}",
}


def grown(text: str, before: str, ballast: str) -> str:
    """JSON with a further field before another one."""
    return text.replace(before, f'"ballast": {ballast}, {before}', 1)


def post_traced(client: httpx.Client, body: bytes) -> tuple[httpx.Response, int]:
    """Post a body to `/score`; also returns the most memory that this took, in bytes."""
    tracemalloc.start()
    try:
        response = client.post("/score", content=body, headers=JSON)
        return response, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ballast", BALLAST.values(), ids=BALLAST.keys())
@pytest.mark.parametrize("before", ['"tag"', '"prompt"', '"items"'])
def test_bulk_that_nobody_asked_for_is_refused_before_it_is_parsed(
    shapes: httpx.Client, before: str, ballast: str
) -> None:
    body = grown(json.dumps({"items": [SAMPLE.score_item()]}), before, ballast).encode()
    response, peak = post_traced(shapes, body)
    assert "values" in refusal(response, 413)
    assert peak < 10 * len(body)


@pytest.mark.parametrize("ballast", BALLAST.values(), ids=BALLAST.keys())
@pytest.mark.parametrize("before", ['"tag"', '"prompt"'])
def test_bulk_in_a_label_is_refused(shapes: httpx.Client, before: str, ballast: str) -> None:
    body = SAMPLE.reward_body() | {"labels": [grown(json.dumps(SAMPLE.record), before, ballast)]}
    assert "labels[0] is JSON with more than" in refusal(shapes.post("/get_reward", json=body), 422)


def test_bulk_in_questions_that_are_text_is_refused(shapes: httpx.Client) -> None:
    for name in ("semantic_questions", "quality_questions"):
        changes = {name: BALLAST["lists"]}
        response = shapes.post("/score", json={"items": [SAMPLE.score_item() | changes]})
        assert f"items[0]: {name} is JSON with more than" in refusal(response, 422)
        label = json.dumps(SAMPLE.record | changes)
        response = shapes.post("/get_reward", json=SAMPLE.reward_body() | {"labels": [label]})
        assert f"labels[0]: {name} is JSON with more than" in refusal(response, 422)


def test_bulk_in_chunks_or_compressed_is_refused(shapes: httpx.Client) -> None:
    body = grown(json.dumps({"items": [SAMPLE.score_item()]}), '"tag"', BALLAST["lists"]).encode()
    parts = (body[i : i + 5000] for i in range(0, len(body), 5000))
    assert "values" in refusal(shapes.post("/score", content=parts, headers=JSON), 413)
    headers = JSON | {"content-encoding": "gzip"}
    assert 400 <= shapes.post("/score", content=gzip.compress(body), headers=headers).status_code < 500


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_body_in_another_encoding_is_refused(shapes: httpx.Client, encoding: str) -> None:
    body = json.dumps({"items": [SAMPLE.score_item()]}).encode(encoding)
    assert "not in UTF-8" in refusal(shapes.post("/score", content=body, headers=JSON), 422)


def test_fields_that_the_server_ignores_may_be_there(shapes: httpx.Client) -> None:
    questions = [
        question | {"type": "semantic", "scores": [0.5, 1]} for question in SAMPLE.record["semantic_questions"]
    ]
    item = SAMPLE.score_item() | {"semantic_questions": questions}
    assert shapes.post("/score", json={"items": [item] * 8}).status_code == 200


QUESTION = {"question": "is there a red circle ?", "tag": "Existence"}
LONG = "a" * (MAX_TEXT_LENGTH + 1)


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("/score", {"prompt": LONG}, "items.0.prompt"),
        ("/score", {"semantic_questions": [{"question": LONG, "tag": "Count"}]}, "items[0]: a text in it has"),
        ("/score", {"semantic_questions": [QUESTION | {"other": [[LONG]]}]}, "items[0]: a text in it has"),
        ("/score", {"semantic_questions": [QUESTION | {LONG: 1}]}, "items[0]: a text in it has"),
        ("/score", {"semantic_questions": " " * 2**20 + "[]"}, "items[0]: semantic_questions has 1048578 characters"),
        ("/generate", {"prompt": LONG}, "items.0.prompt"),
        ("/generate", {"thought": LONG}, "items.0.thought"),
        ("/get_reward", {"query": [LONG]}, "query.0"),
        ("/get_reward", {"prompts": [LONG]}, "prompts.0"),
        ("/get_reward", {"labels": [" " * 2**20 + json.dumps(SAMPLE.record)]}, "labels[0] has 10"),
        ("/get_reward", {"labels": [json.dumps(SAMPLE.record | {"other": LONG})]}, "labels[0]: a text in it has"),
        ("/get_reward", {"labels": [json.dumps(SAMPLE.record | {"prompt": LONG})]}, "labels[0]: a text in it has"),
    ],
)
def test_length_of_a_text_is_bounded(shapes: httpx.Client, path: str, changes: dict[str, Any], message: str) -> None:
    item = {"/score": SAMPLE.score_item(), "/generate": {"prompt": "x"}, "/get_reward": SAMPLE.reward_body()}[path]
    body = item | changes if path == "/get_reward" else {"items": [item | changes]}
    assert message in refusal(shapes.post(path, json=body), 422)


@pytest.mark.parametrize("character", ["\U0001f600", "\\ud83d\\ude00", "\u0100"])
@pytest.mark.parametrize("field", ["image", "unknown"])
def test_a_text_that_takes_more_memory_than_a_body_may_is_refused(
    plain: httpx.Client, field: str, character: str
) -> None:
    ballast = character + "a" * 60_000
    body = grown(json.dumps({"items": [SAMPLE.score_item()]}), '"prompt"', '""').replace("ballast", field)
    body = body.replace(f'"{field}": ""', f'"{field}": "{ballast}"').encode()
    assert "counts four" in refusal(plain.post("/score", content=body, headers=JSON), 413)


def test_a_wide_prompt_does_not_make_the_image_wide(shapes: httpx.Client) -> None:
    # Bytes after the end of an image are no part of it.
    image = base64.b64encode(base64.b64decode(encode(SAMPLE.right)) + bytes(NUM_BYTES)).decode()
    item = SAMPLE.score_item() | {"image": image, "prompt": f"{SAMPLE.record['prompt']} \U0001f600"}
    body = json.dumps({"items": [item]}, ensure_ascii=False).encode()
    response, peak = post_traced(shapes, body)
    assert response.status_code == 200
    assert peak < 6 * len(body)


def test_a_broken_body_that_is_not_ascii_is_explained(plain: httpx.Client) -> None:
    for body in ('{"items": "Käfer', "[" * 10_000 + '"Käfer"'):
        assert "the body is not JSON" in refusal(plain.post("/score", content=body.encode(), headers=JSON), 422)
    body = json.dumps({"items": [SAMPLE.score_item() | {"prompt": "ein Käfer"}]}, ensure_ascii=False)
    response = plain.post("/score", content=body.encode("utf-8-sig"), headers=JSON)
    assert response.status_code == 200
