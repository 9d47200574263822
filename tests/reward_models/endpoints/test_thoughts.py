# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import time

import pytest

from reward_models.endpoints.thoughts import begins_with_thought, end_of_thought


# What begins a thought in released models, and what ends it.
THOUGHTS = [
    ("<think>", "</think>"),
    ("< Think >", "</ Think >"),
    ("<thinking>", "</thinking>"),
    ("<think_fast>", "</think_fast>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|thought_start|>", "<|thought_end|>"),
    ("<|think|>", "<|/think|>"),
    ("<|reasoning|>", "</|reasoning|>"),
    ("<internal_reasoning>", "</internal_reasoning>"),
    ("<inner_thought>", "</inner_thought>"),
    ("<inner_monologue>", "</inner_monologue>"),
    ("<scratch>", "</scratch>"),
    ("<cot>", "</cot>"),
    ("[THINK]", "[/THINK]"),
    ("[thinking]", "[/thinking]"),
    ("[REASONING]", "[/REASONING]"),
    ("<\uff5cbegin\u2581of\u2581thinking\uff5c>", "<\uff5cend\u2581of\u2581thinking\uff5c>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("\uff1cthink\uff1e", "\uff1c/think\uff1e"),
]


@pytest.mark.parametrize(("begin", "end"), THOUGHTS)
def test_thoughts_of_every_family(begin: str, end: str) -> None:
    assert begins_with_thought(f"\n{begin}No, wait")
    assert end_of_thought(f"{begin}No, wait") == 0
    whole = f"{begin}No, wait{end}"
    assert not begins_with_thought(f"{whole}Yes")
    assert end_of_thought(f"{whole}Yes") == len(whole)


@pytest.mark.parametrize(
    "text",
    ["<answer>I think yes", "[yes] I think", "<apricot>", "<|begin_of_box|>", "I think</b>"],
)
def test_other_texts_have_no_thought(text: str) -> None:
    assert not begins_with_thought(text)
    assert end_of_thought(text) == 0


def test_an_empty_thought_has_ended() -> None:
    assert end_of_thought("<think/>Yes") == len("<think/>")


@pytest.mark.parametrize(
    "part",
    ["<", "<" + " " * 60, "</think ", "<" + "think" * 12, "[end" + "think " * 10, "<" + "|" * 60, "<cot", "</think>"],
)
@pytest.mark.parametrize("once", [False, True], ids=["repeated", "first"])
def test_a_long_text_takes_linear_time(part: str, once: bool) -> None:
    text = part + " " * 300_000 if once else part * (300_000 // len(part))
    started = time.perf_counter()
    end_of_thought(text)
    begins_with_thought(text)
    # It takes a tenth of that at most, and would take minutes if every place looked through the rest of the text.
    assert time.perf_counter() - started < 5
