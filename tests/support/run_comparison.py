# SPDX-License-Identifier: Apache-2.0

"""Compares what two runs of one training logged."""

from typing import Any


# What two equal runs differ in.
TIMINGS = ("timing/", "judge/latency", "judge/questions_per_second", "step_time", "runtime", "per_second")


def without_timings(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Logged entries without what depends on how fast the machine was."""
    return [{k: v for k, v in entry.items() if not any(timing in k for timing in TIMINGS)} for entry in entries]
