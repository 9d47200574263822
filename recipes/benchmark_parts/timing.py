# SPDX-License-Identifier: Apache-2.0

"""Timing on a machine that other work shares: interleaved repetitions, medians, and ratios within a repetition."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from recipe_tools.memory import LiveBytes


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """
    Have the C library keep what is freed, as the allocator of an accelerator does. It gives large blocks back to the system,
    and what is timed then is how fast that hands out empty pages: a third of an update of 100 million parameters.

    Returns:
        `bool`: Whether it could be told to; only glibc can.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # The largest values that are allowed, and room to grow by.
    options = ((_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, (1 << 31) - 1), (_TOP_PAD, 256 << 20))
    accepted = [mallopt(option, value) == 1 for option, value in options]
    return all(accepted)


@dataclass(frozen=True)
class Spread:
    """
    A figure that was measured several times.

    Args:
        median, low, high (`float`): Median, least and largest value.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def scaled(self, factor: float) -> Spread:
        """In another unit."""
        return Spread(self.median * factor, self.low * factor, self.high * factor)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def time_interleaved(
    functions: Mapping[str, Callable[[], object]], repetitions: int, warmup: int = 1
) -> dict[str, list[float]]:
    """
    Call every function once a repetition, in turn, so that a machine that slows down slows all of them down.

    Args:
        functions (`Mapping[str, Callable]`): What to time, by name.
        repetitions (`int`): Calls of each that count.
        warmup (`int`, *optional*, defaults to `1`): Calls of each before these.

    Returns:
        `dict[str, list[float]]`: Seconds of each, one a repetition.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(-warmup, repetitions):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            elapsed = time.perf_counter() - start
            if repetition >= 0:
                seconds[name].append(elapsed)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Of two things that were timed in turn, repetition by repetition."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])


def matmul_functions(dtype: torch.dtype, sizes: Sequence[int] = (512, 1024, 2048)) -> dict[int, Callable[[], object]]:
    """Square matrix multiplications, by size, each repeated to about the work of the largest."""
    functions = {}
    for size in sizes:
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        count = (max(sizes) // size) ** 3

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b, count: int = count) -> None:
            for _ in range(count):
                torch.mm(a, b)

        functions[size] = multiply
    return functions


def matmul_peak(dtype: torch.dtype, repetitions: int = 5, sizes: Sequence[int] = (512, 1024, 2048)) -> float:
    """
    Floating-point operations a second of the fastest of some square matrix multiplications, with as many threads as
    PyTorch now uses. The best repetition counts, so that the peak is no smaller for a machine that is busy.

    Args:
        dtype (`torch.dtype`): Of the matrices.
        repetitions (`int`, *optional*, defaults to `5`): Of each size.
        sizes (`Sequence[int]`, *optional*, defaults to `(512, 1024, 2048)`): Rows and columns.
    """
    seconds = time_interleaved(matmul_functions(dtype, sizes), repetitions)
    return max(2 * max(sizes) ** 3 / min(values) for values in seconds.values())


def peak_bytes(model: torch.nn.Module, function: Callable[[], object]) -> int:
    """The most bytes of tensors beside the model's own and their gradients that are alive at once during a call."""
    known = [*model.parameters(), *model.buffers()]
    known += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with LiveBytes(known) as tracker:
        function()
    return tracker.peak
