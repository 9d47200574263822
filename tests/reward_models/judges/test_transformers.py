# SPDX-License-Identifier: Apache-2.0

"""A real vision-language model class, tiny and with random weights: LLaVA, whose processor needs no torchvision."""

import asyncio
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from reward_models.arguments import RewardArguments
from reward_models.judges.transformers import TransformersJudge
from reward_models.judges.yes_no import QUESTION_PROMPT, YesNo
from support.tiny_llava import make_images, make_vlm


QUESTIONS = [
    "Is there a cat?",
    "Is the big cat on the left of the small dog red?",
    "Yes?",
    "Is it raining in the image?",
]


@pytest.fixture(scope="module")
def vlm() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    return make_vlm()


@torch.no_grad()
def by_hand(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, image: Image.Image, question: str
) -> float:
    """P(yes) of one question in a forward of its own, summed over the spellings in the vocabulary."""
    text = f"USER: <image>{QUESTION_PROMPT.format(question=question)} ASSISTANT:"
    inputs = processor(images=image, text=text, return_tensors="pt")
    probabilities = model(**inputs).logits[0, -1].double().softmax(-1)
    by_word = {"yes": 0.0, "no": 0.0}
    for token, token_id in processor.tokenizer.get_vocab().items():
        word = token.replace("Ġ", "").strip(".,!").lower()
        if word in by_word:
            by_word[word] += probabilities[token_id].item()
    return by_word["yes"] / (by_word["yes"] + by_word["no"])


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_probabilities_equal_a_softmax_by_hand(
    vlm: tuple[LlavaForConditionalGeneration, LlavaProcessor], batch_size: int
) -> None:
    judge = TransformersJudge(*vlm, batch_size=batch_size, min_answer_mass=0.0)
    images = make_images(3)

    async def ask() -> list[list[float]]:
        answers = await asyncio.gather(*(judge.answer(image, QUESTIONS) for image in images))
        await judge.aclose()
        return answers

    answers = asyncio.run(ask())
    expected = [[by_hand(*vlm, image, question) for question in QUESTIONS] for image in images]
    for actual, correct in zip(answers, expected, strict=True):
        assert actual == pytest.approx(correct, abs=1e-5)
    spread = np.array(expected)
    assert spread.std(axis=0).min() > 1e-3, "the image does not matter"
    assert spread.std(axis=1).min() > 1e-3, "the question does not matter"


def test_the_image_is_read_once_for_all_questions(vlm: tuple[LlavaForConditionalGeneration, LlavaProcessor]) -> None:
    judge = TransformersJudge(*vlm, min_answer_mass=0.0)
    first, second = make_images(2)
    judge.probabilities(first, QUESTIONS)
    assert judge._shares_prefix is True
    num_images = []
    tower = vlm[0].model.vision_tower
    handle = tower.register_forward_pre_hook(
        lambda module, args, kwargs: num_images.append(len(kwargs.get("pixel_values", args[0] if args else None))),
        with_kwargs=True,
    )
    try:
        shared = judge.probabilities(second, QUESTIONS)
        assert num_images == [1]
        judge._shares_prefix = False
        padded = judge.probabilities(second, QUESTIONS)
        assert num_images == [1, 4]
    finally:
        handle.remove()
    assert shared == pytest.approx(padded, abs=1e-5)


def test_a_model_that_cannot_share_a_prefix_gets_padded_batches(
    vlm: tuple[LlavaForConditionalGeneration, LlavaProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = TransformersJudge(*vlm, min_answer_mass=0.0)
    (image,) = make_images(1)
    original = vlm[0].forward

    def forward(*args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            raise NotImplementedError("no cache")
        return original(*args, **kwargs)

    monkeypatch.setattr(vlm[0], "forward", forward)
    expected = [by_hand(*vlm, image, question) for question in QUESTIONS]
    for _ in range(2):
        assert judge.probabilities(image, QUESTIONS) == pytest.approx(expected, abs=1e-5)
    assert judge._shares_prefix is False


def test_a_judge_is_loaded_by_name(vlm: tuple[LlavaForConditionalGeneration, LlavaProcessor], tmp_path: Path) -> None:
    model, processor = vlm
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    arguments = RewardArguments(
        judge="transformers", judge_model=str(tmp_path), judge_batch_size=2, judge_min_answer_mass=0.0
    )
    judge = arguments.make_reward().judge
    (image,) = make_images(1)
    assert judge.batch_size == 2
    assert judge.probabilities(image, QUESTIONS[:1]) == pytest.approx([by_hand(*vlm, image, QUESTIONS[0])], abs=1e-4)


def test_a_judge_without_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match="needs judge_model"):
        RewardArguments(judge="transformers").make_reward()


def test_a_model_that_does_not_answer_gives_no_reward(
    vlm: tuple[LlavaForConditionalGeneration, LlavaProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights, yes and no hold a small part of the probability; and a model may be broken."""
    judge = TransformersJudge(*vlm)
    (image,) = make_images(1)
    assert asyncio.run(judge.answer(image, QUESTIONS)) == [None] * 4
    assert f"no answer to {QUESTIONS[-1]!r}: yes and no hold 0." in judge.last_failure
    assert "must hold judge_min_answer_mass=0.5; the likeliest token is" in judge.last_failure
    assert judge.take_answer_mass() is None

    judge = TransformersJudge(*vlm, min_answer_mass=0.0)
    read = judge.read_logits
    monkeypatch.setattr(judge, "read_logits", lambda logits: read(logits.fill_(float("nan"))))
    assert asyncio.run(judge.answer(image, QUESTIONS)) == [None] * 4
    assert "yes and no hold nan of the probability" in judge.last_failure


def test_tags_and_line_breaks_may_precede_the_answer(
    vlm: tuple[LlavaForConditionalGeneration, LlavaProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = TransformersJudge(*vlm)
    (image,) = make_images(1)
    tokenizer = vlm[1].tokenizer
    start, line_break, yes = (tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "Ċ", "Yes"))
    # What the model writes behind a token: first a special token, then a line break, then the answer.
    following = {start: line_break, line_break: yes}
    rows = []

    def answer_batch(inputs: dict[str, torch.Tensor]) -> list[YesNo]:
        rows.append(len(inputs["input_ids"]))
        logits = torch.zeros(rows[-1], len(tokenizer))
        for row, token_id in enumerate(inputs["input_ids"][:, -1].tolist()):
            # The last question is answered by another word.
            is_other = row == 3 and token_id not in following
            logits[row, tokenizer.convert_tokens_to_ids("the") if is_other else following.get(token_id, start)] = 20.0
        return judge.read_logits(logits)

    monkeypatch.setattr(judge, "_answer_batch", answer_batch)
    *answers, other = judge.probabilities(image, QUESTIONS)
    assert answers == [pytest.approx(1.0, abs=1e-4)] * 3
    assert other is None and "the likeliest token is 'the'" in judge.last_failure
    assert rows == [4, 3, 3]
    assert judge.take_answer_mass() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("value", [-0.5, 1.5, float("nan")])
def test_the_minimum_of_the_mass_is_checked(
    vlm: tuple[LlavaForConditionalGeneration, LlavaProcessor], value: float
) -> None:
    with pytest.raises(ValueError, match="min_answer_mass must be in"):
        TransformersJudge(*vlm, min_answer_mass=value)


def test_a_run_keeps_which_model_judges(vlm: tuple[LlavaForConditionalGeneration, LlavaProcessor]) -> None:
    kept = TransformersJudge(*vlm).run_settings
    assert kept["prompt"] == QUESTION_PROMPT and kept["min_answer_mass"] == 0.5
    model, processor = copy.deepcopy(vlm)
    assert TransformersJudge(model, processor, batch_size=1).run_settings == kept
    with torch.no_grad():
        model.get_input_embeddings().weight[0].add_(1e-3)
    processor.chat_template += " "
    now = TransformersJudge(model, processor).run_settings
    assert [name for name in kept if kept[name] != now[name]] == ["weights", "chat_template"]
