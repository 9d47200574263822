# SPDX-License-Identifier: Apache-2.0

"""The request in a prompt: conversations of every shape."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from alphagrpo_ext import messages
from alphagrpo_ext.messages import num_image_parts, prompt_text


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
PLACES = st.sampled_from([{"type": "image"}, {"type": "image", "text": None, "image": None}])


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@given(TEXTS)
def test_a_text_in_every_shape_is_the_same_request(text: str) -> None:
    part = {"type": "text", "text": text}
    for prompt in (text, [user(text)], (user(text),), [user([part])], [user([{**part, "image": None}])]):
        assert prompt_text(prompt) == text


@given(st.lists(st.one_of(TEXTS, PLACES), min_size=1).filter(lambda parts: any(isinstance(p, str) for p in parts)))
def test_all_parts_are_read(parts: list[Any]) -> None:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    texts = [part for part in parts if isinstance(part, str)]
    # As a dataset hands the rows out, where missing keys are None.
    (row,) = Dataset.from_list([{"prompt": [user(content)]}])
    for prompt in ([user(content)], row["prompt"]):
        assert prompt_text(prompt) == " ".join(texts)
        assert num_image_parts(prompt) == len(parts) - len(texts)


BLANK = st.sampled_from(["", "  ", "\n\t", None, [], [{"type": "text", "text": " "}], [{"type": "image"}]])
ROLES = st.sampled_from(["system", "developer", "assistant", "tool"])


@given(st.lists(st.builds(dict, role=ROLES, content=TEXTS)), BLANK)
def test_a_conversation_without_a_request_is_refused(before: list[dict[str, Any]], blank: Any) -> None:
    for prompt in (before, [*before, user(blank)], [*before, user(blank), *before, user(blank)]):
        with pytest.raises(ValueError, match="no user message with text"):
            prompt_text(prompt)


@given(st.lists(st.builds(dict, role=ROLES, content=TEXTS), min_size=1))
def test_what_follows_the_request_is_refused(after: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=f"ends with one of role '{after[-1]['role']}'"):
        prompt_text([user("a cat"), *after])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty"),
        (" \n", "prompt is empty"),
        (None, "must be a string or a list of messages, got NoneType"),
        ({"role": "user", "content": "a"}, "got dict"),
        (["a cat"], "each message must have 'role' and 'content'"),
        ([{"from": "human", "value": "a cat"}], r"but one has \['from', 'value'\]"),
        ([{"role": None, "content": "a cat"}], "each message must have 'role'"),
        ([user(7)], "content must be a text or a list of parts, but is int"),
        ([user({"type": "text", "text": "a"})], "content must be a text or a list of parts, but is dict"),
        ([user(["a cat"])], "of type 'text' or 'image'"),
        ([user([{"type": "text", "text": None}])], "of type 'text' or 'image'"),
        ([user([{"type": "text", "text": "a"}, {"type": "audio", "audio": "x"}])], "of type 'text' or 'image'"),
        ([user([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}])], "of type 'text' or 'image'"),
        ([user([{"type": "image", "image": "a.png"}, {"type": "text", "text": "a"}])], "put it into the row's column"),
        ("a \ud83d", "not valid Unicode"),
        ([user("a \ud83d")], "not valid Unicode"),
    ],
)
def test_what_is_no_request_is_named(prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_text(prompt)


def test_what_the_policy_does_not_see_is_announced_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(messages, "_announced", set())
    system, earlier = {"role": "system", "content": "Draw."}, [user("a dog"), {"role": "assistant", "content": "ok"}]
    with caplog.at_level(logging.WARNING):
        for prompt in ([system, user("a cat")], [*earlier, user("a cat")], [system, *earlier, user("a cat")], "a cat"):
            assert prompt_text(prompt) == "a cat"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "a system message, which the policy does not see" in said[0] and "'a cat'" in said[0]
    assert "messages before the last one of the user" in said[1]
