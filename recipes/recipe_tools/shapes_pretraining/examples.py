# SPDX-License-Identifier: Apache-2.0

"""
Examples of the pretraining: planning and painting, answering yes or no, captions, edits, and reflections that repair an image
or keep it.

Some images do not show what the prompt asks for, and some plans are wrong, so that the pretrained model makes errors that a reward
can correct. Images to judge and to repair are rendered scenes or the model's own paintings, which alone show how it fails.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from alphagrpo_ext.shapes.answering import sample_question
from alphagrpo_ext.shapes.editing import sample_taught_edit
from alphagrpo_ext.shapes.prompts import (
    PromptSpec,
    sample_prompt,
    sample_scene,
    sample_spec,
    sample_violation,
    satisfies,
)
from alphagrpo_ext.shapes.scene import (
    BACKGROUNDS,
    CELLS,
    NUM_OFFSETS,
    Scene,
    corrupt_scene,
    random_object,
    render_array,
)
from alphagrpo_ext.shapes.text import reflection, repair, thought
from recipe_tools.shapes_pretraining.paintings import Painting


@dataclass(frozen=True)
class PretrainingMixture:
    """
    Number of examples of each kind in a batch, and shares of wrong ones.

    Args:
        direct, thought, answer, described_answer, caption, edit, reflection (`int`):
            Numbers of: text-to-image without a thought, text-to-image with one, questions about an image, questions with a description
            of the image before the answer, prompts after an image that shows them, edits, and reflections on an image.
        wrong_image (`float`, *optional*, defaults to `0.2`):
            Share of text-to-image examples whose image has an error that is not in prompt and thought.
        painted (`float`, *optional*, defaults to `0.0`):
            Share of questions, captions and reflections about an image that the model painted. The others are about rendered
            scenes.
        kept (`float`, *optional*, defaults to `0.0`):
            Share of reflections on right images that end without painting. The others paint the image once more.
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
    caption: int = 0
    edit: int = 0
    reflection: int = 16
    painted: float = 0.0
    kept: float = 0.0
    wrong_image: float = 0.2
    wrong_thought: float = 0.1
    condition_dropout: float = 0.1
    noise_copies: int = 3
    timestep_shift: float = 2.0


PAINTING = PretrainingMixture()
"""Mostly painting."""

GROUNDING = PretrainingMixture(
    direct=4, thought=20, answer=28, described_answer=16, caption=24, edit=24, reflection=28, painted=0.5, kept=0.5
)
"""Mostly questions, captions, edits and reflections, which tie words to given images after the model has learned to paint."""


RARE_PROBABILITY = 0.03
"""Probability of a prompt whose attribute combination is rare."""


@dataclass(frozen=True)
class Example:
    """
    What a trajectory of the pretraining shows, asks and teaches.

    Args:
        kind (`str`):
            `"painting"` from a prompt, `"repair"` or `"edit"` of the image that is shown, an `"answer"` about it, or its
            `"caption"`.
        think (`bool`): Whether the context asks for a thought.
        request (`str`): The prompt, the instruction, or the question.
        learned (`str`, *optional*): The text that is learned.
        target (`Scene`, *optional*): The image that is learned.
        shown (`Scene` or [`Painting`], *optional*): The image that the request is about.
        reads_latents (`bool`, *optional*, defaults to `False`):
            Whether the latents of the image that is shown are in the context, as where it is painted anew. Otherwise the
            vision tower alone looks at it.
        dropped (`float`, *optional*):
            If given, the image is painted from the context of another guidance branch, which this number in [0, 1)
            chooses.
    """

    kind: Literal["painting", "repair", "edit", "answer", "caption"]
    think: bool
    request: str
    learned: str | None = None
    target: Scene | None = None
    shown: Scene | Painting | None = None
    reads_latents: bool = False
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


def _answering(
    rng: random.Random,
    mixture: PretrainingMixture,
    describe: bool,
    paintings: Sequence[Painting],
    wrong: Sequence[Painting],
) -> Example:
    """
    Draw a question about an image, with the answer `yes` or `no` equally often. With `describe`, the answer follows a thought that
    describes the image. `wrong` are the paintings that answer a question with `no`.
    """
    wanted = rng.random() < 0.5
    if rng.random() < mixture.painted:
        shown = rng.choice(paintings if wanted else wrong or paintings)
        fitting = [(question, yes) for question, yes in shown.answers if yes == wanted]
        (question, is_yes), scene = rng.choice(fitting or shown.answers), shown.scene
    else:
        scene, question, is_yes = sample_question(sample_pretraining_spec(rng), wanted, rng)
        shown = scene
    answer = "yes" if is_yes else "no"
    learned = f"{thought(scene)} {answer}" if describe else answer
    return Example("answer", describe, question, learned, shown=shown)


def _captioning(rng: random.Random, mixture: PretrainingMixture, paintings: Sequence[Painting]) -> Example:
    """
    Draw an image, of which `paintings` are right ones, and a prompt that it shows. It is read through the vision tower alone or
    with its latents.
    """
    if paintings and rng.random() < mixture.painted:
        shown = rng.choice(paintings)
        spec = shown.spec
    else:
        spec = sample_pretraining_spec(rng)
        shown = sample_scene(spec, rng)
    prompt = sample_prompt(spec, rng)
    return Example("caption", False, "", prompt, shown=shown, reads_latents=rng.random() < 0.5)


def _editing(rng: random.Random, mixture: PretrainingMixture) -> Example:
    edit, instruction = sample_taught_edit(rng)
    painted = corrupt_scene(edit.after, rng) if rng.random() < mixture.wrong_image else edit.after
    draw = rng.random()
    if draw < mixture.condition_dropout:
        text, dropped = None, draw / mixture.condition_dropout
    else:
        text, dropped = reflection(edit.before, edit.after), None
    return Example("edit", True, instruction, text, painted, edit.before, reads_latents=True, dropped=dropped)


def _reflecting(rng: random.Random, mixture: PretrainingMixture, paintings: Sequence[Painting]) -> Example:
    if rng.random() < mixture.painted:
        shown = rng.choice(paintings)
        spec, scene, flaws, is_right = shown.spec, shown.scene, shown.flaws, shown.is_right
    else:
        spec = sample_pretraining_spec(rng)
        shown = scene = sample_scene(spec, rng)
        if rng.random() < 0.75:
            shown = scene = sample_violation(scene, spec, rng)
        flaws, is_right = (), satisfies(scene, spec)
    right = scene if satisfies(scene, spec) else repair(scene, spec, rng)
    painted = sample_violation(right, spec, rng) if rng.random() < mixture.wrong_image else right
    prompt = sample_prompt(spec, rng)
    draw = rng.random()
    if draw < mixture.condition_dropout:
        dropped = draw / mixture.condition_dropout
        return Example("repair", True, prompt, None, painted, shown, reads_latents=True, dropped=dropped)
    target = None if is_right and rng.random() < mixture.kept else painted
    return Example("repair", True, prompt, reflection(scene, right, flaws), target, shown, reads_latents=True)


def sample_examples(
    rng: random.Random, mixture: PretrainingMixture, paintings: Sequence[Painting] = ()
) -> list[list[Example]]:
    """
    Draw the examples of a batch, in parts of similar length so that there is little padding.

    Args:
        rng (`random.Random`): Draws everything.
        mixture ([`PretrainingMixture`]): Numbers and shares.
        paintings (`Sequence[Painting]`, *optional*): Images that the model painted; a mixture with `painted > 0` needs them.
    """
    paintings_from_text = [
        *(_painting(rng, mixture, think=False) for _ in range(mixture.direct)),
        *(_painting(rng, mixture, think=True) for _ in range(mixture.thought)),
    ]
    right: list[Painting] = []
    wrong: list[Painting] = []
    for painting in paintings:
        (right if painting.is_right else wrong).append(painting)
    texts_about_images = [
        *(_answering(rng, mixture, False, paintings, wrong) for _ in range(mixture.answer)),
        *(_answering(rng, mixture, True, paintings, wrong) for _ in range(mixture.described_answer)),
        *(_captioning(rng, mixture, right) for _ in range(mixture.caption)),
    ]
    reflections = [
        *(_editing(rng, mixture) for _ in range(mixture.edit)),
        *(_reflecting(rng, mixture, paintings) for _ in range(mixture.reflection)),
    ]
    return [part for part in (paintings_from_text, texts_about_images, reflections) if part]


def unique_images(examples: Sequence[Example]) -> list[Scene | Painting]:
    """Collect the images whose latents the examples read or paint, each once."""
    images = [image for example in examples for image in (example.reads_latents and example.shown, example.target)]
    return list(dict.fromkeys(image for image in images if image))


def sample_random_scene(rng: random.Random) -> Scene:
    """Draw zero to four objects, anywhere in their cells, on any background."""
    objects = [random_object(cell, rng) for cell in rng.sample(CELLS, rng.randint(0, 4))]
    shifted = [replace(obj, dy=rng.randrange(NUM_OFFSETS), dx=rng.randrange(NUM_OFFSETS)) for obj in objects]
    return Scene(tuple(shifted), rng.choice(list(BACKGROUNDS)))


def image_pixels(images: Sequence[Scene | Painting]) -> torch.Tensor:
    """Pixels of scenes and paintings in [-1, 1], shape `(images, 3, height, width)`."""
    arrays = [render_array(image) if isinstance(image, Scene) else image.array for image in images]
    pixels = torch.stack([torch.from_numpy(array) for array in arrays])
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
