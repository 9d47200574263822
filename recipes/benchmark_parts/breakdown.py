# SPDX-License-Identifier: Apache-2.0

"""Time of the phases of a training step."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from alphagrpo_ext.rollout import generator as rollout_generator
from alphagrpo_ext.trainer import AlphaGRPOTrainer


PHASES = ("context", "text", "denoising", "decoding", "judge", "forward", "backward", "optimizer", "rest")
"""Prefill, sampling of thoughts, denoising, decoding of latents, rewards, the parts of the update, and the rest."""


@contextmanager
def phase_seconds(trainer: AlphaGRPOTrainer) -> Iterator[Mapping[str, float]]:
    """
    Measure how many seconds a trainer spends in each of [`PHASES`] but the rest while the context is open.

    Args:
        trainer ([`AlphaGRPOTrainer`]): A trainer with one process and without gradient accumulation.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    # Time counts for the outermost phase alone, so that none is counted twice.
    running: list[str] = []

    def timed(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            running.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                running.pop()
                if not running:
                    seconds[phase] += time.perf_counter() - start

        return run

    model = trainer.accelerator.unwrap_model(trainer.model)
    parts = [
        (model, "prefill", "context"),
        (model, "sample_text", "text"),
        (rollout_generator, "denoise", "denoising"),
        (model, "decode_latents", "decoding"),
        (trainer, "_calculate_rewards", "judge"),
        (trainer.scorer, "score", "forward"),
        (trainer.scorer, "read_contexts", "forward"),
        (trainer.accelerator, "backward", "backward"),
        (trainer.create_optimizer(), "step", "optimizer"),
    ]
    originals = [(owner, name, vars(owner).get(name), getattr(owner, name)) for owner, name, _ in parts]
    for owner, name, phase in parts:
        setattr(owner, name, timed(getattr(owner, name), phase))
    try:
        yield seconds
    finally:
        for owner, name, own, function in originals:
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, function)
