# SPDX-License-Identifier: Apache-2.0

"""`POST /get_reward`: OpenRLHF's remote reward protocol."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import numpy as np
import pytest

from alphagrpo_ext.reward_client.thought import extract_thought
from reward_models.dvreward import DVReward
from support.server_samples import JSON, SAMPLE, SAMPLES, ForgetfulJudge, ScenePainter, metric, refusal, running


def test_openrlhf_gets_rewards_from_policy_and_judge(shapes: httpx.Client) -> None:
    bodies = [sample.reward_body() for sample in SAMPLES]
    body = {name: [entry for one in bodies for entry in one[name]] for name in ("query", "prompts", "labels")}
    response = shapes.post("/get_reward", json={**body, "unknown": 1})
    assert response.status_code == 200
    answer = response.json()
    assert answer["scores"] == answer["rewards"] and len(answer["rewards"]) == len(SAMPLES)
    logs = answer["extra_logs"]
    assert sorted(logs) == ["dvreward_quality", "dvreward_semantic", "strict_pass"]
    products = np.multiply(logs["dvreward_semantic"], logs["dvreward_quality"])
    assert answer["rewards"] == pytest.approx(list(products**0.5), abs=2.0**-17)
    assert set(logs["strict_pass"]) <= {0.0, 1.0}
    assert [isinstance(value, float) for value in logs["strict_pass"]] == [True] * len(SAMPLES)


def test_tags_of_ones_own_change_nothing(shapes: httpx.Client, plain: httpx.Client) -> None:
    asked = [{**question, "tag": "Brand colour"} for question in SAMPLE.record["semantic_questions"]]
    own = json.dumps({**SAMPLE.record, "semantic_questions": asked})
    rewards = [
        shapes.post("/get_reward", json={**SAMPLE.reward_body(), **labels}) for labels in ({}, {"labels": [own]})
    ]
    assert [response.status_code for response in rewards] == [200, 200]
    assert rewards[0].json()["extra_logs"].keys() == rewards[1].json()["extra_logs"].keys()
    items = [SAMPLE.score_item(), {**SAMPLE.score_item(), "semantic_questions": asked}]
    first, second = plain.post("/score", json={"items": items}).json()["scores"]
    assert first == second and first["reward"] is not None


def test_openrlhf_client_itself_gets_its_reward() -> None:
    agent = pytest.importorskip("openrlhf.utils.agent")
    body = SAMPLE.reward_body()
    with running(None, ScenePainter(), judge="shapes") as client:
        executor = agent.SingleTurnAgentExecutor(f"{client.base_url}/get_reward")
        (answer,) = asyncio.run(executor._fetch_rewards_via_http(body["query"], body["prompts"], body["labels"]))
        assert answer["rewards"][0] > 0.9 and answer["extra_logs"]["strict_pass"] == [1.0]


def test_reward_is_that_of_the_image_that_the_thought_stands_for() -> None:
    painter = ScenePainter()
    body = SAMPLE.reward_body()
    other = next(sample for sample in SAMPLES if sample.plan != SAMPLE.plan)
    completions = [SAMPLE.plan, f"  {SAMPLE.plan}\n<|im_end|>\n<|endoftext|>", other.plan, ""]
    body["query"] = [body["prompts"][0] + completion + "<|im_end|>" for completion in completions]
    body["prompts"], body["labels"] = body["prompts"] * 4, body["labels"] * 4
    with running(None, painter, judge="shapes") as client:
        rewards = client.post("/get_reward", json=body).json()["rewards"]
    assert [request.thought for request in painter.requests] == [SAMPLE.plan, SAMPLE.plan, other.plan, ""]
    assert {request.prompt for request in painter.requests} == {SAMPLE.record["prompt"]}
    assert {(request.image, request.seed) for request in painter.requests} == {(None, None)}
    assert rewards[0] == rewards[1] > 0.9 > max(rewards[2:])


def test_label_may_hold_a_conversation_and_questions_of_one_side_alone() -> None:
    painter = ScenePainter()
    messages = [{"role": "system", "content": "draw"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}]
    record = {**SAMPLE.record, "prompt": messages, "semantic_questions": []}
    body = {**SAMPLE.reward_body(), "labels": [json.dumps(record)]}
    with running(None, painter, judge="shapes") as client:
        answer = client.post("/get_reward", json=body).json()
    assert painter.requests[0].prompt == "a"
    assert answer["extra_logs"]["dvreward_semantic"] == answer["extra_logs"]["dvreward_quality"]
    assert answer["rewards"] == pytest.approx(answer["extra_logs"]["dvreward_quality"], abs=2.0**-17)


@pytest.mark.parametrize(
    ("query", "prompt", "expected"),
    [
        ("paint a cat: a black cat", "paint a cat:", "a black cat"),
        (
            "<|im_start|>user\nx<|im_end|>\n  <think> y </think><|im_end|>\n",
            "<|im_start|>user\nx<|im_end|>",
            "<think> y </think>",
        ),
        ("<s> [x] a cat</s>", "[x]", "a cat"),
        ("<bos>x y<end_of_turn>\n<pad><pad>", "x", "y"),
        ("x<|im_end|>", "x", ""),
        ("a <|vision_start|>b", "", "a b"),
    ],
)
def test_thought_is_what_follows_the_prompt(query: str, prompt: str, expected: str) -> None:
    assert extract_thought(query, prompt) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": ["something else"]}, r"query[0] does not begin with the prompt"),
        ({"labels": []}, "must have the same length"),
        ({"labels": ["{"]}, "labels[0] must be the JSON of a record"),
        ({"labels": ["[]"]}, "labels[0]: expected a mapping, got list"),
        ({"labels": [json.dumps({"prompt": "x"})]}, "labels[0] has no 'semantic_questions'"),
        ({"labels": [json.dumps({**SAMPLE.record, "prompt": [1]})]}, "labels[0]: prompt: each message must have"),
        (
            {"labels": [json.dumps({**SAMPLE.record, "prompt": "\ud800"})]},
            "labels[0]: prompt: the text is not valid Unicode",
        ),
        ({"labels": [None]}, "labels.0: Input should be a valid string"),
        ({"prompts": "x"}, "prompts: Input should be a valid list"),
        ({"query": ["x"] * 9, "prompts": ["x"] * 9, "labels": ["{}"] * 9}, "query has 9 entries, more than the 8"),
    ],
)
def test_malformed_reward_requests_are_explained(shapes: httpx.Client, changes: dict[str, Any], message: str) -> None:
    response = shapes.post("/get_reward", content=json.dumps({**SAMPLE.reward_body(), **changes}), headers=JSON)
    assert message in refusal(response, 422)


def test_an_image_without_a_score_is_never_a_reward() -> None:
    with running(DVReward(ForgetfulJudge()), ScenePainter()) as client:
        detail = refusal(client.post("/get_reward", json=SAMPLE.reward_body()), 503)
        assert "query [0]" in detail and "must not become a reward" in detail
        assert metric(client, "alphagrpo_images_failed_total") == 1
