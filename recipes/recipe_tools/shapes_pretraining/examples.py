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
from typing import Literal

import torch

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
from alphagrpo_ext.shapes.text import reflection, repair, thought


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
class Example:
    """
    What a trajectory of the pretraining shows, asks and teaches.

    Args:
        kind (`str`):
            `"painting"` from a prompt, `"repair"` of the image that is shown, or an `"answer"` about it.
        think (`bool`): Whether the context asks for a thought.
        request (`str`): The prompt, or the question.
        learned (`str`, *optional*): The text that is learned.
        target (`Scene`, *optional*): The image that is learned.
        shown (`Scene`, *optional*): The image that the request is about.
        dropped (`float`, *optional*):
            If given, the image is painted from the context of another guidance branch, which this number in [0, 1)
            chooses.
    """

    kind: Literal["painting", "repair", "answer"]
    think: bool
    request: str
    learned: str | None = None
    target: Scene | None = None
    shown: Scene | None = None
    dropped: float | None = None


def sample_pretraining_spec(rng: random.Random) -> PromptSpec:
    """Draw a spec of the split `"train"`, or rarely of `"rare"`, with equal probability of every category."""
    return sample_spec(rng, "rare" if rng.random() < RARE_PROBABILITY else "train")


def _painting(rng: random.Random, mixture: PretrainingMixture, think: bool) -> Example:
    spec = sample_pretraining_spec(rng)
    right = sample_scene(spec, rng)
    planned = sample_violation(right, spec, rng) if think and rng.random() < mixture.wrong_thought else right
    painted = sample_violation(planned, spec, rng) if rng.random() < mixture.wrong_image else planned
    draw = rng.random()
    if draw < mixture.condition_dropout:
        return Example("painting", think, "", target=painted, dropped=draw / mixture.condition_dropout)
    return Example("painting", think, sample_prompt(spec, rng), thought(planned) if think else None, painted)


def _answering(rng: random.Random, describe: bool) -> Example:
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
    learned = f"{thought(shown)} {answer}" if describe else answer
    return Example("answer", describe, questions[index], learned, shown=shown)


def _reflecting(rng: random.Random, mixture: PretrainingMixture) -> Example:
    spec = sample_pretraining_spec(rng)
    shown = sample_scene(spec, rng)
    if rng.random() < 0.75:
        shown = sample_violation(shown, spec, rng)
    right = shown if satisfies(shown, spec) else repair(shown, spec, rng)
    painted = sample_violation(right, spec, rng) if rng.random() < mixture.wrong_image else right
    prompt = sample_prompt(spec, rng)
    draw = rng.random()
    if draw < mixture.condition_dropout:
        dropped = draw / mixture.condition_dropout
        return Example("repair", True, prompt, target=painted, shown=shown, dropped=dropped)
    return Example("repair", True, prompt, reflection(shown, right), painted, shown)


def sample_examples(rng: random.Random, mixture: PretrainingMixture) -> list[list[Example]]:
    """Draw the examples of a batch, in parts of similar length so that there is little padding."""
    paintings = [
        *(_painting(rng, mixture, think=False) for _ in range(mixture.direct)),
        *(_painting(rng, mixture, think=True) for _ in range(mixture.thought)),
    ]
    answers = [
        *(_answering(rng, describe=False) for _ in range(mixture.answer)),
        *(_answering(rng, describe=True) for _ in range(mixture.described_answer)),
    ]
    reflections = [_reflecting(rng, mixture) for _ in range(mixture.reflection)]
    return [part for part in (paintings, answers, reflections) if part]


def unique_scenes(examples: Sequence[Example]) -> list[Scene]:
    """Collect the scenes that the examples show or paint, each once."""
    scenes = [scene for example in examples for scene in (example.shown, example.target)]
    return list(dict.fromkeys(scene for scene in scenes if scene is not None))


def sample_random_scene(rng: random.Random) -> Scene:
    """Draw zero to four objects, anywhere in their cells, on any background."""
    objects = [random_object(cell, rng) for cell in rng.sample(CELLS, rng.randint(0, 4))]
    shifted = [replace(obj, dy=rng.randrange(NUM_OFFSETS), dx=rng.randrange(NUM_OFFSETS)) for obj in objects]
    return Scene(tuple(shifted), rng.choice(list(BACKGROUNDS)))


def scene_pixels(scenes: Sequence[Scene]) -> torch.Tensor:
    """Render scenes to pixels in [-1, 1], shape `(scenes, 3, height, width)`."""
    pixels = torch.stack([torch.from_numpy(render_array(scene)) for scene in scenes])
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
