# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from alphagrpo_ext.models.fingerprint import frozen_model_settings
from reward_models.likelihood.arguments import LikelihoodArguments
from reward_models.likelihood.reward import LikelihoodReward
from reward_models.likelihood.transformers import TransformersScorer
from support.tiny_llava import make_images, make_vlm


PROMPTS = ["a red circle", "two dogs on the grass look at the image", "yes"]


@pytest.fixture(scope="module")
def vlm() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    return make_vlm()


@torch.no_grad()
def by_hand(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, image: Image.Image, head: str, ids: Sequence[int]
) -> list[float]:
    """Log-probabilities of tokens in a forward of their own."""
    inputs = processor(images=image, text=head, return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    input_ids = torch.cat([inputs["input_ids"], torch.tensor([list(ids)])], dim=1)
    logits = model(input_ids=input_ids, pixel_values=inputs["pixel_values"]).logits[0].double().log_softmax(-1)
    return [logits[start - 1 + i, token_id].item() for i, token_id in enumerate(ids)]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_rewards_equal_a_computation_by_hand(
    vlm: tuple[LlavaForConditionalGeneration, LlavaProcessor], batch_size: int
) -> None:
    scorer = TransformersScorer(*vlm, prefix="It shows ", instruction="What is it?", batch_size=batch_size)
    images = make_images(3)
    rewards = LikelihoodReward(scorer)(PROMPTS, images=images)
    encode = vlm[1].tokenizer.encode
    prefix = encode("It shows ", add_special_tokens=False)
    for image, prompt, reward in zip(images, PROMPTS, rewards, strict=True):
        ids = encode(prompt, add_special_tokens=False)
        head = "USER: <image>What is it? ASSISTANT:"
        expected = by_hand(*vlm, image, head, [*prefix, *ids])[len(prefix) :]
        assert reward == pytest.approx(np.mean(expected), abs=1e-5)
    (other,) = LikelihoodReward(scorer)(PROMPTS[:1], images=images[1:2])
    assert abs(other - rewards[0]) > 1e-3, "the image does not matter"


def test_a_scorer_is_loaded_by_name(vlm: tuple[LlavaForConditionalGeneration, LlavaProcessor], tmp_path: Path) -> None:
    model, processor = vlm
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    arguments = LikelihoodArguments("transformers", str(tmp_path), likelihood_tokens="content")
    reward = LikelihoodReward.from_arguments(arguments)
    assert not any(parameter.requires_grad for parameter in reward.scorer.model.parameters())
    digests = frozen_model_settings(model.requires_grad_(False), processor)
    assert reward.run_settings == {
        "scorer": "TransformersScorer",
        "instruction": "Describe the image.",
        "model": str(tmp_path),
        "tokens": "content",
        "reward_model": digests,
    }
    (image,) = make_images(1)
    ids = processor.tokenizer.encode("a cat", add_special_tokens=False)
    expected = by_hand(model, processor, image, "USER: <image>Describe the image. ASSISTANT:", ids)
    texts = [processor.tokenizer.decode([token_id]) for token_id in ids]
    assert texts[:2] == ["a", " "] and len(texts) > 2
    assert reward(["a cat"], images=[image]) == pytest.approx([np.mean(expected[2:])], abs=1e-4)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="'transformers' needs likelihood_model"):
        LikelihoodReward.from_arguments(LikelihoodArguments("transformers"))
    with pytest.raises(ValueError, match="likelihood_context='vae_vit' is for unified models"):
        LikelihoodReward.from_arguments(LikelihoodArguments("transformers", "m", "vae_vit"))
    with pytest.raises(ValueError, match="likelihood_tokens must be one of all, content, but is 'none'"):
        LikelihoodArguments(likelihood_tokens="none")
    with pytest.raises(ValueError, match="likelihood_context must be one of vit, vae_vit, but is 'vae'"):
        LikelihoodArguments(likelihood_context="vae")
