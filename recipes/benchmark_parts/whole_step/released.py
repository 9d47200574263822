# SPDX-License-Identifier: Apache-2.0

"""The algorithm of the paper's released code, as it runs in this library."""

from __future__ import annotations

from typing import Any


MICRO_BATCH_SIZE = 2
"""Trajectories per micro-batch in the released configuration."""


def released_settings(micro_batch_size: int, num_samples: int) -> dict[str, Any]:
    """
    Arguments of the trainer under which it runs the released code's algorithm: Euler, gradient accumulation over micro-batches, and
    one forward per trained step on contexts that are cached without gradient. Rollouts sample at least 8 trajectories at once.

    Args:
        micro_batch_size (`int`): Trajectories per micro-batch.
        num_samples (`int`): Trajectories per optimizer step, a multiple of it.
    """
    return {
        "preset": "paper",
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": num_samples // micro_batch_size,
        "image_steps_per_forward": "1",
        "context_gradient": "detached",
        "rollout_batch_size": max(micro_batch_size, 8),
    }
