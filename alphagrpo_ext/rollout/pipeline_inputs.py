# SPDX-License-Identifier: Apache-2.0

"""What users of a pipeline give it: names of arguments, prompts, images and whole numbers, all checked before work begins."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from alphagrpo_ext.images import read_image
from alphagrpo_ext.messages import prompt_text


OTHER_NAMES = {
    "device": "move the pipeline with pipe.to(device)",
    "device_map": "move the pipeline with pipe.to(device)",
    "generator": "use seed, an integer",
    "guidance_scale": "use cfg_text_scale",
    "height": "use image_height",
    "image_guidance_scale": "use cfg_img_scale",
    "max_length": "use max_completion_length",
    "max_new_tokens": "use max_completion_length",
    "negative_prompt": "there are no negative prompts; cfg_text_scale sets the guidance",
    "num_inference_steps": "use num_timesteps, which is one more than the number of steps",
    "num_steps": "use num_timesteps, which is one more than the number of steps",
    "output_type": "images are always PIL images",
    "prompts": "use prompt, which takes a list as well",
    "strength": "use refine_strength",
    "torch_dtype": "use dtype",
    "true_cfg_scale": "use cfg_text_scale",
    "width": "use image_width",
}
"""Names of arguments in Diffusers and Transformers, with what there is here instead."""


def refuse_unknown_names(names: Iterable[str], known: Iterable[str]) -> None:
    """
    Refuse names of arguments that do not exist.

    Args:
        names (`Iterable[str]`): Names that were given.
        known (`Iterable[str]`): Names that exist.

    Raises:
        `ValueError`: If there is an unknown name. The message says what to write instead, where that can be told.
    """
    known = list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{'; '.join(_advice(name, known) for name in unknown)}. Arguments are {', '.join(known)}")


def _advice(name: str, known: list[str]) -> str:
    if name in OTHER_NAMES:
        return f"unknown argument {name!r}: {OTHER_NAMES[name]}"
    close = difflib.get_close_matches(name, [*known, *OTHER_NAMES], n=1)
    if not close:
        return f"unknown argument {name!r}"
    meant = close[0]
    return f"unknown argument {name!r}: " + (
        f"did you mean {meant!r}" if meant in known else f"instead of {meant!r} {OTHER_NAMES[meant]}"
    )


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """
    Check an argument that is a whole number.

    Raises:
        `ValueError`: If it is something else, or less than `least`. The message names the argument and its value.
    """
    # A boolean is an integer for Python, and a mistake here.
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be an integer, but is {reprlib.repr(value)}")
    number = value.__index__()
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, but is {number}")
    return number


def as_prompts(prompt: Any) -> list[Any]:
    """
    The prompts in what a user gave: a text, a conversation, or several of them.

    Raises:
        `ValueError`: If it is something else, if there are none, or if one has no request. The message says which.
    """
    if isinstance(prompt, str) or _is_conversation(prompt):
        prompt_text(prompt)
        return [prompt]
    if isinstance(prompt, Mapping) or not isinstance(prompt, Iterable):
        raise ValueError(
            f"prompt must be a text, a conversation (a list of messages that ends with the user's), or a list of them, but is "
            f"{reprlib.repr(prompt)}"
        )
    prompts = list(prompt)
    if not prompts:
        raise ValueError("prompt is an empty list: give at least one prompt")
    for index, one in enumerate(prompts):
        try:
            prompt_text(one)
        except ValueError as error:
            raise ValueError(f"prompt[{index}]: {error}") from error
    return prompts


def _is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], Mapping)


def as_images(image: Any, num_prompts: int) -> list[Image.Image]:
    """
    The images in what a user gave: an image or the path of a file, or a list of them, one per prompt.

    Raises:
        `ValueError`: If their number is not that of the prompts, or if one cannot be read. The message says which.
    """
    images = list(image) if isinstance(image, list | tuple) else [image]
    if len(images) != num_prompts:
        raise ValueError(
            f"image needs one image per prompt, but has {len(images)}, and the number of prompts is {num_prompts}"
        )
    found = []
    for index, one in enumerate(images):
        if not isinstance(one, Image.Image | str | Path):
            raise ValueError(
                f"image[{index}] must be a PIL image or the path of a file, but is of type {type(one).__name__}"
            )
        try:
            found.append(read_image(one))
        except ValueError as error:
            raise ValueError(f"image[{index}]: {error}") from error
    return found
