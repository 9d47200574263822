# SPDX-License-Identifier: Apache-2.0

import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.rollout.settings import TaskSettings
from alphagrpo_ext.shapes.judge import answer_questions
from alphagrpo_ext.shapes.prompts import quality_questions, satisfies, split_of
from alphagrpo_ext.shapes.scene import render
from alphagrpo_ext.shapes.text import is_reflection
from alphagrpo_ext.trajectory import ImageSegment, TextSegment
from recipe_tools.shapes_pretraining.batches import PretrainingLoss, build_batch, build_trajectory
from recipe_tools.shapes_pretraining.examples import (
    GROUNDING,
    Example,
    PretrainingMixture,
    image_pixels,
    sample_examples,
    sample_pretraining_spec,
    sample_random_scene,
    unique_images,
)
from recipe_tools.shapes_pretraining.families import SHAPES_FAMILIES
from recipe_tools.shapes_pretraining.paintings import Painting, load_paintings
from recipe_tools.shapes_pretraining.training import sample_batches, train_autoencoder
from reward_models.likelihood.policy import PolicyScorer


FEW = PretrainingMixture(direct=1, thought=2, answer=1, described_answer=1, caption=1, edit=1, reflection=1)
SAMPLING = TaskSettings(
    image_height=24, image_width=24, num_timesteps=11, timestep_shift=1.0, cfg_text_scale=1.0, max_completion_length=48
)


@pytest.fixture(scope="module")
def paintings(tmp_path_factory: pytest.TempPathFactory) -> list[Painting]:
    """Images of the packaged model, three quarters of them painted after a thought."""
    path = tmp_path_factory.mktemp("paintings") / "paintings.npy"
    model, processor = load_model("bagel-shapes", attn_implementation="eager")
    painted = load_paintings(path, 64, "test", model.eval(), processor, SAMPLING, show_progress=False)
    # They are read from the file now, so this needs no model.
    again = load_paintings(path, 64, "test", None, None, SAMPLING, show_progress=False)
    assert all(
        np.array_equal(a.array, b.array) and a.answers == b.answers for a, b in zip(painted, again, strict=True)
    )
    with pytest.raises(ValueError, match=r"paintings.npy has 64 paintings, not num_paintings=65: remove it"):
        load_paintings(path, 65, "test", None, None, SAMPLING, show_progress=False)
    return painted


@pytest.fixture(scope="module", params=("bagel", "cosmos3"))
def family(request: pytest.FixtureRequest) -> SimpleNamespace:
    torch.manual_seed(0)
    shapes = SHAPES_FAMILIES.get(request.param)()
    processor = shapes.build_processor()
    return SimpleNamespace(shapes=shapes, processor=processor, model=shapes.build_model(processor))


def trajectory_of(family: SimpleNamespace, example: Example) -> Any:
    images = unique_images([example])
    latents = dict(zip(images, family.model.encode_images(image_pixels(images)), strict=True)) if images else {}
    return build_trajectory(example, latents, family.processor, family.model, FEW, torch.Generator())


def test_pretraining_mixes_in_rare_combinations():
    rng = random.Random(0)
    specs = [sample_pretraining_spec(rng) for _ in range(4000)]
    splits = Counter(map(split_of, specs))
    assert set(splits) == {"train", "rare"}
    assert splits["rare"] / len(specs) == pytest.approx(0.03, abs=0.01)
    assert min(Counter(spec.category for spec in specs).values()) > 0.12 * len(specs)


def test_tokenizer_knows_every_word_of_the_examples(family, paintings):
    tokenizer, rng = family.processor.tokenizer, random.Random(0)
    for part in sample_examples(rng, replace(GROUNDING, condition_dropout=0.5), paintings):
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
    whole = trajectory_of(
        family, Example("repair", True, "a red circle", target=target, shown=shown, reads_latents=True)
    )
    given = whole.segments[:-1]
    expected = [family.processor.branch_context(name, given, size) for name in family.model.branches[1:]]
    for index, context in enumerate(expected):
        dropped = (index + 0.5) / len(expected)
        example = Example(
            "repair", True, "a red circle", target=target, shown=shown, reads_latents=True, dropped=dropped
        )
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


@torch.no_grad()
@pytest.mark.parametrize("context", ["vit", "vae_vit"])
def test_caption_is_read_as_its_likelihood_is_scored(family, context):
    model, processor = family.model.eval(), family.processor
    scene, caption = sample_random_scene(random.Random(1)), "a red circle on a white background"
    example = Example("caption", False, "", caption, shown=scene, reads_latents=context == "vae_vit")
    learned = model(**build_batch([trajectory_of(family, example)], model).inputs).log_probs
    scorer = PolicyScorer(model, processor, context)
    (scored,) = scorer.answer_log_probs([render(scene)], [scorer.encode(caption)])
    torch.testing.assert_close(learned[: len(scored)], scored, atol=1e-5, rtol=0)


def test_a_painting_has_what_the_judge_reads(paintings):
    for painting in paintings:
        questions = [question for question, _ in painting.answers]
        values = answer_questions(painting.image, questions)
        assert [value >= 0.5 for value in values] == [yes for _, yes in painting.answers]
        if painting.is_right:
            assert satisfies(painting.scene, painting.spec) and not painting.flaws
        else:
            assert painting.flaws or not satisfies(painting.scene, painting.spec)
    assert 5 < sum(painting.is_right for painting in paintings) < 50


def test_reflections_keep_right_images_alone(paintings):
    few = PretrainingMixture(
        direct=0, thought=0, answer=0, reflection=400, painted=0.5, kept=1.0, condition_dropout=0.0
    )
    (examples,) = sample_examples(random.Random(0), few, paintings)
    for example in examples:
        assert is_reflection(example.learned)
        assert (example.target is None) == ("nothing wrong" in example.learned), example
        if isinstance(example.shown, Painting):
            assert (example.target is None) == example.shown.is_right
    assert 50 < sum(example.target is None for example in examples) < 200


def test_answers_are_balanced_and_also_about_quality(paintings):
    few = PretrainingMixture(direct=0, thought=0, answer=2000, reflection=0, painted=0.5)
    (examples,) = sample_examples(random.Random(0), few, paintings)
    answers = Counter(
        (row["tag"], example.learned)
        for example in examples
        for row in quality_questions()
        if row["question"] == example.request
    )
    assert min(answers[row["tag"], word] for row in quality_questions() for word in ("yes", "no")) >= 5
    assert 0.45 < sum(example.learned == "yes" for example in examples) / len(examples) < 0.55


@pytest.mark.slow
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
    latents = model.encode_images(image_pixels([sample_random_scene(rng) for _ in range(256)]))
    assert abs(latents.mean()) < 0.15
    assert latents.std() == pytest.approx(1, abs=0.15)
    assert not any(parameter.requires_grad for parameter in autoencoder.module.parameters())
