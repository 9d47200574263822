# SPDX-License-Identifier: Apache-2.0

"""A judge that does not answer stops a run before anything is painted, in all processes."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reward_models.arguments import PromptArguments
from reward_models.dvreward import DVReward, JudgeFailedError
from reward_models.endpoints import preflight
from reward_models.judges.base import PREFLIGHT_QUESTION
from reward_models.judges.openai import OpenAIJudge
from support.scripted_endpoint import Reply, chat_body, scripted_endpoint


ROOT = Path(__file__).parents[2]
GOOD = Reply(chat_body("Yes", [("Yes", [("Yes", -0.1), ("No", -2.4)])]))


def asked_image(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"][0]["image_url"]["url"]


def close(reward: DVReward, trainer: Any) -> None:
    """Close the connections of a training."""
    asyncio.run_coroutine_threadsafe(reward.aclose(), trainer.async_loop).result()


@pytest.mark.parametrize("wrap", [lambda reward: reward, functools.partial])
def test_trainer_asks_once_before_it_paints(make_trainer: Callable[..., Any], wrap: Callable) -> None:
    with scripted_endpoint(GOOD) as endpoint:
        with pytest.raises(JudgeFailedError, match=f"try {endpoint.url}"):
            make_trainer(reward_funcs=wrap(DVReward(OpenAIJudge(endpoint.root, "m"))))
        reward = DVReward(OpenAIJudge(endpoint.url, "m"))
        trainer = make_trainer(reward_funcs=wrap(reward))
        (body,) = endpoint.bodies
        assert PREFLIGHT_QUESTION in str(body)
        trainer.train()
        images = [asked_image(other) for other in endpoint.bodies]
        assert images.count(asked_image(body)) == 1 and len(set(images)) == 5
        close(reward, trainer)
    assert trainer.state.log_history[0]["judge/failed_frac"] == 0


def test_run_that_stops_later_says_why(make_trainer: Callable[..., Any]) -> None:
    refusal = Reply({"error": {"message": "the key has expired"}}, 401)
    with scripted_endpoint(lambda body, number: GOOD if number == 0 else refusal) as endpoint:
        reward = DVReward(OpenAIJudge(endpoint.url, "m"))
        trainer = make_trainer(reward_funcs=reward)
        with pytest.raises(JudgeFailedError) as caught:
            trainer.train()
        close(reward, trainer)
        for word in (f"{endpoint.url}/chat/completions", "401 the key has expired", "1 try", "OPENAI_API_KEY"):
            assert word in str(caught.value)


def test_hold_out_judge_is_asked_when_the_trainer_is_made(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "PAUSES", ())
    with scripted_endpoint(GOOD) as endpoint:

        def holdout(url: str) -> list[Any]:
            arguments = PromptArguments(holdout_judge="openai", holdout_judge_base_url=url, holdout_judge_model="m")
            return arguments.make_holdout_callbacks()

        message = rf"reward 'holdout'.* try {endpoint.url}.*begin with holdout_"
        with pytest.raises(JudgeFailedError, match=message):
            make_trainer(arguments={"callbacks": holdout(endpoint.root)})
        trainer = make_trainer()
        trainer.add_callback(holdout(endpoint.root)[0])
        with pytest.raises(JudgeFailedError, match=message):
            trainer.train()
        assert not endpoint.bodies
        make_trainer(arguments={"callbacks": holdout(endpoint.url)})
        assert len(endpoint.bodies) == 1


CHECK = """
from accelerate import PartialState

state = PartialState(cpu=True)
from alphagrpo_ext.trainer.reward_functions import preflight_rewards


def reward(**kwargs): ...


def preflight(height, width):
    assert state.is_main_process, "asked in another process"
    if height > 8:
        raise ConnectionError("no answer from example.org")


reward.preflight = preflight
preflight_rewards([reward], 8, 8)
try:
    preflight_rewards([reward], 9, 8)
except Exception as error:
    print(type(error).__name__, error)
state.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_stop_together() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in ("0", "1"):
        environment = os.environ | {
            **{"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"},
        }
        command = [sys.executable, "-c", CHECK]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert outputs == [f"{name} no answer from example.org" for name in ("ConnectionError", "PreflightError")]
