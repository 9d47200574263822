# SPDX-License-Identifier: Apache-2.0

import random
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image

from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.models.bagel.generation import feed_tokens, prefill_sequences
from alphagrpo_ext.models.bagel.layout import BagelSequence
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.shapes.prompts import prompt_rows, sample_scene, sample_spec
from alphagrpo_ext.shapes.scene import render
from reward_models.likelihood.arguments import LikelihoodArguments
from reward_models.likelihood.policy import PolicyScorer
from reward_models.likelihood.reward import LikelihoodReward
from support.toy_family import ToyModel, make_toy_processor
from support.toy_fixtures import installed_toy_family, toy_model  # noqa: F401


PROMPTS = [row["prompt"] for row in prompt_rows("evaluation", 3, seed=0)]


@pytest.fixture(scope="module")
def packaged() -> tuple[BagelModel, BagelProcessor]:
    model, processor = load_model("bagel-shapes", attn_implementation="eager")
    return model.eval(), processor


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = random.Random(0)
    return [render(sample_scene(sample_spec(rng, "evaluation"), rng)) for _ in PROMPTS]


def token_by_token(
    model: BagelModel, processor: BagelProcessor, sequence: BagelSequence, ids: list[int]
) -> list[float]:
    """Log-probabilities of tokens that are fed to a cache one after the other."""
    cache = prefill_sequences(model, [sequence]).with_slots(1, len(ids) + 1)
    values = []
    for token_id, following in zip([model.config.bos_token_id, *ids], ids, strict=False):
        logits = feed_tokens(model, cache, torch.tensor([token_id]), torch.tensor([True]))[0]
        values.append(logits.log_softmax(-1)[following].item())
    return values


@pytest.mark.parametrize("context", ["vit", "vae_vit"])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_rewards_equal_a_computation_token_by_token(
    packaged: tuple[BagelModel, BagelProcessor], images: list[Image.Image], context: str, batch_size: int
) -> None:
    model, processor = packaged
    scorer = PolicyScorer(*packaged, context, prefix="there is", instruction="is it red ?", batch_size=batch_size)
    rewards = LikelihoodReward(scorer)(PROMPTS, images=[[image] for image in images])
    prefix = processor.encode_text("there is")
    for image, prompt, reward in zip(images, PROMPTS, rewards, strict=True):
        sequence = BagelSequence(model.config)
        segment = processor.image_segment(image, model)
        if context == "vae_vit":
            sequence.add_latents(segment.latents, segment.grid)
        sequence.add_pixels(segment.pixel_values)
        sequence.add_text(processor.encode_text("is it red ?"))
        values = token_by_token(model, processor, sequence, [*prefix, *processor.encode_text(prompt)])
        assert reward == pytest.approx(torch.tensor(values[len(prefix) :]).mean().item(), abs=1e-4)


def test_the_policy_is_scored_with_its_adapter_switched_off(
    packaged: tuple[BagelModel, BagelProcessor], images: list[Image.Image]
) -> None:
    model, processor = load_model("bagel-shapes", attn_implementation="eager")
    reward = LikelihoodReward(PolicyScorer(model, processor))
    before = reward(PROMPTS, images=images)
    targets = model.family.lora_target_modules("both")
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, modules_to_save=["llm2vae"])
    adapted = get_peft_model(model, config)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    frozen = next(name for name in trained if "lora_A" in name)
    adapted.get_parameter(frozen).requires_grad_(False)
    context = [[processor.looked_at(images[0], model)]]
    text = [processor.text_segment(PROMPTS[0])]
    with_adapter = model.text_log_probs(context, text)[0]
    assert reward(PROMPTS, images=images) == before
    assert abs(with_adapter.mean().item() - before[0]) > 0.1
    assert torch.equal(model.text_log_probs(context, text)[0], with_adapter)
    assert isinstance(adapted, PeftModel) and adapted.get_model_status().enabled is True
    still = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert still == [name for name in trained if name != frozen]


def test_arguments_choose_the_model(packaged: tuple[BagelModel, BagelProcessor]) -> None:
    asked = []

    def policy() -> tuple[Any, Any]:
        asked.append(True)
        return packaged

    scorer = LikelihoodReward.from_arguments(LikelihoodArguments(likelihood_prefix="a"), policy).scorer
    assert scorer.model is packaged[0] and (scorer.prefix, scorer.instruction, scorer.context) == ("a", "", "vit")
    named = LikelihoodReward.from_arguments(LikelihoodArguments(likelihood_model="bagel-shapes"), policy)
    assert named.scorer.model is not packaged[0] and len(asked) == 1
    assert named.run_settings["model"] == "bagel-shapes" and named.run_settings["context"] == "vit"
    with pytest.raises(ValueError, match="likelihood_scorer 'policy' needs likelihood_model"):
        LikelihoodReward.from_arguments(LikelihoodArguments())
    with pytest.raises(ValueError, match="unknown likelihood scorer 'polcy'. Did you mean 'policy'"):
        LikelihoodReward.from_arguments(LikelihoodArguments("polcy"), policy)


@pytest.mark.usefixtures("installed_toy_family")
def test_a_family_without_vision_tower_reads_latents(toy_model: ToyModel) -> None:  # noqa: F811
    processor = make_toy_processor()
    with pytest.raises(
        ValueError, match="'vit' needs a vision tower, which ToyModel does not have: set it to 'vae_vit'"
    ):
        PolicyScorer(toy_model, processor)
    with pytest.raises(ValueError, match="ToyModel has no vision tower"):
        processor.looked_at(Image.new("RGB", (8, 8)), toy_model)
    reward = LikelihoodReward(PolicyScorer(toy_model, processor, "vae_vit"))
    reward.preflight(8, 12)
    values = reward(["a red dog", "a red dog"], images=[Image.new("RGB", (8, 12), color) for color in ("red", "blue")])
    assert values[0] != values[1] and max(values) < 0
