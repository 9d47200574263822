# SPDX-License-Identifier: Apache-2.0

import asyncio
import json
import random
from typing import Any

import pytest
from trl.trainer.utils import get_callable_name

from alphagrpo_ext.shapes.prompts import sample_scene, sample_spec, sample_violation
from alphagrpo_ext.shapes.text import reflection, repair
from alphagrpo_ext.trainer.reward_functions import preflight_rewards
from reward_models.dvreward import JudgeFailedError
from reward_models.endpoints import preflight
from reward_models.endpoints.endpoint import OpenAIEndpoint
from reward_models.endpoints.structured_output import StructuredChat
from reward_models.format import (
    FORMATS,
    WANTED_VERDICT,
    ReflectionStructure,
    ReflectionVerdict,
    ShapesReflectionFormat,
    ThinkFormat,
)
from support.chat_stub import chat_stub


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think> a plan </think>", 1.0),
        ("  <think>\na plan\n</think>\n", 1.0),
        ("a plan </think>", 0.0),
        ("<think> a plan", 0.0),
        ("<think> a plan </think> and more", 0.0),
        ("<think> a <think> plan </think>", 0.0),
        ("</think><think>", 0.0),
        ("", 0.0),
    ],
)
def test_think_format(text: str, expected: float) -> None:
    assert ThinkFormat()(completions=[text]) == [expected]
    assert ThinkFormat()(completions=[[{"role": "assistant", "content": text}]]) == [expected]
    assert get_callable_name(ThinkFormat()) == "think_format"


def test_every_reflection_of_the_shapes_world_has_the_form() -> None:
    rng = random.Random(0)
    texts = []
    for _ in range(300):
        spec = sample_spec(rng, "train")
        right = sample_scene(spec, rng)
        wrong = sample_violation(right, spec, rng) if rng.random() < 0.8 else right
        texts.append(reflection(wrong, repair(wrong, spec, rng)))
    assert any("nothing wrong" in text for text in texts)
    assert ShapesReflectionFormat()(completions=texts) == [1.0] * len(texts)


@pytest.mark.parametrize(
    "text",
    [
        "<think> white : red circle top left </think>",
        "<think> wrong : red circle ; plan : white : red circle top left </think>",
        "<think> wrong : red circle top left must be ; plan : white : red circle top left </think>",
        "<think> wrong : background must be red ; plan : white : red circle top left </think>",
        "<think> nothing wrong ; plan : white : red circle top </think>",
        "<think> nothing wrong ; plan : white : red circle top left </think> red",
        "<think> nothing wrong wrong ; plan : white : red circle top left </think>",
        "<think> wrong : extra red circle top left , extra red circle top left , extra red circle top left ; plan : "
        "white : red circle top left </think>",
        "",
    ],
)
def test_other_texts_have_not(text: str) -> None:
    assert ShapesReflectionFormat()(completions=[text]) == [0.0]


def test_every_turn_counts() -> None:
    good, bad = "<think> a </think>", "a"
    rewards = ThinkFormat()(completions=["joined"] * 3, texts=[[good, good], [good, bad], []])
    assert rewards == [1.0, 0.5, None]


def test_formats_count_for_text_alone() -> None:
    assert FORMATS.names() == ["shapes_reflection", "think"]
    assert all(FORMATS.get(name)().text_only for name in FORMATS.names())


GOOD = WANTED_VERDICT.model_dump()


class Scripted:
    """Stands in for a language model, which cannot run here: answers by the reflection in the request."""

    def __init__(self, answers: dict[str, str | Exception]) -> None:
        self.answers = answers
        self.requests: list[str] = []

    async def ask(self, request: str, answer_type: type[ReflectionVerdict]) -> ReflectionVerdict:
        self.requests.append(request)
        (answer,) = [
            answer for reflection, answer in self.answers.items() if f"Reflection:\n{reflection}\n" in request
        ]
        if isinstance(answer, Exception):
            raise answer
        return answer_type.model_validate_json(answer)


def test_reflection_structure_is_the_share_of_what_is_wanted() -> None:
    chat = Scripted(
        {
            "good": json.dumps(GOOD),
            "rambling": json.dumps(GOOD | {"expands_prompt": True, "has_junk": True}),
            "broken": "yes",
            "unlucky": ConnectionError("no route"),
            "vague": json.dumps(GOOD | {"commands_fix": None}),
        }
    )
    reward = ReflectionStructure(chat, max_concurrency=2, max_failed_frac=0.8)
    prompts = ["a cat", [{"role": "user", "content": "a dog"}], "a cat", "a cat", "a cat"]
    completions = ["good", [{"role": "assistant", "content": "rambling"}], "broken", "unlucky", "vague"]
    rewards = asyncio.run(reward(prompts=prompts, completions=completions, trainer_state=None))
    assert rewards == [1.0, pytest.approx(0.6), None, None, None]
    assert "Request:\na dog\n" in chat.requests[1]
    assert reward.text_only and reward.always_applies
    turns = asyncio.run(reward(prompts=["a cat"] * 2, completions=[""] * 2, texts=[["good", "rambling"], []]))
    assert turns == [pytest.approx(0.8), None]


def test_a_language_model_that_fails_stops_the_run_and_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    chat = Scripted({"good": json.dumps(GOOD), "unlucky": ConnectionError("no route")})
    reward = ReflectionStructure(chat)
    half = ["good", "unlucky"] * 3
    assert asyncio.run(reward(["a cat"] * 6, half)) == [1.0, None] * 3
    with pytest.raises(JudgeFailedError, match="no verdict on 4 of 6 reflections, .* max_failed_frac=0.5 .*no route"):
        asyncio.run(reward(["a cat"] * 6, [*half[1:], "unlucky"]))
    assert len(caplog.records) == 1
    assert asyncio.run(reward(["a cat"], [""], texts=[[]])) == [None]
    with pytest.raises(ValueError, match="max_failed_frac"):
        ReflectionStructure(chat, max_failed_frac=1.5)


def test_reflection_structure_asks_one_question_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "PAUSES", (0.01,))
    with chat_stub(lambda request: GOOD) as stub:
        preflight_rewards([ReflectionStructure(StructuredChat(OpenAIEndpoint(stub.url, "stub")))], 8, 8)
        assert len(stub.requests) == 1
        stub.answer = lambda request: "I cannot judge."
        reward = ReflectionStructure(StructuredChat(OpenAIEndpoint(stub.url, "stub")), name="structure")
        with pytest.raises(JudgeFailedError, match=r"'structure' gives no verdict, so nothing was started: .*no JSON"):
            preflight_rewards([reward], 8, 8)
    with pytest.raises(JudgeFailedError, match=f"{stub.url}/chat/completions cannot be reached"):
        preflight_rewards([reward], 8, 8)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("[]", "Input should be an object"),
        (json.dumps({"has_junk": True}), "restates_request\n  Field required"),
        (json.dumps(GOOD | {"has_junk": 0}), "has_junk\n  Input should be a valid boolean"),
        ("{", "Invalid JSON"),
    ],
)
def test_verdicts_are_read_strictly(answer: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReflectionVerdict.model_validate_json(answer)


def test_a_run_keeps_which_model_judges_reflections() -> None:
    def kept(model: str | None = "judge", url: str = "http://a/v1", **settings: Any) -> dict[str, Any]:
        reward = ReflectionStructure(StructuredChat(OpenAIEndpoint(url, model, api_key="sk-secret"), **settings))
        return reward.run_settings["reward_model"]

    first = kept()
    assert first["model"] == "judge" and "The text says what the request asks for." in first["prompt"]
    assert "sk-secret" not in str(first) and first == kept(url="http://b/v1", max_tokens=9)
    for changed in ({"model": "other"}, {"temperature": 1.0}, {"extra_body": {"seed": 1}}):
        assert kept(**changed) != first
    chat = StructuredChat(OpenAIEndpoint("http://a/v1"))
    # What it learns from the first answer.
    chat.endpoint.model = "judge"
    assert ReflectionStructure(chat).run_settings["reward_model"]["model"] is None
