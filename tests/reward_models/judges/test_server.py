# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import pytest
from PIL import Image

from alphagrpo_ext.reward_client.client import RewardServerError
from alphagrpo_ext.shapes.judge import answer_questions
from alphagrpo_ext.shapes.prompts import sample_scene, sample_spec, semantic_questions
from alphagrpo_ext.shapes.scene import render
from reward_models.arguments import RewardArguments
from reward_models.dvreward import DVReward, JudgeFailedError
from reward_models.judges.server import ServerJudge
from reward_models.prompts.questions import from_row
from reward_models.server.app import create_app
from reward_models.server.arguments import KEY_VARIABLE, ServerArguments
from support.loopback import LoopbackServer, serve


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackServer]:
    monkeypatch.setenv(KEY_VARIABLE, "a-long-key")
    with serve(create_app(ServerArguments(judge="shapes"))) as running:
        yield running


def test_answers_are_those_of_the_judge_behind_the_server(server: LoopbackServer) -> None:
    rng = random.Random(0)
    images, questions = [], []
    for _ in range(6):
        spec = sample_spec(rng, "train")
        images.append(render(sample_scene(spec, rng)))
        questions.append([question["question"] for question in semantic_questions(spec)])

    async def ask() -> list[list[float | None]]:
        judge = ServerJudge(server.url + "/", max_retries=0)
        try:
            return await asyncio.gather(
                *(judge.answer(image, qs) for image, qs in zip(images, questions, strict=True))
            )
        finally:
            await judge.aclose()

    expected = [answer_questions(image, qs) for image, qs in zip(images, questions, strict=True)]
    assert asyncio.run(ask()) == expected


def test_an_image_is_not_scored_if_a_question_has_no_answer(server: LoopbackServer) -> None:
    rng = random.Random(1)
    spec = sample_spec(rng, "train")
    image = render(sample_scene(spec, rng))
    unknown = "Does the fur look soft?"
    assert answer_questions(image, [unknown]) == [None]

    judge = ServerJudge(server.url, max_retries=0)

    async def ask() -> list[float | None]:
        try:
            return await judge.answer(image, [semantic_questions(spec)[0]["question"], unknown])
        finally:
            await judge.aclose()

    with pytest.raises(RewardServerError, match="could not score"):
        asyncio.run(ask())
    assert "could not score" in judge.last_failure


def test_a_wrong_key_is_a_missing_reward(server: LoopbackServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "another-long-key")
    arguments = RewardArguments(judge="server", judge_base_url=server.url, judge_max_retries=0)
    reward = arguments.make_reward()
    assert isinstance(reward, DVReward) and isinstance(reward.judge, ServerJudge)
    rng = random.Random(2)
    spec = sample_spec(rng, "train")
    row = {"prompt": "p", "semantic_questions": semantic_questions(spec), "quality_questions": []}

    async def score() -> float | None:
        try:
            (result,) = await reward.score([render(sample_scene(spec, rng))], [from_row(row)])
            return result.reward
        finally:
            await reward.aclose()

    assert asyncio.run(score()) is None


def test_needs_to_know_where_the_server_is() -> None:
    with pytest.raises(ValueError, match="judge_base_url"):
        RewardArguments(judge="server").make_reward()


def test_errors_name_the_arguments_of_the_judge(server: LoopbackServer) -> None:
    async def error_of(judge: ServerJudge) -> str:
        try:
            with pytest.raises(RewardServerError) as caught:
                await judge.answer(Image.new("RGB", (24, 24)), ["is there a red circle ?"])
            return str(caught.value)
        finally:
            await judge.aclose()

    errors = [
        asyncio.run(error_of(ServerJudge("http://127.0.0.1:9", max_retries=0))),
        asyncio.run(error_of(ServerJudge(f"{server.url}/v1", max_retries=0))),
    ]
    with pytest.raises(ValueError, match="judge_base_url must start with http") as caught:
        ServerJudge("localhost:8001")
    for error in (*errors, str(caught.value)):
        assert "judge_base_url" in error and "ALPHAGRPO_" not in error


def test_answers_are_bounded_by_the_judges_argument(server: LoopbackServer) -> None:
    arguments = RewardArguments(
        judge="server", judge_base_url=server.url, judge_max_retries=0, judge_max_answer_bytes=20
    )
    reward = arguments.make_reward()
    assert isinstance(reward, DVReward)
    with pytest.raises(JudgeFailedError, match="of more than 20 bytes: raise judge_max_answer_bytes"):
        asyncio.run(reward.preflight(24, 24))


def test_preflight_asks_about_an_image_of_the_size_that_is_painted(
    server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(DVReward(ServerJudge(server.url)).preflight(24, 24))
    # The judge behind this server reads images of one size.
    with pytest.raises(JudgeFailedError, match="could not score"):
        asyncio.run(DVReward(ServerJudge(server.url)).preflight(32, 32))
    monkeypatch.setenv(KEY_VARIABLE, "another-long-key")
    with pytest.raises(JudgeFailedError, match=KEY_VARIABLE):
        asyncio.run(DVReward(ServerJudge(server.url)).preflight(24, 24))
