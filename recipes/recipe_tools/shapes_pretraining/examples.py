# SPDX-License-Identifier: Apache-2.0

"""
Examples of the pretraining: planning and painting, answering yes or no, and repairing a wrong image.

Some images do not show what the prompt asks for, and some plans are wrong, so that the pretrained model makes errors that a reward
can correct.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from alphagrpo_ext.models.bagel.configuration_bagel import BagelConfig
from alphagrpo_ext.models.bagel.layout import BagelSequence, collate_sequences
from alphagrpo_ext.models.bagel.processing_bagel import BagelProcessor
from alphagrpo_ext.shapes.judge import answer_questions
from alphagrpo_ext.shapes.prompts import (
    PromptSpec,
    sample_prompt,
    sample_scene,
    sample_spec,
    sample_violation,
    satisfies,
    semantic_questions,
)
from alphagrpo_ext.shapes.scene import BACKGROUNDS, CELLS, NUM_OFFSETS, Scene, random_object, render, render_array
from alphagrpo_ext.shapes.text import reflection, reflection_request, repair, thought


@dataclass(frozen=True)
class PretrainingMixture:
    """
    Number of examples of each kind in a batch, and shares of wrong ones.

    Args:
        direct, thought, answer, described_answer, reflection (`int`):
            Numbers of: text-to-image without a thought, text-to-image with one, questions about an image, questions with a description
            of the image before the answer, and repairs of a wrong image.
        wrong_image (`float`, *optional*, defaults to `0.2`):
            Share of text-to-image examples whose image has an error that is not in prompt and thought.
        wrong_thought (`float`, *optional*, defaults to `0.1`):
            Share of examples whose thought plans a wrong image, which is painted as planned.
        condition_dropout (`float`, *optional*, defaults to `0.1`):
            Share of images that are painted without their text, as guidance needs it.
        noise_copies (`int`, *optional*, defaults to `3`):
            Number of noised copies of an image. Each has a time of its own, and all share one context.
        timestep_shift (`float`, *optional*, defaults to `2.0`):
            Shift of the times towards noise, where the text decides what is painted. Without it they are logit-normal.
    """

    direct: int = 20
    thought: int = 50
    answer: int = 10
    described_answer: int = 0
    reflection: int = 16
    wrong_image: float = 0.2
    wrong_thought: float = 0.1
    condition_dropout: float = 0.1
    noise_copies: int = 3
    timestep_shift: float = 2.0


PAINTING = PretrainingMixture()
"""Mostly painting."""

GROUNDING = PretrainingMixture(direct=4, thought=16, answer=32, described_answer=24, reflection=20)
"""Mostly questions and repairs, which tie words to given images after the model has learned to paint."""


RARE_PROBABILITY = 0.03
"""Probability of a prompt whose attribute combination is rare."""


@dataclass(frozen=True)
class _Example:
    """Context (strings are texts, scenes are images), then the text `learned` and the image `target`, which have a loss."""

    context: tuple[str | Scene, ...]
    learned: str | None
    target: Scene | None


def sample_pretraining_spec(rng: random.Random) -> PromptSpec:
    """Draw a spec of the split `"train"`, or rarely of `"rare"`, with equal probability of every category."""
    return sample_spec(rng, "rare" if rng.random() < RARE_PROBABILITY else "train")


def _painting(rng: random.Random, processor: BagelProcessor, mixture: PretrainingMixture, think: bool) -> _Example:
    spec = sample_pretraining_spec(rng)
    right = sample_scene(spec, rng)
    planned = sample_violation(right, spec, rng) if think and rng.random() < mixture.wrong_thought else right
    painted = sample_violation(planned, spec, rng) if rng.random() < mixture.wrong_image else planned
    system = (processor.generation_system_prompt,) if think else ()
    if rng.random() < mixture.condition_dropout:
        return _Example(system, None, painted)
    prompt = sample_prompt(spec, rng)
    return _Example((*system, prompt), thought(planned) if think else None, painted)


def _answering(rng: random.Random, processor: BagelProcessor, describe: bool) -> _Example:
    """
    Draw a question about an image, with the answer `yes` or `no` equally often. With `describe`, the answer follows a thought that
    describes the image.
    """
    spec = sample_pretraining_spec(rng)
    shown = sample_scene(spec, rng)
    wanted = rng.random() < 0.5
    if not wanted:
        shown = sample_violation(shown, spec, rng)
    questions = [row["question"] for row in semantic_questions(spec)]
    answers = [answer >= 0.5 for answer in answer_questions(render(shown), questions)]
    choices = [i for i, answer in enumerate(answers) if answer == wanted] or range(len(questions))
    index = rng.choice(choices)
    answer = "yes" if answers[index] else "no"
    if not describe:
        return _Example((shown, questions[index]), answer, None)
    system = processor.understanding_system_prompt
    return _Example((system, shown, questions[index]), f"{thought(shown)} {answer}", None)


def _reflecting(rng: random.Random, processor: BagelProcessor, mixture: PretrainingMixture) -> _Example:
    spec = sample_pretraining_spec(rng)
    shown = sample_scene(spec, rng)
    if rng.random() < 0.75:
        shown = sample_violation(shown, spec, rng)
    right = shown if satisfies(shown, spec) else repair(shown, spec, rng)
    painted = sample_violation(right, spec, rng) if rng.random() < mixture.wrong_image else right
    system, request = processor.generation_system_prompt, reflection_request(sample_prompt(spec, rng))
    draw = rng.random()
    if draw < mixture.condition_dropout / 2:
        return _Example((system, shown), None, painted)
    if draw < mixture.condition_dropout:
        return _Example((system, request), None, painted)
    return _Example((system, shown, request), reflection(shown, right), painted)


def sample_examples(
    rng: random.Random, processor: BagelProcessor, mixture: PretrainingMixture
) -> list[list[_Example]]:
    """Draw the examples of a batch, in parts of similar length so that there is little padding."""
    paintings = [
        *(_painting(rng, processor, mixture, think=False) for _ in range(mixture.direct)),
        *(_painting(rng, processor, mixture, think=True) for _ in range(mixture.thought)),
    ]
    answers = [
        *(_answering(rng, processor, describe=False) for _ in range(mixture.answer)),
        *(_answering(rng, processor, describe=True) for _ in range(mixture.described_answer)),
    ]
    reflections = [_reflecting(rng, processor, mixture) for _ in range(mixture.reflection)]
    return [part for part in (paintings, answers, reflections) if part]


def unique_scenes(examples: Sequence[_Example]) -> list[Scene]:
    """Collect the scenes that the examples show or paint, each once."""
    blocks = [block for example in examples for block in (*example.context, example.target)]
    return list(dict.fromkeys(block for block in blocks if isinstance(block, Scene)))


def sample_random_scene(rng: random.Random) -> Scene:
    """Draw zero to four objects, anywhere in their cells, on any background."""
    objects = [random_object(cell, rng) for cell in rng.sample(CELLS, rng.randint(0, 4))]
    shifted = [replace(obj, dy=rng.randrange(NUM_OFFSETS), dx=rng.randrange(NUM_OFFSETS)) for obj in objects]
    return Scene(tuple(shifted), rng.choice(list(BACKGROUNDS)))


def scene_pixels(scenes: Sequence[Scene]) -> torch.Tensor:
    """Render scenes to pixels in [-1, 1], shape `(scenes, 3, height, width)`."""
    pixels = torch.stack([torch.from_numpy(render_array(scene)) for scene in scenes])
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


@dataclass
class PretrainingBatch:
    """
    Examples as rows of tokens, with the targets of their losses.

    Args:
        inputs (`dict[str, torch.Tensor]`): Output of [`collate_sequences`].
        text_index, text_targets (`torch.Tensor` of shape `(texts,)`):
            Positions in the flattened `input_ids` whose next token is learned, and that token.
        velocity_index (`torch.Tensor` of shape `(copies, tokens)`, *optional*): Positions of noised latents.
        velocity_targets (`torch.Tensor` of shape `(copies, tokens, channels)`, *optional*): Noise minus image.
    """

    inputs: dict[str, torch.Tensor]
    text_index: torch.Tensor
    text_targets: torch.Tensor
    velocity_index: torch.Tensor | None
    velocity_targets: torch.Tensor | None


def _context_row(
    example: _Example,
    latents: dict[Scene, torch.Tensor],
    grid: tuple[int, int],
    processor: BagelProcessor,
    config: BagelConfig,
) -> BagelSequence:
    row = BagelSequence(config)
    for block in example.context:
        if isinstance(block, str):
            row.add_text(processor.encode_text(block))
            continue
        if example.target is not None:
            row.add_latents(latents[block], grid)
        row.add_pixels(scene_pixels([block])[0])
    return row


def build_batch(
    examples: Sequence[_Example],
    latents: dict[Scene, torch.Tensor],
    grid: tuple[int, int],
    processor: BagelProcessor,
    config: BagelConfig,
    mixture: PretrainingMixture,
    generator: torch.Generator,
) -> PretrainingBatch:
    """
    Turn examples into rows of tokens.

    Args:
        examples (`Sequence[_Example]`): The examples.
        latents (`dict[Scene, torch.Tensor]`): Clean latents `(tokens, channels)` of every scene in the examples.
        grid (`tuple[int, int]`): Rows and columns of latent tokens.
        generator (`torch.Generator`): Draws times (logit-normal) and noise.
    """
    rows, texts, starts, targets = [], [], [], []
    for index, example in enumerate(examples):
        row = _context_row(example, latents, grid, processor, config)
        if example.learned is not None:
            ids = processor.encode_text(example.learned)
            start = row.add_text(ids)
            labels = [*ids, config.eos_token_id]
            texts += [(index, start + offset, label) for offset, label in enumerate(labels)]
        if example.target is not None:
            clean = latents[example.target]
            for _ in range(mixture.noise_copies):
                time = float(torch.sigmoid(torch.randn((), generator=generator)))
                time = mixture.timestep_shift * time / (1 + (mixture.timestep_shift - 1) * time)
                noise = torch.randn(clean.shape, generator=generator)
                noised = (1 - time) * clean + time * noise
                starts.append((index, row.add_latents(noised, grid, time, noised=True)))
                targets.append(noise - clean)
        rows.append(row)
    inputs = collate_sequences(rows, config)
    text = torch.tensor(texts)
    velocity_index = None
    if starts:
        first = torch.tensor(starts) @ torch.tensor([inputs["latents"].shape[1], 1])
        velocity_index = first[:, None] + torch.arange(grid[0] * grid[1])
    return PretrainingBatch(
        inputs=inputs,
        text_index=text[:, 0] * inputs["input_ids"].shape[1] + text[:, 1],
        text_targets=text[:, 2],
        velocity_index=velocity_index,
        velocity_targets=torch.stack(targets) if targets else None,
    )
