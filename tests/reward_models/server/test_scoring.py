# SPDX-License-Identifier: Apache-2.0

"""`POST /score`: the reward of images."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence

import httpx
import numpy as np
import pytest
from PIL import Image

from reward_models.dvreward import DVReward, Score
from reward_models.files.image_decoding import EncodedImage
from reward_models.prompts.questions import from_row
from reward_models.server.service import RewardService
from support.server_samples import SAMPLE, SAMPLES, ScenePainter, YesJudge, encode, metric, refusal, running


def test_score_is_that_of_the_reward_in_process(plain: httpx.Client) -> None:
    images = [SAMPLES[0].right, SAMPLES[1].wrong, SAMPLES[2].right]
    items = [sample.score_item(image) for sample, image in zip(SAMPLES, images, strict=False)]
    items[1]["image"] = "data:image/png;base64," + items[1]["image"]
    items[2]["image"] = encode(images[2], "WEBP", lossless=True)
    items[2]["semantic_questions"] = json.dumps(items[2]["semantic_questions"])
    response = plain.post("/score", json={"items": items})
    assert response.status_code == 200
    expected = asyncio.run(DVReward("shapes").score(images, [from_row(sample.record) for sample in SAMPLES[:3]]))
    assert response.json()["scores"] == [
        {
            "reward": score.reward,
            "semantic": list(score.semantic),
            "quality": list(score.quality),
            "strict_pass": score.strict_pass,
        }
        for score in expected
    ]
    assert [score.strict_pass for score in expected] == [True, False, True]


def test_jpeg_and_transparent_images_are_read_outside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, decoding, judging = [], set(), set()
    decode = EncodedImage.decode

    def note_thread(image: EncodedImage) -> Image.Image:
        decoding.add(threading.get_ident())
        return decode(image)

    monkeypatch.setattr(EncodedImage, "decode", note_thread)

    class LookingJudge(YesJudge):
        async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
            judging.add(threading.get_ident())
            seen.append((image.mode, image.getpixel((0, 0))))
            return await super().answer(image, questions)

    with running(DVReward(LookingJudge(), max_concurrency=1)) as client:
        images = [
            encode(Image.new("RGB", (8, 8), (200, 0, 0)), "JPEG", quality=100),
            encode(Image.new("RGBA", (8, 8), (200, 0, 0, 0))),
            encode(Image.new("L", (8, 8), 7)),
        ]
        response = client.post("/score", json={"items": [{**SAMPLE.score_item(), "image": i} for i in images]})
    assert [score["reward"] for score in response.json()["scores"]] == [1.0] * 3
    assert decoding and not decoding & judging
    assert [mode for mode, _ in seen] == ["RGB"] * 3
    jpeg, transparent, gray = (pixel for _, pixel in seen)
    assert np.abs(np.subtract(jpeg, (200, 0, 0))).max() <= 3
    assert (transparent, gray) == ((255, 255, 255), (7, 7, 7))


def test_an_image_that_could_not_be_scored_has_no_reward_and_is_counted() -> None:
    large = SAMPLE.right.resize((32, 32))
    with running(judge="shapes") as client:
        response = client.post("/score", json={"items": [SAMPLE.score_item(large), SAMPLE.score_item()]})
        failed, scored = response.json()["scores"]
        assert failed["reward"] is None and failed["strict_pass"] is None
        assert set(failed["semantic"] + failed["quality"]) == {None}
        assert scored["reward"] > 0.9
        assert metric(client, "alphagrpo_images_failed_total") == 1
        assert metric(client, "alphagrpo_images_scored_total") == 1


def test_no_items_are_no_scores(plain: httpx.Client) -> None:
    assert plain.post("/score", json={"items": []}).json() == {"scores": []}


def test_what_a_judge_says_about_its_failure_is_logged_and_not_sent(caplog: pytest.LogCaptureFixture) -> None:
    class LeakingJudge(YesJudge):
        async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
            raise RuntimeError("key sk-123 at http://10.0.0.7")

    class LeakingReward(DVReward):
        async def score(self, *_: object) -> list[Score]:
            raise RuntimeError("key sk-123 at http://10.0.0.7")

    painter = ScenePainter()
    for reward, status in ((DVReward(LeakingJudge()), 200), (LeakingReward(LeakingJudge()), 503)):
        caplog.clear()
        with running(reward, painter) as client:
            scored = client.post("/score", json={"items": [SAMPLE.score_item()]})
            rewarded = client.post("/get_reward", json=SAMPLE.reward_body())
        assert (scored.status_code, rewarded.status_code) == (status, 503)
        assert "sk-123" not in scored.text + rewarded.text
        assert "sk-123" in caplog.text


def test_a_fault_of_the_server_is_logged_and_not_sent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("key sk-123 at http://10.0.0.7")

    monkeypatch.setattr(RewardService, "score", fail)
    with running(judge="shapes") as client:
        response = client.post("/score", json={"items": [SAMPLE.score_item()]})
    assert "see its log" in refusal(response, 500) and "sk-123" not in response.text
    assert "sk-123" in capsys.readouterr().err
