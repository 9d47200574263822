# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reward_models.judges.yes_no import (
    YesNo,
    answer_start,
    check_min_answer_mass,
    read_plain_answer,
    read_yes_no,
    yes_no_of_logits,
    yes_probability,
    yes_probability_of_logits,
)


SPELLINGS = {True: ["Yes", " yes", "YES", "Ġyes", "▁Yes", "**yes", "“Yes”"], False: ["No", "no.", " NO", "Ġno", '"No']}
OTHERS = ["Maybe", "<think>", "The", "Nope", "", "**", "not", "yesterday"]
NO_NUMBERS = [None, math.nan, math.inf, -math.inf, 3.0]


@st.composite
def distributions(draw: st.DrawFn) -> tuple[list[tuple[str, float]], float, float]:
    """Candidates in any order, with the probabilities of yes and of no."""
    num_yes, num_no, num_others = (draw(st.integers(0, 3)) for _ in range(3))
    tokens = draw(st.permutations(SPELLINGS[True]))[:num_yes] + draw(st.permutations(SPELLINGS[False]))[:num_no]
    tokens += draw(st.permutations(OTHERS))[:num_others]
    weights = [draw(st.floats(1e-6, 1.0)) for _ in tokens]
    share = draw(st.floats(0.1, 1.0))
    probabilities = [weight / sum(weights) * share for weight in weights]
    candidates = [(token, math.log(p)) for token, p in zip(tokens, probabilities, strict=True)]
    yes, no = sum(probabilities[:num_yes]), sum(probabilities[num_yes : num_yes + num_no])
    return draw(st.permutations(candidates)), yes, no


@given(distributions(), st.floats(0.0, 1.0))
def test_probability_needs_a_mass(case: tuple[list[tuple[str, float]], float, float], min_answer_mass: float) -> None:
    candidates, yes, no = case
    answer = yes_probability(candidates, min_answer_mass)
    if yes + no > min_answer_mass + 1e-5:
        assert answer == pytest.approx(yes / (yes + no), abs=1e-9)
    elif yes + no < min_answer_mass - 1e-5 or yes + no == 0:
        assert answer is None


@given(distributions(), st.sampled_from(SPELLINGS[True] + SPELLINGS[False]), st.sampled_from(NO_NUMBERS))
def test_a_yes_or_no_without_a_number_is_no_answer(
    case: tuple[list[tuple[str, float]], float, float], token: str, value: float | None
) -> None:
    assert yes_probability([*case[0], (token, value)], 0.0) is None


@given(distributions(), st.sampled_from(OTHERS), st.sampled_from(NO_NUMBERS))
def test_numbers_of_other_words_do_not_matter(
    case: tuple[list[tuple[str, float]], float, float], token: str, value: float | None
) -> None:
    assert yes_probability([*case[0], (token, value)], 0.3) == yes_probability(case[0], 0.3)


@given(distributions(), st.sampled_from(SPELLINGS[True] + SPELLINGS[False]))
def test_what_an_engine_did_not_consider_adds_nothing(
    case: tuple[list[tuple[str, float]], float, float], token: str
) -> None:
    assert yes_probability([*case[0], (token, -9999.0)]) == yes_probability(case[0])


@given(distributions(), st.data())
def test_a_candidate_that_is_listed_twice_counts_once(
    case: tuple[list[tuple[str, float]], float, float], data: st.DataObject
) -> None:
    repeated = data.draw(st.lists(st.sampled_from(case[0]))) if case[0] else []
    assert yes_probability([*case[0], *repeated], 0.3) == yes_probability(case[0], 0.3)


@pytest.mark.parametrize(("yes", "no"), [(0.0, 0.0), (math.log(0.9), math.log(0.6)), (0.0, math.log(0.03))])
def test_more_than_all_of_the_probability_is_no_answer(yes: float, no: float) -> None:
    with pytest.raises(ValueError, match="more than 1 together"):
        read_yes_no([("Yes", yes), ("No", no)])
    assert yes_probability([("Yes", yes), ("No", no)]) is None


def test_rounded_log_probabilities_may_be_a_little_above_1() -> None:
    assert yes_probability([("Yes", 0.009), ("No", -5.0)]) == pytest.approx(1 / (1 + math.exp(-5.009)))


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ([5.0, 3.0, -9.0], 0.8808),
        ([5.0, -math.inf, -9.0], 1.0),
        ([5.0, 3.0, 9.0], None),
        ([-math.inf, -math.inf, 0.0], None),
        ([-math.inf, -math.inf, -math.inf], None),
        ([math.nan, 3.0, -9.0], None),
        ([5.0, 3.0, math.nan], None),
        ([math.inf, 3.0, -9.0], None),
        ([5.0, 3.0, math.inf], None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_distributions_follow_the_same_rules(row: list[float], answer: float | None, dtype: torch.dtype) -> None:
    sound = [4.0, 4.0, -9.0]
    actual = yes_probability_of_logits(torch.tensor([sound, row, sound], dtype=dtype), [0], [1])
    assert actual == [0.5, None if answer is None else pytest.approx(answer, abs=1e-3), 0.5]


@given(st.lists(st.floats(-20, 20, width=32), min_size=4, max_size=4))
def test_logits_and_log_probabilities_agree(row: list[float]) -> None:
    (reading,) = yes_no_of_logits(torch.tensor([row]), [0, 1], [2])
    log_probs = torch.tensor(row, dtype=torch.float64).log_softmax(-1).tolist()
    candidates = list(zip(["Yes", "yes", "No", "Maybe"], log_probs, strict=True))
    expected = yes_probability(candidates, 0.0)
    assert reading.p_yes == pytest.approx(expected, abs=1e-5)
    assert reading.mass == pytest.approx(sum(map(math.exp, log_probs[:3])), abs=1e-5)


def test_nothing_known_is_no_answer_even_without_a_minimum() -> None:
    assert YesNo(math.nan, 0.0).answer(0.0) is None
    assert YesNo(0.5, math.nan).answer(0.0) is None


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_the_minimum_is_a_probability(value: float) -> None:
    with pytest.raises(ValueError, match="min_answer_mass must be in"):
        check_min_answer_mass(value)


LEADS = [
    "",
    " \n",
    "**",
    "<answer>",
    "<|begin_of_box|>",
    "\n<|begin_of_box|>",
    "\\boxed{",
    "$\\boxed{\\text{",
    "Answer: ",
    "**Answer:** ",
    "The answer is ",
    "Final answer - ",
    '{"answer": "',
    "[ANSWER] ",
    "<think>\n\n</think>\n\n",
    "<think>No, wait.</think>",
    "It may be no.</think>\n",
    "“",
    "> ",
    "ĊĠ",
]
TAILS = [
    "",
    ".",
    "**",
    "</answer>",
    "<|end_of_box|>",
    "}",
    "}}$",
    '"}',
    "!\n",
    "\n\nThe cat is there.",
    ", it is.",
    " - it is",
]


@given(st.sampled_from(LEADS), st.sampled_from(["yes", "no"]), st.sampled_from(TAILS), st.sampled_from([0, 1, 2]))
def test_plain_answers_are_read_behind_markup(lead: str, word: str, tail: str, case: int) -> None:
    spelling = [word, word.capitalize(), word.upper()][case]
    assert read_plain_answer(f"{lead}{spelling}{tail}") == (word == "yes")
    assert answer_start(f"{lead}{spelling}") == len(lead)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(
    "text",
    [
        "No idea, I cannot tell",
        "No clue.",
        "No answer",
        "No information",
        "No one can tell",
        "No-one",
        "no_answer",
        "No longer visible",
        "Not sure",
        "Not applicable",
        "None",
        "Nope",
        "N/A",
        "Yes and no",
        "Yes, and no.",
        "Yes or no",
        "yes/no",
        "Yes. No.",
        "*Yes* and *no*",
        "Yesterday",
        "Unclear, no details",
        "",
    ],
)
def test_words_that_only_begin_like_an_answer_are_none(lead: str, text: str) -> None:
    assert read_plain_answer(lead + text) is None


@pytest.mark.parametrize(
    "text",
    [
        "<think>",
        "<think>No",
        "<think>\nYes, that",
        "<thinking>yes",
        "[THINK]no",
        "<seed:think>No, wait",
        "<|START_THINKING|>No, wait",
        "<\uff5cbegin\u2581of\u2581thinking\uff5c>No, wait",
        "[REASONING] No, wait",
        "<answer><inner_thought>No, wait",
        "<think>Maybe</think><cot>No, wait",
        "<",
    ],
)
def test_a_thought_that_has_not_ended_is_no_answer(text: str) -> None:
    assert read_plain_answer(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "<" + " " * 100_000,
        " " * 100_000,
        "yes" + "*" * 100_000 + "x",
        "yes" + " <a>" * 25_000 + "x",
        "yes " + "- " * 50_000 + "x",
        "yes " + "and " * 25_000,
        "answer" + " *" * 50_000,
        ("<" + " " * 60) * 1_600,
    ],
    ids=lambda text: text[:12],
)
def test_a_long_answer_takes_linear_time(text: str) -> None:
    started = time.perf_counter()
    read_plain_answer(text)
    # It takes hundredths of a second, and would take minutes if every place looked through the rest of the text.
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("tag", ["<think>", "<seed:think>", "<|START_THINKING|>", "[REASONING]"])
def test_a_local_judge_does_not_read_on_behind_the_tag_of_a_thought(tag: str) -> None:
    # It continues where what was written is all lead.
    assert answer_start(tag) < len(tag)
    assert answer_start("<answer>") == len("<answer>")


def test_an_answer_behind_a_long_thought_is_read() -> None:
    assert read_plain_answer(f"<think>{'No, wait. ' * 2_000}</think>\n\nYes.") == 1.0


@given(st.text(max_size=200))
def test_any_text_is_read(text: str) -> None:
    assert read_plain_answer(text) in (None, 0.0, 1.0)
    assert 0 <= answer_start(text) <= len(text)
