# SPDX-License-Identifier: Apache-2.0

"""Whole steps of this library against the algorithm of the paper's released code: their time, and their peak memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from benchmark_parts.peaks import Peak, peak_in_a_process
from benchmark_parts.sizes import Size
from benchmark_parts.tables import ResultTable
from benchmark_parts.timing import Spread, ratio
from benchmark_parts.whole_step.released import MICRO_BATCH_SIZE, released_settings
from benchmark_parts.whole_step.trainers import STEP_SETTINGS, WholeStep, interleaved_step_seconds, make_step_trainer


LORA_RANK = 32
STEP_COLUMNS = [
    *("task", "trained", "prompts", "steps per forward", "CPU seconds, ours", "released", "ours over released"),
    *("peak MiB above imports, ours", "peak of released", "peak, ours over released"),
    *("peak RSS MiB, ours", "peak RSS of released"),
]
MEASURED_STEPS_PER_FORWARD = ("auto", "1")
"""Values of `image_steps_per_forward` that are measured. The second is also the released algorithm's."""
RELEASED = "released"


def brightness(images: list[Any], **kwargs: Any) -> list[float]:
    """A reward that takes almost no time. With a real judge, its time is added."""
    return [sum(image.convert("L").histogram()[128:]) / (image.width * image.height) for image in images]


def whole_steps(size: Size) -> list[WholeStep]:
    """
    The steps that are measured: both tasks, all weights and LoRA, and one prompt and as many as there can be. The number of
    samples is that of the size, rounded up to an even one; two samples have one prompt.
    """
    num_samples = 2 * max(1, -(-size.num_trajectories // 2))
    return [
        WholeStep(task, num_samples, group_size, lora_rank)
        for task in STEP_SETTINGS
        for lora_rank in (0, LORA_RANK)
        for group_size in dict.fromkeys((num_samples, 2))
    ]


def algorithms(step: WholeStep) -> dict[str, dict[str, Any]]:
    """Arguments of the trainer for this library's step, by its steps per forward, and for the released code's."""
    ours = {steps: {"preset": "paper", "image_steps_per_forward": steps} for steps in MEASURED_STEPS_PER_FORWARD}
    return {**ours, RELEASED: released_settings(MICRO_BATCH_SIZE, step.num_samples)}


def compared_steps(title: str, size: Size, output_dir: str, precision: str, repetitions: int) -> Iterator[ResultTable]:
    """
    Compare the steps of a size. The table comes after the rows of each step, so that none is lost.

    Args:
        title (`str`): Title of the table.
        size ([`Size`]): Model, lengths of texts, and number of samples.
        output_dir (`str`): Output directory of the trainers, in which they write nothing.
        precision (`str`): `"float32"`, or `"bfloat16"` by autocast.
        repetitions (`int`): Steps that are timed.
    """
    rows: list[list[Any]] = []
    for step in whole_steps(size):
        rows = [*rows, *_rows(step, size, output_dir, precision, repetitions)]
        note = (
            f"{step.num_samples} samples per step: first images, rollout, a reward that takes no time, and update; "
            f"{torch.get_num_threads()} thread(s). Released: its algorithm in this library, one forward per trained step on contexts "
            f"without gradient, micro-batches of {MICRO_BATCH_SIZE}. A peak is that of two steps in a process of its own: weights, "
            "gradients, optimizer and activations. Its RSS has the imports too."
        )
        yield ResultTable(title, STEP_COLUMNS, rows, note)


def step_peak(step: WholeStep, size: Size, precision: str, arguments: dict[str, Any]) -> Peak:
    """Peak of two steps in a process of its own, so that the optimizer has its state in the second."""
    texts = [json.dumps(value) for value in (asdict(step), asdict(size), arguments)]
    return peak_in_a_process(__name__, train_two_steps.__name__, precision, *texts)


def train_two_steps(precision: str, step: str, size: str, arguments: str) -> None:
    """The work of such a process; everything but the precision is JSON."""
    with tempfile.TemporaryDirectory() as folder:
        make_step_trainer(
            WholeStep(**json.loads(step)),
            Size(**json.loads(size)),
            brightness,
            folder,
            precision == "bfloat16",
            json.loads(arguments) | {"max_steps": 2},
        ).train()


def _rows(step: WholeStep, size: Size, output_dir: str, precision: str, repetitions: int) -> list[list[Any]]:
    choices = algorithms(step)
    trainers = {
        name: make_step_trainer(step, size, brightness, output_dir, precision == "bfloat16", arguments)
        for name, arguments in choices.items()
    }
    seconds = interleaved_step_seconds(trainers, repetitions)
    # Before the other processes need memory.
    trainers.clear()
    peaks = {name: step_peak(step, size, precision, arguments) for name, arguments in choices.items()}
    above = {name: peak.above_imports for name, peak in peaks.items()}
    return [
        [
            step.task,
            f"LoRA {step.lora_rank}" if step.lora_rank else "all weights",
            step.num_samples // step.group_size,
            name,
            *(Spread.of(seconds[key]) for key in (name, RELEASED)),
            ratio(seconds[name], seconds[RELEASED]),
            *(round(above[key] / 2**20) for key in (name, RELEASED)),
            above[name] / above[RELEASED],
            *(round(peaks[key].resident / 2**20) for key in (name, RELEASED)),
        ]
        for name in MEASURED_STEPS_PER_FORWARD
    ]
