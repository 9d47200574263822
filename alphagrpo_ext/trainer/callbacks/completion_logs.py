# SPDX-License-Identifier: Apache-2.0

"""
Completion logs for trackers that TRL's table of completions does not reach: TRL sends none to TensorBoard, and wandb keeps
only the word "Image" of the images in a cell. And that table on the terminal, which prompts and completions cannot steer.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, WandbCallback
from trl.trainer import grpo_trainer

from alphagrpo_ext.images import to_rgb
from alphagrpo_ext.messages import prompt_text
from alphagrpo_ext.printable import printable, printable_parts
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from alphagrpo_ext.trajectory import ImageSegment, Trajectory


NUM_SAMPLES = 8


class TensorBoardCompletionsCallback(TrainerCallback):
    """
    Writes the first samples of TRL's table of completions with every log: images under `completions/0/image` and so on, and
    the other columns as a table under `completions`.

    Args:
        writer ([`~transformers.integrations.TensorBoardCallback`]): Callback whose event file is written to.
        table (`Mapping[str, Any]`): TRL's table of completions.
        num_samples (`int`, *optional*, defaults to `8`): Number of samples written.
    """

    def __init__(self, writer: TensorBoardCallback, table: Mapping[str, Any], num_samples: int = NUM_SAMPLES) -> None:
        self._writer = writer
        self._table = table
        self._num_samples = num_samples

    def on_log(self, args: AlphaGRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        writer = self._writer.tb_writer
        if not state.is_world_process_zero or writer is None or not self._table["prompt"]:
            return
        columns = {
            "prompt": self._table["prompt"],
            "completion": self._table["completion"],
            **self._table["rewards"],
            **self._table["extra"],
            "advantage": self._table["advantages"],
        }
        shown = {name: list(values)[: self._num_samples] for name, values in columns.items()}
        writer.add_text("completions", markdown_table(shown), state.global_step)
        for place, images in enumerate(list(self._table["images"])[: self._num_samples]):
            if images:
                pixels = np.asarray(side_by_side(images))
                writer.add_image(f"completions/{place}/image", pixels, state.global_step, dataformats="HWC")
        writer.flush()


class WandbImagesCallback(TrainerCallback):
    """
    Logs the images of the first samples of TRL's table of completions to the current run of wandb with every log, as
    `completion_images` with their prompts.

    Args:
        table (`Mapping[str, Any]`): TRL's table of completions.
        num_samples (`int`, *optional*, defaults to `8`): Number of samples logged.
    """

    def __init__(self, table: Mapping[str, Any], num_samples: int = NUM_SAMPLES) -> None:
        self._table = table
        self._num_samples = num_samples

    def on_log(self, args: AlphaGRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        import wandb

        if not state.is_world_process_zero or wandb.run is None or not self._table["images"]:
            return
        samples = list(zip(self._table["images"], self._table["prompt"], strict=False))[: self._num_samples]
        images = [
            wandb.Image(side_by_side(images), caption=prompt_text(prompt)) for images, prompt in samples if images
        ]
        wandb.log({"completion_images": images, "train/global_step": state.global_step})


def completions_callbacks(callbacks: Sequence[TrainerCallback], table: Mapping[str, Any]) -> list[TrainerCallback]:
    """
    Make the callbacks for the trackers among the callbacks of a trainer.

    Args:
        callbacks (`Sequence[TrainerCallback]`): The trainer's callbacks.
        table (`Mapping[str, Any]`): The trainer's `_logs`.
    """
    result: list[TrainerCallback] = []
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            result.append(TensorBoardCompletionsCallback(callback, table))
        elif isinstance(callback, WandbCallback):
            result.append(WandbImagesCallback(table))
    return result


@contextmanager
def printable_completions() -> Iterator[None]:
    """Have TRL print its table of completions without characters that steer a terminal. The files that it writes keep them."""
    show = grpo_trainer.print_prompt_completions_sample

    def show_printable(prompts, completions, rewards, advantages, step, num_samples=None, extra=None) -> None:
        prompts, completions, rewards, extra = map(printable_parts, (list(prompts), list(completions), rewards, extra))
        show(prompts, completions, rewards, advantages, step, num_samples, extra)

    grpo_trainer.print_prompt_completions_sample = show_printable
    try:
        yield
    finally:
        grpo_trainer.print_prompt_completions_sample = show


def completion_images(trajectories: Sequence[Trajectory]) -> list[list[Image.Image]]:
    """Return the images of each trajectory, given and painted, in their order."""
    return [
        [segment.image for segment in trajectory.segments if isinstance(segment, ImageSegment) and segment.image]
        for trajectory in trajectories
    ]


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Paste the images of one sample side by side, in their order, with their tops aligned."""
    sheet = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    left = 0
    for image in images:
        sheet.paste(to_rgb(image), (left, 0))
        left += image.width
    return sheet


def markdown_table(columns: Mapping[str, Sequence[Any]]) -> str:
    """
    Write a table in Markdown. Characters with a meaning in Markdown or HTML are escaped.

    Args:
        columns (`Mapping[str, Sequence[Any]]`): Cells by title of their column. All columns have the same length.
    """
    lines = [_row(list(columns)), "| " + " | ".join("---" for _ in columns) + " |"]
    return "\n".join([*lines, *(_row(row) for row in zip(*columns.values(), strict=True))])


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else printable(str(value), keep="\n")
    text = re.sub(r"[\\`*_\[\]|]", r"\\\g<0>", html.escape(text, quote=False))
    return "<br>".join(text.split("\n"))
