# SPDX-License-Identifier: Apache-2.0

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alphagrpo_ext.shapes.prompts import split_of
from alphagrpo_ext.shapes.scene import render
from alphagrpo_ext.trajectory import ImageSegment, TextSegment
from recipe_tools.shapes_pretraining.batches import PretrainingLoss, build_batch, build_trajectory
from recipe_tools.shapes_pretraining.examples import (
    Example,
    PretrainingMixture,
    sample_examples,
    sample_pretraining_spec,
    sample_random_scene,
    scene_pixels,
    unique_scenes,
)
from recipe_tools.shapes_pretraining.families import SHAPES_FAMILIES
from recipe_tools.shapes_pretraining.training import sample_batches, train_autoencoder


FEW = PretrainingMixture(direct=1, thought=2, answer=1, described_answer=1, reflection=1)


@pytest.fixture(scope="module", params=("bagel", "cosmos3"))
def family(request: pytest.FixtureRequest) -> SimpleNamespace:
    torch.manual_seed(0)
    shapes = SHAPES_FAMILIES.get(request.param)()
    processor = shapes.build_processor()
    return SimpleNamespace(shapes=shapes, processor=processor, model=shapes.build_model(processor))


def trajectory_of(family: SimpleNamespace, example: Example) -> Any:
    scenes = unique_scenes([example])
    latents = dict(zip(scenes, family.model.encode_images(scene_pixels(scenes)), strict=True))
    return build_trajectory(example, latents, family.processor, family.model, FEW, torch.Generator())


def test_pretraining_mixes_in_rare_combinations():
    rng = random.Random(0)
    specs = [sample_pretraining_spec(rng) for _ in range(4000)]
    splits = Counter(map(split_of, specs))
    assert set(splits) == {"train", "rare"}
    assert splits["rare"] / len(specs) == pytest.approx(0.03, abs=0.01)
    assert min(Counter(spec.category for spec in specs).values()) > 0.12 * len(specs)


def test_tokenizer_knows_every_word_of_the_examples(family):
    tokenizer, rng = family.processor.tokenizer, random.Random(0)
    for part in sample_examples(rng, PretrainingMixture(condition_dropout=0.5)):
        for example in part:
            for segment in trajectory_of(family, example).segments:
                if isinstance(segment, TextSegment):
                    assert tokenizer.unk_token_id not in segment.token_ids, example
                    if segment.sampled:
                        assert family.processor.decode(segment.content_ids) == example.learned
    pieces = getattr(family.model.config, "chat_pieces", {})
    assert not any(tokenizer.unk_token_id in ids for ids in pieces.values())


def test_dropped_condition_is_a_guidance_branch(family):
    rng, size = random.Random(0), (24, 24)
    shown, target = sample_random_scene(rng), sample_random_scene(rng)
    whole = trajectory_of(family, Example("repair", True, "a red circle", target=target, shown=shown))
    given = whole.segments[:-1]
    expected = [family.processor.branch_context(name, given, size) for name in family.model.branches[1:]]
    for index, context in enumerate(expected):
        dropped = (index + 0.5) / len(expected)
        example = Example("repair", True, "a red circle", target=target, shown=shown, dropped=dropped)
        actual = trajectory_of(family, example).segments[:-1]
        assert [type(segment) for segment in actual] == [type(segment) for segment in context]
        texts = [[s.token_ids for s in segments if isinstance(s, TextSegment)] for segments in (actual, context)]
        assert texts[0] == texts[1]
    assert any(not any(isinstance(s, ImageSegment) for s in c) or len(c) < len(given) for c in expected)


@torch.no_grad()
def test_question_is_read_as_a_judge_asks_it(family):
    model, processor = family.model.eval(), family.processor
    scene, question = sample_random_scene(random.Random(1)), "is there a red circle ?"
    batch = build_batch([trajectory_of(family, Example("answer", False, question, "yes", shown=scene))], model)
    pixels = processor.question_pixels(render(scene))
    logits = model.answer_logits(pixels, [processor.text_segment(question)])[0]
    (yes,) = processor.text_segment("yes").token_ids
    log_prob = model(**batch.inputs).log_probs[0]
    torch.testing.assert_close(log_prob, logits.float().log_softmax(-1)[yes], atol=1e-5, rtol=0)


def test_loss_falls_on_one_batch(family):
    torch.manual_seed(0)
    model = family.shapes.build_model(family.processor)
    for name in model.family.frozen_modules:
        model.get_submodule(name).requires_grad_(False)
    batches = sample_batches(random.Random(0), torch.Generator().manual_seed(0), model, family.processor, FEW)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer, losses = torch.optim.AdamW(parameters.values(), lr=2e-3), []
    for _ in range(12):
        text, image = PretrainingLoss(model)(batches)
        losses.append((text.item(), image.item()))
        (text + image).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1][0] < 0.6 * losses[0][0]
    assert losses[-1][1] < 0.95 * losses[0][1]
    assert not [name for name, old in before.items() if torch.equal(old, parameters[name])]


def test_autoencoder_ends_with_normalized_latents(family):
    torch.manual_seed(0)
    model = family.shapes.build_model(family.processor)
    autoencoder = family.shapes.autoencoder(model)
    args = SimpleNamespace(
        seed=0, vae_steps=6, decoder_steps=2, decoder_noise=0.3, vae_batch_size=8, vae_learning_rate=2e-3
    )
    first = {name: value.clone() for name, value in autoencoder.module.state_dict().items()}
    error = train_autoencoder(autoencoder, args)
    assert error < 2 and any(
        not torch.equal(old, autoencoder.module.state_dict()[name]) for name, old in first.items()
    )
    rng = random.Random("other")
    latents = model.encode_images(scene_pixels([sample_random_scene(rng) for _ in range(256)]))
    assert abs(latents.mean()) < 0.15
    assert latents.std() == pytest.approx(1, abs=0.15)
    assert not any(parameter.requires_grad for parameter in autoencoder.module.parameters())
