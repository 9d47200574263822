# SPDX-License-Identifier: Apache-2.0

"""How a judge reads what an endpoint sends."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from reward_models import DVReward
from reward_models.dvreward import JudgeFailedError
from reward_models.endpoints import endpoint as endpoint_module
from reward_models.endpoints.answers import ChatAnswers, parse_body
from reward_models.endpoints.endpoint import OpenAIEndpoint
from reward_models.endpoints.errors import InvalidAnswerError
from reward_models.judges.openai import ANSWER_TOKENS, OpenAIJudge
from support.scripted_endpoint import Reply, ScriptedEndpoint, chat_body, scripted_endpoint


SURE = [("Yes", math.log(0.8)), ("No", math.log(0.1)), ("Maybe", math.log(0.1))]
P_YES = 8 / 9
IMAGE = Image.new("RGB", (8, 8))


@pytest.fixture(autouse=True)
def without_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module._Waits, "__call__", lambda self, state: 0.0)


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[ScriptedEndpoint, OpenAIEndpoint, asyncio.Runner]]:
    """An endpoint, its client, and the event loop that holds the connections."""
    with scripted_endpoint(Reply({})) as endpoint, asyncio.Runner() as runner:
        client = OpenAIEndpoint(endpoint.url, "judge", max_retries=1)
        yield endpoint, client, runner
        runner.run(client.aclose())


AnswerTo = Callable[..., tuple[float | None, OpenAIJudge, ScriptedEndpoint]]


@pytest.fixture
def answer_to(running: tuple[ScriptedEndpoint, OpenAIEndpoint, asyncio.Runner]) -> AnswerTo:
    """The answer that a judge reads in two tries, with the judge and the endpoint."""
    endpoint, client, runner = running

    def run(reply: Any, **settings: Any) -> tuple[float | None, OpenAIJudge, ScriptedEndpoint]:
        endpoint.bodies.clear()
        endpoint.answer = reply if callable(reply) else lambda body, number: Reply(reply)
        judge = OpenAIJudge(client, **settings)
        (answer,) = runner.run(judge.answer(IMAGE, ["Is it red?"]))
        return answer, judge, endpoint

    return run


def other(token: str) -> tuple[str, list[tuple[str, float]]]:
    """A token that is neither yes nor no, and its candidates."""
    return token, [(token, -0.01), ("Yes", -9.0), ("No", -8.0)]


@pytest.mark.parametrize(
    "lead",
    [
        [],
        ["<|begin_of_box|>"],
        ["\n", "<|begin_of_box|>"],
        ["<answer>"],
        ["<", "answer", ">"],
        ["<", "ans", "wer", ">", "\n"],
        ["**"],
        [" "],
        [""],
        ["\n\n"],
        ["\\", "boxed", "{"],
        ["Answer", ":"],
        ["**", "Answer", ":", "**"],
        ["<think>", "\n\n", "</think>", "\n\n"],
        ["<think>", "No", ",", " maybe", "</think>"],
        ["Ċ", "▁"],
    ],
    ids=repr,
)
@pytest.mark.parametrize("word", ["Yes", " yes", "Yes."])
def test_the_first_word_is_read(answer_to: AnswerTo, lead: list[str], word: str) -> None:
    tokens = [*map(other, lead), (word, SURE), other("<|end_of_box|>"), ("No", [("No", -0.01)])]
    answer, judge, endpoint = answer_to(chat_body(tokens=tokens))
    assert answer == pytest.approx(P_YES)
    assert judge.take_answer_mass() == pytest.approx(0.9)
    assert judge.take_answer_mass() is None
    assert len(tokens) <= endpoint.bodies[0]["max_tokens"] == ANSWER_TOKENS


@pytest.mark.parametrize(
    "tokens",
    [
        [other("The"), ("Yes", SURE)],
        [other("<think>"), ("No", SURE)],
        [other("<"), other("think"), other(">"), ("No", SURE)],
        [other("<|begin_of_box|>")],
        [other("**"), other("Maybe")],
        [("Yes", [("Yes", math.log(0.2)), ("No", math.log(0.2))])],
        [("Yes", [("Yes", math.nan), ("No", -1.0)])],
        [("Yes", [("Yes", -0.1), ("No", math.inf)])],
        [("Yes", [("Yes", 0.0), ("No", 0.0)])],
        [("Yes", [("Yes", None), ("No", None)])],
        [("Yes", [("Yes", "-0.1"), ("No", -2.0)])],
        [("Yes", [("Yes", True), ("No", -2.0)])],
        [("Yes", [(5, -0.1)])],
        [("Yes", [])],
        [],
    ],
    ids=str,
)
def test_anything_else_is_asked_again_and_then_no_answer(answer_to: AnswerTo, tokens: list[Any]) -> None:
    answer, judge, endpoint = answer_to(chat_body(tokens=tokens))
    assert answer is None
    assert len(endpoint.bodies) == 2
    assert "'Is it red?'" in judge.last_failure
    assert f"{endpoint.url}/chat/completions (2 tries)" in judge.last_failure
    assert judge.take_answer_mass() is None


def spoken(*tokens: str, content: str | None = None, **message: Any) -> dict[str, Any]:
    """An answer whose first token is surely the one that was written."""
    body = chat_body("".join(tokens) if content is None else content, [(tokens[0], SURE), *map(other, tokens[1:])])
    body["choices"][0]["message"] |= message
    return body


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        (spoken("Yes", "terday"), "begins with 'Yes', but is neither yes nor no: 'Yesterday'"),
        (spoken("No", "te", " that"), "neither yes nor no"),
        (spoken("Yes", " and", " no"), "neither yes nor no"),
        (spoken("Yes", "/", "No"), "neither yes nor no"),
        (spoken("Yes", " wait", reasoning_content="Yes wait", content=""), "a thought without a text"),
        (spoken("Yes", " wait", reasoning="Yes wait", content="\n"), "a thought without a text"),
    ],
    ids=str,
)
def test_the_probability_of_a_token_that_is_no_answer_does_not_count(
    answer_to: AnswerTo, body: dict[str, Any], cause: str
) -> None:
    answer, judge, _ = answer_to(body)
    assert answer is None
    assert cause in judge.last_failure


@pytest.mark.parametrize(
    "body",
    [
        spoken("Yes", ",", " no", " cat", " is", " there"),
        spoken("Yes", " cat", " is", " there"),
        spoken("Yes", " and", " Yes"),
        spoken("Yes.", "It", " is"),
        # Some engines list the tokens of a sentence without its spaces.
        spoken("Yes", "there", "is", content="Yes there is"),
        spoken("Yes", reasoning_content="It is.", content="Yes"),
        spoken("Yes", reasoning={"effort": None}),
        # What was written need not be a yes or no, if these hold enough of the probability together.
        chat_body("None", [("None", SURE)]),
        chat_body(None, [("Yes", SURE)]),
    ],
    ids=str,
)
def test_an_answer_may_go_on_behind_its_word(answer_to: AnswerTo, body: dict[str, Any]) -> None:
    assert answer_to(body)[0] == pytest.approx(P_YES)


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    body = chat_body(tokens=[("Yes", SURE)])
    change(body)
    return body


def first_token(body: dict[str, Any]) -> dict[str, Any]:
    return body["choices"][0]["logprobs"]["content"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda body: first_token(body)["top_logprobs"].append({"token": None, "logprob": -9.0, "bytes": [255]}),
        lambda body: first_token(body)["top_logprobs"].append({"logprob": -9.0}),
        lambda body: first_token(body)["top_logprobs"].append(None),
        lambda body: first_token(body)["top_logprobs"].append({"token": "x", "logprob": "-inf"}),
        lambda body: first_token(body)["top_logprobs"].append({"token": "x", "logprob": 10**400}),
        lambda body: first_token(body).update(logprob="x"),
        lambda body: body["choices"][0]["logprobs"]["content"].append({"token": ".", "logprob": "x"}),
        lambda body: body["choices"][0]["message"].update(content=[{"type": "text", "text": "Yes"}]),
        lambda body: body["choices"][0]["message"].update(refusal={"a": 1}),
        lambda body: body["choices"][0].update(finish_reason=1),
    ],
)
def test_what_does_not_matter_costs_no_answer(answer_to: AnswerTo, change: Callable[[dict[str, Any]], Any]) -> None:
    answer, _, endpoint = answer_to(changed(change))
    assert answer == pytest.approx(P_YES)
    assert len(endpoint.bodies) == 1


@pytest.mark.parametrize("value", [None, "-0.1", True, 10**400, [], math.nan])
def test_what_is_no_number_is_never_a_yes_or_no(answer_to: AnswerTo, value: Any) -> None:
    for word in (" yes", "NO"):
        body = changed(lambda body: first_token(body)["top_logprobs"].append({"token": word, "logprob": value}))  # noqa: B023
        answer, judge, _ = answer_to(body)
        assert answer is None and f"the log-probability of '{word}'" in judge.last_failure


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (changed(lambda body: body.update(choices=[])), "choices"),
        (changed(lambda body: body.update(choices=None)), "choices"),
        (changed(lambda body: body.update(choices={"0": 1})), "choices"),
        (changed(lambda body: body.pop("choices")), "choices"),
        (changed(lambda body: body["choices"][0].update(logprobs="high")), "logprobs"),
        (changed(lambda body: body["choices"][0].update(logprobs=None)), "no log-probabilities"),
        (changed(lambda body: body["choices"][0].pop("logprobs")), "no log-probabilities"),
        (changed(lambda body: body["choices"][0].update(message=None)), "message"),
        (changed(lambda body: body["choices"][0]["logprobs"]["content"][0].pop("top_logprobs")), "top_logprobs"),
        (changed(lambda body: body["choices"][0]["logprobs"]["content"][0].pop("token")), "token"),
        ([1, 2], "should be a valid dictionary"),
        ("Yes", "should be a valid dictionary"),
        (None, "should be a valid dictionary"),
        ({"error": {"message": "no credits", "code": 402}}, "no credits"),
        (b"<html>welcome</html>", "not JSON"),
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"choices": [{"message": {"content": "\xff"}}]}', "not UTF-8"),
        (json.dumps(chat_body()).encode("latin-1").replace(b"Yes", b"\xe9"), "not UTF-8"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_unreadable_answer_is_asked_again_and_the_cause_is_named(
    answer_to: AnswerTo, content: Any, cause: str
) -> None:
    def second_time_lucky(body: dict[str, Any], number: int) -> Reply:
        return Reply(chat_body(tokens=[("Yes", SURE)]) if number == 1 else content)

    answer, judge, _ = answer_to(second_time_lucky)
    assert answer == pytest.approx(P_YES)
    assert judge.last_failure is None
    answer, judge, _ = answer_to(content)
    assert answer is None
    assert cause in judge.last_failure


def test_the_minimum_is_a_setting(answer_to: AnswerTo) -> None:
    body = chat_body(tokens=[("Yes", [("Yes", math.log(0.2)), ("No", math.log(0.1))])])
    answer, judge, _ = answer_to(body, min_answer_mass=0.25)
    assert (answer, judge.take_answer_mass()) == (pytest.approx(2 / 3), pytest.approx(0.3))
    answer, judge, _ = answer_to(body, min_answer_mass=0.35)
    assert answer is None
    assert "yes and no hold 0.3 of the probability" in judge.last_failure
    with pytest.raises(ValueError, match="min_answer_mass must be in"):
        OpenAIJudge("http://127.0.0.1:9/v1", "judge", min_answer_mass=math.nan)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("**No**", 0.0),
        ("Answer: yes", 1.0),
        ("No, there is none", 0.0),
        ("No idea, I cannot tell", None),
        (None, None),
        ([{"type": "text", "text": "**"}, {"type": "text", "text": "No**"}], 0.0),
        ([{"type": "thinking", "thinking": "Yes"}, {"type": "text", "text": "No"}], 0.0),
        ([{"type": "text", "text": None}, "Yes"], None),
        (5, None),
    ],
)
def test_binary_answers_stand_alone(answer_to: AnswerTo, text: Any, expected: float | None) -> None:
    answer, judge, _ = answer_to(chat_body(text), binary=True)
    assert answer == expected
    assert judge.take_answer_mass() is None


def test_the_mass_is_logged_with_cached_answers() -> None:
    metrics: dict[str, float] = {}

    def answer(body: dict[str, Any], number: int) -> Reply:
        p_no = 0.15 if "dog" in body["messages"][0]["content"][1]["text"] else 0.05
        return Reply(chat_body(tokens=[("Yes", [("Yes", math.log(0.8)), ("No", math.log(p_no))])]))

    async def reward(judge: OpenAIJudge) -> None:
        scorer = DVReward(judge)
        questions = [[{"question": f"Is there a {animal}?", "tag": "Existence"}] for animal in ("cat", "cat", "dog")]
        try:
            await scorer(
                ["p"] * 3,
                [""] * 3,
                images=[IMAGE.copy() for _ in range(3)],
                semantic_questions=questions,
                quality_questions=[[]] * 3,
                log_metric=metrics.__setitem__,
            )
        finally:
            await scorer.aclose()

    with scripted_endpoint(answer) as endpoint:
        asyncio.run(reward(OpenAIJudge(endpoint.url, "judge")))
    assert len(endpoint.bodies) == 2
    assert metrics["judge/answer_mass"] == pytest.approx((0.85 + 0.85 + 0.95) / 3)


def test_a_stopped_run_says_what_the_judge_said() -> None:
    async def check(judge: OpenAIJudge) -> None:
        reward = DVReward(judge)
        record = [{"question": "Is it red?", "tag": "Existence"}]
        try:
            await reward(["p"], [""], images=[IMAGE], semantic_questions=[record], quality_questions=[[]])
        finally:
            await reward.aclose()

    with scripted_endpoint(Reply({"error": {"message": "out of order"}}, 503)) as endpoint:
        with pytest.raises(
            JudgeFailedError, match=rf"{endpoint.url}/chat/completions answered 503 out of order \(1 try"
        ):
            asyncio.run(check(OpenAIJudge(endpoint.url, "judge", max_retries=0)))


def test_a_judge_is_made_of_a_url_or_of_an_endpoint() -> None:
    judge = OpenAIJudge("http://127.0.0.1:9/v1", "judge", max_retries=1, timeout=20.0)
    assert (judge.endpoint.base_url, judge.endpoint.model) == ("http://127.0.0.1:9/v1", "judge")
    assert (judge.endpoint.max_retries, judge.endpoint.timeout) == (1, 20.0)
    assert OpenAIJudge(judge.endpoint).endpoint is judge.endpoint
    with pytest.raises(ValueError, match="model, timeout must be set on the endpoint"):
        OpenAIJudge(OpenAIEndpoint(), "judge", timeout=2.0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def damaged_bodies(draw: st.DrawFn) -> dict[str, Any]:
    """A sound answer with anything in the place of one of its values."""
    body = chat_body(tokens=[("Yes", SURE), ("No", SURE)])
    holders: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            holders.append((value, key))
            walk(value[key])

    walk(body)
    holder, key = draw(st.sampled_from(holders))
    holder[key] = draw(JSON)
    return body


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damaged_bodies())
def test_damage_in_any_place_is_an_answer_or_an_unreadable_one(body: dict[str, Any]) -> None:
    judge = OpenAIJudge("http://127.0.0.1:9/v1", "judge")
    try:
        choice = parse_body(json.dumps(body).encode("utf-8", "surrogatepass"), ChatAnswers).choices[0]
        reading = judge._read_probability(choice)
    except InvalidAnswerError as error:
        assert str(error)
    else:
        assert 0 <= reading.p_yes <= 1 and 0.5 <= reading.mass + 1e-6
