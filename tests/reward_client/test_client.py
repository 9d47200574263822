# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import asyncio
import gzip
import json
import math
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from PIL import Image

from alphagrpo_ext.reward_client import client
from alphagrpo_ext.reward_client.client import (
    AsyncRewardClient,
    Label,
    PaintRequest,
    RewardClient,
    RewardServerError,
    noise_seed,
    parse_label,
)
from alphagrpo_ext.reward_client.settings import ClientSettings


def test_generate_sends_everything_and_brings_images(ask, server, example) -> None:
    image = Image.effect_noise((24, 24), 90).convert("RGB")
    requests = [PaintRequest("a", example.right, seed=5), PaintRequest("b", "no plan", image)]
    painted = ask(server.url, "generate", requests)
    assert [picture.tobytes() for picture in painted] == [
        server.paint(example.right).tobytes(),
        server.paint("").tobytes(),
    ]
    ((path, body),) = server.requests
    assert path == "/generate"
    assert body["items"][0] == {"prompt": "a", "thought": example.right, "image": None, "seed": 5}
    assert client.decode_image(body["items"][1].pop("image")).tobytes() == image.tobytes()
    assert body["items"][1] == {"prompt": "b", "thought": "no plan", "seed": None}


def test_score_is_the_judges(ask, server, example) -> None:
    images = [server.paint(example.right), server.paint(example.wrong)]
    right, wrong = ask(server.url, "score", images, [example.label, example.label])
    assert right.strict_pass is True and right.reward > 0.9
    assert wrong.strict_pass is False and wrong.reward < right.reward
    assert len(right.semantic) == len(example.label.semantic_questions)
    assert right.logs == {
        "semantic": pytest.approx(sum(right.semantic) / len(right.semantic)),
        "quality": pytest.approx(sum(right.quality) / len(right.quality)),
        "strict_pass": 1.0,
    }


def test_side_without_an_answer_is_not_a_number() -> None:
    logs = client.ImageScore(0.5, (0.5, None), (), False).logs
    assert logs["semantic"] == 0.5 and math.isnan(logs["quality"])


def test_key_goes_along_and_a_wrong_one_is_refused_at_once(ask, make_server) -> None:
    server = make_server(key="right")
    ask(server.url, "generate", [PaintRequest("a")], server_key="right")
    for settings in ({}, {"server_key": "wrong-key"}):
        with pytest.raises(RewardServerError, match="set ALPHAGRPO_SERVER_KEY") as caught:
            ask(server.url, "generate", [PaintRequest("a")], **settings)
        assert "wrong-key" not in str(caught.value)
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_passing_trouble_passes(ask, server, status: int) -> None:
    server.faults.extend([(status, {}, {"detail": "later"})] * 2)
    assert len(ask(server.url, "generate", [PaintRequest("a")])) == 1
    assert len(server.requests) == 3


@pytest.mark.parametrize("form", [pytest.param("seconds", marks=pytest.mark.slow), "date", "milliseconds"])
def test_server_says_when_to_come_back(ask, server, form: str) -> None:
    headers = {
        "seconds": {"Retry-After": "1"},
        "date": {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)},
        "milliseconds": {"Retry-After-Ms": "700", "Retry-After": "50"},
    }[form]
    server.faults.append((429, headers, {}))
    start = time.monotonic()
    ask(server.url, "generate", [PaintRequest("a")])
    assert 0.6 <= time.monotonic() - start < 30


@pytest.mark.parametrize("value", ["3600", "Fri, 31 Dec 2999 23:59:59 GMT", "9" * 400])
def test_wait_is_bounded_by_the_deadline(ask, server, value: str) -> None:
    server.faults.append((503, {"Retry-After": value}, {}))
    start = time.monotonic()
    ask(server.url, "generate", [PaintRequest("a")], timeout=0.5)
    assert 0.4 <= time.monotonic() - start < 20


def test_what_stays_is_not_tried_again(ask, server) -> None:
    server.faults.append((501, {}, {"detail": "this server has no painter"}))
    with pytest.raises(RewardServerError, match=r"refused a request to /generate \(501 after 1 try.*no painter"):
        ask(server.url, "generate", [PaintRequest("a")])
    server.faults.append((308, {"Location": "https://x/generate"}, {}))
    with pytest.raises(RewardServerError, match="is at another address, https://x/generate: set ALPHAGRPO_SERVER_URL"):
        ask(server.url, "generate", [PaintRequest("a")])
    server.faults.append((404, {}, {"detail": "Not Found"}))
    with pytest.raises(RewardServerError, match=r"no route /generate.*ALPHAGRPO_SERVER_URL \(404 after 1 try"):
        ask(server.url, "generate", [PaintRequest("a")])
    assert len(server.requests) == 3


def test_lasting_trouble_is_an_error_after_the_last_try(ask, server, example) -> None:
    server.faults.extend([(503, {}, {"detail": "the judge is down"})] * 9)
    with pytest.raises(RewardServerError, match="503 after 4 tries.*the judge is down"):
        ask(server.url, "score", [server.paint("")], [example.label])
    assert len(server.requests) == 4


def test_request_at_fault_is_not_sent_again(ask, server) -> None:
    server.faults.append((422, {}, {"detail": "items[0]: prompt is empty"}))
    with pytest.raises(RewardServerError, match="refused a request to /generate.*prompt is empty"):
        ask(server.url, "generate", [PaintRequest("")])
    assert len(server.requests) == 1


def test_server_out_of_reach_names_the_variable(ask) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(RewardServerError, match=rf":{port} \(ALPHAGRPO_SERVER_URL\) is out of reach after 2 tries"):
        ask(f"http://127.0.0.1:{port}", "generate", [PaintRequest("a")], max_retries=1)


def test_slow_server_names_the_variable(ask, make_server) -> None:
    server = make_server(delay=1.0)
    with pytest.raises(RewardServerError, match="did not answer in 0.2 s after 1 try: raise ALPHAGRPO_TIMEOUT"):
        ask(server.url, "generate", [PaintRequest("a")], timeout=0.2, max_retries=0)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("hello", "probably not the reward server"),
        ({"pictures": []}, "probably not the reward server"),
        ({"images": []}, "must send 1 images"),
        ({"images": "aGVsbG8="}, "must send 1 images"),
        ({"images": ["aGVsbG8="]}, "cannot be read"),
        ({"images": ["?"]}, "cannot be read"),
        ({"images": [None]}, "cannot be read"),
    ],
)
def test_strange_image_is_an_error(ask, server, answer: Any, message: str) -> None:
    server.faults.append((200, {}, answer))
    with pytest.raises(RewardServerError, match=message):
        ask(server.url, "generate", [PaintRequest("a")])


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ({"reward": None, "semantic": [None], "quality": [], "strict_pass": None}, "could not score image 0"),
        ({"reward": 0.5}, "cannot be read"),
        (0.5, "cannot be read"),
    ],
)
def test_missing_score_is_never_a_reward(ask, server, example, score: Any, message: str) -> None:
    server.faults.append((200, {}, {"scores": [score]}))
    with pytest.raises(RewardServerError, match=message):
        ask(server.url, "score", [server.paint("")], [example.label])


SOUND = {"reward": 0.5, "semantic": [0.25, None], "quality": [1], "strict_pass": False}
LABEL = Label(
    "p",
    [{"question": "a?", "tag": "Count"}, {"question": "b?", "is_valid": False}, {"question": "c?", "is_valid": None}],
    [{"question": "d?", "tag": "Aesthetics", "is_valid": True}],
)


def test_a_sound_score_is_read(ask, server) -> None:
    server.faults.append((200, {}, {"scores": [SOUND]}))
    (score,) = ask(server.url, "score", [server.paint("")], [LABEL])
    assert score == client.ImageScore(0.5, (0.25, None), (1.0,), False)


@pytest.mark.parametrize("value", ["0.5", [0.5], True, 7.0, -1, {}, 10**400])
@pytest.mark.parametrize("field", ["reward", "semantic.1"])
def test_a_number_must_be_a_probability(ask, server, field: str, value: Any) -> None:
    score = SOUND | ({"reward": value} if field == "reward" else {"semantic": [0.5, value]})
    server.faults.append((200, {}, {"scores": [score]}))
    with pytest.raises(RewardServerError, match=rf"{server.url}/score sent a score .*'scores\.0\.{field}'"):
        ask(server.url, "score", [server.paint("")], [LABEL])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"semantic": "abc"}, "'scores.0.semantic'"),
        ({"semantic": None}, "'scores.0.semantic'"),
        ({"semantic": [0.5]}, "image 0 has 1 semantic answers, but 2 valid semantic_questions"),
        ({"quality": []}, "image 0 has 0 quality answers, but 1 valid quality_questions"),
        ({"strict_pass": None}, "image 0 has no strict_pass"),
        ({"strict_pass": 1}, "'scores.0.strict_pass'"),
    ],
)
def test_answers_must_be_those_to_the_questions(ask, server, changes: dict[str, Any], message: str) -> None:
    server.faults.append((200, {}, {"scores": [SOUND | changes]}))
    with pytest.raises(RewardServerError, match=f"{server.url}/score sent a score that cannot be read.*{message}"):
        ask(server.url, "score", [server.paint("")], [LABEL])


@pytest.mark.parametrize("method", ["generate", "score"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_json_has_no_number_without_a_value(ask, server, method: str, number: float) -> None:
    body = json.dumps({"scores": [SOUND | {"reward": number}], "images": [number]}).encode()
    server.faults.append((200, {}, body))
    arguments = ([PaintRequest("a")],) if method == "generate" else ([server.paint("")], [LABEL])
    with pytest.raises(RewardServerError, match="cannot be read"):
        ask(server.url, method, *arguments)


@pytest.mark.parametrize("body", [b"", b'{"scores": [{"rew', b'{"scores": "\xff', b"upstream went away"])
def test_an_answer_that_was_cut_off_is_asked_for_again(ask, server, body: bytes) -> None:
    server.faults.extend([(200, {}, body), (200, {}, {"scores": [SOUND]})])
    (score,) = ask(server.url, "score", [server.paint("")], [LABEL])
    assert score.reward == 0.5 and len(server.requests) == 2
    server.faults.extend([(200, {}, body)] * 2)
    with pytest.raises(RewardServerError, match=r"did not answer with 'scores'.*\(after 2 tries\)"):
        ask(server.url, "score", [server.paint("")], [LABEL], max_retries=1)


def test_a_damaged_compressed_answer_is_asked_for_again(ask, server) -> None:
    server.faults.append((200, {"content-encoding": "gzip"}, gzip.compress(b"{}")[:-9]))
    assert len(ask(server.url, "generate", [PaintRequest("a")])) == 1


def test_texts_of_a_server_are_shortened(ask, server) -> None:
    server.faults.append((400, {}, b"\x1b[2Jbad\n" + b"x" * 5000))
    with pytest.raises(RewardServerError, match=r"\(400 after 1 try: \[2Jbad x+\)$") as caught:
        ask(server.url, "generate", [PaintRequest("a")])
    assert len(str(caught.value)) < 800


def test_password_of_the_address_is_not_printed(ask, server) -> None:
    url = server.url.replace("http://", "http://user:secret@")
    for answer in ((400, {}, {}), (200, {}, b"<html>"), (200, {}, {"images": []})):
        server.faults.append(answer)
        with pytest.raises(RewardServerError, match=server.url) as caught:
            ask(url, "generate", [PaintRequest("a")])
        assert "secret" not in str(caught.value)


def test_a_web_page_is_another_servers(ask, server) -> None:
    server.faults.append((200, {}, b" <html>welcome</html>"))
    with pytest.raises(RewardServerError, match="probably not the reward server; check ALPHAGRPO_SERVER_URL"):
        ask(server.url, "generate", [PaintRequest("a")])
    assert len(server.requests) == 1


def test_no_more_requests_at_once_than_allowed(make_server) -> None:
    server = make_server(delay=0.05)

    async def many() -> None:
        reward_client = AsyncRewardClient(ClientSettings(server_url=server.url, max_concurrency=3, timeout=60.0))
        await asyncio.gather(*(reward_client.generate([PaintRequest(str(i))]) for i in range(12)))
        await reward_client.aclose()

    asyncio.run(many())
    assert len(server.requests) == 12 and server.peak == 3


def test_time_in_the_queue_is_not_that_of_a_try(make_server) -> None:
    server = make_server(delay=0.4)
    config = ClientSettings(server_url=server.url, max_concurrency=1, max_retries=0, timeout=1.5)

    async def many() -> None:
        reward_client = AsyncRewardClient(config)
        await asyncio.gather(*(reward_client.generate([PaintRequest(str(i))]) for i in range(5)))
        await reward_client.aclose()

    asyncio.run(many())
    assert len(server.requests) == 5


def test_closed_client_ends_its_thread_and_opens_a_new_one(server) -> None:
    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "reward client"]

    reward_client = RewardClient(ClientSettings(server_url=server.url))
    reward_client.close()
    before = threads()
    for _ in range(2):
        assert len(reward_client.generate([PaintRequest("a")])) == 1
        (own,) = set(threads()) - set(before)
        reward_client.close()
        own.join(timeout=60)
        assert not own.is_alive()


def test_calls_end_when_another_thread_closes_the_client() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        reward_client = RewardClient(ClientSettings(server_url=url, max_retries=0))
        ended: list[str] = []

        def call() -> None:
            try:
                reward_client.generate([PaintRequest("a")])
            except BaseException as error:
                ended.append(type(error).__name__)

        caller = threading.Thread(target=call, daemon=True)
        caller.start()
        with listener.accept()[0]:
            reward_client.close()
            caller.join(timeout=10)
        assert len(ended) == 1


def test_client_of_threads_works_inside_an_event_loop(server) -> None:
    reward_client = RewardClient(ClientSettings(server_url=server.url))

    async def generate() -> list[Image.Image]:
        return reward_client.generate([PaintRequest("a")])

    assert len(asyncio.run(generate())) == 1
    reward_client.close()


def test_threads_share_a_client_and_loops_do_too(server, example) -> None:
    config = ClientSettings(server_url=server.url)
    shared = RewardClient(config)
    painted: list[bytes] = []
    threads = [
        threading.Thread(
            target=lambda: painted.append(shared.generate([PaintRequest("a", example.right)])[0].tobytes())
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    shared.close()
    assert painted == [server.paint(example.right).tobytes()] * 8
    across_loops = AsyncRewardClient(config)

    async def generate() -> list[Image.Image]:
        try:
            return await across_loops.generate([PaintRequest("a")])
        finally:
            await across_loops.aclose()

    for _ in range(2):
        assert len(asyncio.run(generate())) == 1


def test_label_is_read(example) -> None:
    assert parse_label(json.dumps({**vars(example.label), "category": "colors"})) == example.label


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("", "not JSON"),
        (None, "not JSON"),
        ("[1]", "a JSON object"),
        ('{"semantic_questions": [], "quality_questions": []}', "'prompt' must be a text"),
        ('{"prompt": " ", "semantic_questions": [], "quality_questions": []}', "'prompt' must be a text"),
        ('{"prompt": "a", "quality_questions": []}', "'semantic_questions' must be a list"),
        ('{"prompt": "a", "semantic_questions": [], "quality_questions": "[]"}', "'quality_questions' must be a list"),
    ],
)
def test_bad_label_says_how_to_make_one(label: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*recipes/openrlhf_prompts.py"):
        parse_label(label)


def test_noise_is_a_groups_own() -> None:
    assert noise_seed(None, "a", 0) is None
    assert noise_seed(0, "a", 0) == noise_seed(0, "a", 0)
    seeds = {noise_seed(seed, prompt, turn) for seed in (0, 1) for prompt in "ab" for turn in (0, 1)}
    assert len(seeds) == 8 and all(0 <= seed < 2**31 for seed in seeds)
