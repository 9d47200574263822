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


MATMUL_SIZES = (512, 1024, 2048)
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """
    Make the C library keep freed memory, as the allocator of an accelerator does. By default it returns large blocks to the system,
    and handing out empty pages again took a third of the time of an update with 100 million parameters.

    Returns:
        `bool`: Whether the options were accepted. Only glibc has them.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # The largest values that are allowed, and how much is requested at once.
    options = ((_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, (1 << 31) - 1), (_TOP_PAD, 256 << 20))
    accepted = [mallopt(option, value) == 1 for option, value in options]
    return all(accepted)


@dataclass(frozen=True)
class Spread:
    """
    Spread of a quantity that was measured several times.

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
        """Convert to another unit."""
        return Spread(self.median * factor, self.low * factor, self.high * factor)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def time_interleaved(
    functions: Mapping[str, Callable[[], object]],
    repetitions: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """
    Call all functions in turn in every repetition, so that a machine that slows down slows all of them down.

    Args:
        functions (`Mapping[str, Callable]`): Functions to time, by name.
        repetitions (`int`): Number of timed calls of each function.
        warmup (`int`, *optional*, defaults to `1`): Number of calls before these.
        clock (`Callable[[], float]`, *optional*): Seconds now. `time.process_time` leaves out what other processes take.

    Returns:
        `dict[str, list[float]]`: Seconds of each function, one value per repetition.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(-warmup, repetitions):
        for name, function in functions.items():
            start = clock()
            function()
            elapsed = clock() - start
            if repetition >= 0:
                seconds[name].append(elapsed)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Ratio of two quantities that were measured in turn, taken within each repetition."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])


def matmul_functions(
    dtype: torch.dtype, device: torch.device | str = "cpu", sizes: Sequence[int] = MATMUL_SIZES
) -> dict[int, Callable[[], object]]:
    """Make multiplications of square matrices, by their size. The small ones are repeated to the work of the largest."""
    functions = {}
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        count = (max(sizes) // size) ** 3

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b, count: int = count) -> None:
            for _ in range(count):
                torch.mm(a, b)

        functions[size] = multiply
    return functions


def peak_bytes(model: torch.nn.Module, function: Callable[[], object]) -> int:
    """Largest number of bytes of tensors that are alive during a call, without the model's weights, buffers and gradients."""
    known = [*model.parameters(), *model.buffers()]
    known += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with LiveBytes(known) as tracker:
        function()
    return tracker.peak
