# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys

import pytest
import torch

from alphagrpo_ext.reward_client.client import RewardServerError


CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("query", "prompt", "thought"),
    [
        ("a prompt and a thought", "a prompt", "and a thought"),
        (CHATML.format("hi") + "<think> plan </think><|im_end|>", CHATML.format("hi"), "<think> plan </think>"),
        (CHATML.format("hi"), CHATML.format("hi"), ""),
        # The thought repeats the prompt.
        (CHATML.format("hi") + "assistant: hi", CHATML.format("hi"), "assistant: hi"),
        # A tokenizer that adds a token and cleans up spaces, and one that drops the prompt's last line break.
        ("<s> two squares, on gray\nyes</s>", "two squares , on gray\n", "yes"),
        # A processor writes an image's token as often as the image has patches.
        (
            "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>look: well",
            "<|vision_start|><|image_pad|><|vision_end|>look:",
            "well",
        ),
        (
            "<bos><|turn>user\nhi<turn|>\n<|turn>model\nyes<turn|>",
            "<bos><|turn>user\nhi<turn|>\n<|turn>model\n",
            "yes",
        ),
        ("<start_of_turn>user\nhi<end_of_turn>yes<eos>", "<start_of_turn>user\nhi<end_of_turn>", "yes"),
        ("[INST] hi [/INST] a < b | c > d", "[INST] hi [/INST]", "a < b | c > d"),
        ("Größe 3 μm 猫", "Größe", "3 μm 猫"),
    ],
)
def test_thought_is_what_follows_the_prompt(load_file, query: str, prompt: str, thought: str) -> None:
    assert load_file("reward_file").extract_thought(query, prompt) == thought


@pytest.mark.parametrize(("query", "prompt"), [("prompt thought", "a prompt"), ("a pro", "a prompt"), ("", "a")])
def test_query_without_its_prompt_is_an_error(load_file, query: str, prompt: str) -> None:
    with pytest.raises(ValueError, match="does not begin with the prompt"):
        load_file("reward_file").extract_thought(query, prompt)


def test_reward_is_that_of_the_painted_thought(load_file, server, example, monkeypatch) -> None:
    monkeypatch.setenv("ALPHAGRPO_SERVER_URL", server.url)
    monkeypatch.setenv("ALPHAGRPO_SEED", "3")
    reward_func = load_file("reward_file").reward_func
    prompt, label = CHATML.format("Plan it."), json.dumps(vars(example.label))

    async def as_the_host_does(thought: str) -> dict:
        return await asyncio.to_thread(reward_func, [f"{prompt}{thought}<|im_end|>"], [prompt], [label])

    right, wrong = (asyncio.run(as_the_host_does(thought)) for thought in (example.right, example.wrong))
    for result in (right, wrong):
        assert result["rewards"].shape == (1,)
        assert torch.equal(result["rewards"], result["scores"])
        assert set(result["extra_logs"]) == {"semantic", "quality", "strict_pass"}
        assert all(value.shape == (1,) for value in result["extra_logs"].values())
    assert right["rewards"].item() > 0.9 > wrong["rewards"].item()
    assert (right["extra_logs"]["strict_pass"].item(), wrong["extra_logs"]["strict_pass"].item()) == (1.0, 0.0)
    # What is painted is the request and the thought, not the policy's prompt, and a group shares its noise.
    painted = [body["items"][0] for path, body in server.requests if path == "/generate"]
    assert [item["prompt"] for item in painted] == [example.label.prompt] * 2
    assert [item["thought"] for item in painted] == [example.right, example.wrong]
    assert painted[0]["seed"] == painted[1]["seed"] is not None


def test_several_samples_at_once(load_file, server, example, monkeypatch) -> None:
    monkeypatch.setenv("ALPHAGRPO_SERVER_URL", server.url)
    result = load_file("reward_file").reward_func(
        [f"p {example.wrong}", f"p {example.right}"], ["p", "p"], [json.dumps(vars(example.label))] * 2
    )
    assert result["extra_logs"]["strict_pass"].tolist() == [0.0, 1.0]
    assert result["rewards"][0] < result["rewards"][1]


def test_questions_may_have_tags_of_ones_own(load_file, server, example, monkeypatch) -> None:
    monkeypatch.setenv("ALPHAGRPO_SERVER_URL", server.url)
    label = vars(example.label)
    own = {**label, "semantic_questions": [{**question, "tag": "Brand"} for question in label["semantic_questions"]]}
    results = [load_file("reward_file").reward_func(["p"], ["p"], [json.dumps(record)]) for record in (label, own)]
    assert results[0] == results[1]
    assert server.requests[-1][1]["items"][0]["semantic_questions"] == own["semantic_questions"]


def test_failure_is_logged_with_its_cause_and_raised(load_file, server, example, monkeypatch, caplog) -> None:
    monkeypatch.setenv("ALPHAGRPO_SERVER_URL", server.url)
    monkeypatch.setenv("ALPHAGRPO_MAX_RETRIES", "1")
    reward_func = load_file("reward_file").reward_func
    server.faults.extend([(503, {}, {"detail": "the judge is down"})] * 2)
    with caplog.at_level(logging.ERROR), pytest.raises(RewardServerError):
        reward_func([f"p {example.right}"], ["p"], [json.dumps(vars(example.label))])
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and "the judge is down" in record.getMessage()
    with pytest.raises(ValueError, match="the label is not JSON"):
        reward_func(["p thought"], ["p"], [""])


def test_bad_setting_stops_the_host_when_it_loads_the_file(load_file, monkeypatch) -> None:
    monkeypatch.setenv("ALPHAGRPO_TIMEOUT", "never")
    with pytest.raises(ValueError, match="ALPHAGRPO_TIMEOUT must be a valid number.*but is 'never'"):
        load_file("reward_file")


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, alphagrpo_ext.openrlhf.reward_file, alphagrpo_ext.openrlhf.episode;"
        "heavy = ('torch', 'transformers', 'trl', 'datasets', 'diffusers', 'reward_models');"
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
