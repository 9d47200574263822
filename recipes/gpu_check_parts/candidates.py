# SPDX-License-Identifier: Apache-2.0

"""
Faster ways to compute the same: how they are compared with eager mode, and the rule by which one of them wins.

A candidate wins if its results agree with those of eager mode, if it is faster in every repetition, and if its median is more than 5%
less, with the seconds of its compilation divided among `amortised_calls` calls. Of several that win, the one with the largest gain is
named.
"""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmark_parts.tables import ResultTable
from benchmark_parts.timing import time_interleaved
from gpu_check_parts.parity import relative_distance
from gpu_check_parts.results import PartResult, short_message


SMALLEST_GAIN = 0.05
"""Share of the time of eager mode that a candidate has to save."""
TIMING_COLUMNS = ["way", "first call, s", "call, s", "eager in turn, s", "gain", "difference", "peak, GiB", "verdict"]


@dataclass(frozen=True)
class Way:
    """
    A way to compute something.

    Args:
        name (`str`): Its name in the table.
        prepare (`Callable[[], Callable[[], torch.Tensor]]`):
            Makes the function to time, which returns what is compared. It may compile, as may the function's first call.
    """

    name: str
    prepare: Callable[[], Callable[[], torch.Tensor]]


def waiting(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A call that returns when the device has done its work."""

    def run() -> Any:
        result = function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return result

    return run


def release_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def forwards(layers: Sequence[nn.Module], functions: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of every layer within the block."""
    for layer, function in zip(layers, functions, strict=True):
        layer.forward = function
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def compiled_forwards(layers: Sequence[nn.Module], backend: str) -> list[Callable[..., Any]]:
    """
    Compiled forwards of decoder layers. All layers share what is compiled for the first one. A graph break is an error, because
    it is what the check has to report.
    """
    return [torch.compile(layer.forward, backend=backend, fullgraph=True) for layer in layers]


def cuda_graph(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[..., torch.Tensor]:
    """
    Capture a call that has no gradient in a CUDA graph.

    Args:
        function (`Callable`): What it reads besides its arguments, such as a cache, has to stay where it is.
        inputs (`torch.Tensor`): Arguments. The graph reads copies of them.

    Returns:
        `Callable`: Copies new arguments to where the graph reads them, and replays it. The result is overwritten by the next call.

    Raises:
        `RuntimeError`: If there is no CUDA, or the call copies from the host or waits for the device.
    """
    if not all(tensor.is_cuda for tensor in inputs):
        raise RuntimeError("a CUDA graph needs a CUDA device")
    static = [tensor.clone() for tensor in inputs]
    # What is compiled, loaded or allocated by a first call must not be captured.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(*static)

    def replay(*inputs: torch.Tensor) -> torch.Tensor:
        for target, source in zip(static, inputs, strict=True):
            target.copy_(source)
        graph.replay()
        return output

    return replay


@dataclass(frozen=True)
class Timing:
    """
    What was measured of a candidate.

    Args:
        first (`float`): Seconds of preparing it and of its first call.
        seconds, eager (`list[float]`): Seconds of its calls, and of those of eager mode in turn with them.
        difference (`float`): Relative distance of its result to that of eager mode.
        peak (`float`, *optional*): Peak of the memory of a call, in GiB. `None` without CUDA.
    """

    first: float
    seconds: list[float]
    eager: list[float]
    difference: float
    peak: float | None

    def gain(self, num_calls: int) -> float:
        """Share of the time of eager mode that it saves, compilation included."""
        seconds = statistics.median(self.seconds)
        compilation = max(self.first - seconds, 0.0)
        return 1 - (seconds + compilation / num_calls) / statistics.median(self.eager)

    def verdict(self, num_calls: int, bound: float) -> str:
        """Whether it wins. A difference that is no number is beyond the bound."""
        if not self.difference <= bound:
            return f"differs by more than {bound:g}"
        is_always_faster = all(own < other for own, other in zip(self.seconds, self.eager, strict=True))
        return "wins" if is_always_faster and self.gain(num_calls) > SMALLEST_GAIN else "no gain"


def measure(
    candidate: Way,
    eager: Callable[[], torch.Tensor],
    expected: torch.Tensor,
    device: torch.device,
    repetitions: int,
) -> Timing:
    """Prepare a candidate, compare its result, and time it in turn with eager mode."""
    start = time.perf_counter()
    call = waiting(candidate.prepare(), device)
    found = call()
    first = time.perf_counter() - start
    difference = relative_distance(found, expected)
    del found
    peak = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        peak = torch.cuda.max_memory_allocated(device) / 2**30
    seconds = time_interleaved({"eager": eager, "candidate": call}, repetitions)
    return Timing(first, seconds["candidate"], seconds["eager"], difference, peak)


def compare(
    title: str,
    note: str,
    eager: Way,
    candidates: Sequence[Way],
    bound: float,
    device: torch.device,
    repetitions: int,
    amortised_calls: int,
) -> Iterator[PartResult]:
    """
    Compare candidates with eager mode, one after the other. A candidate that cannot run has its error as its verdict.

    Args:
        title, note (`str`): Of the table.
        eager ([`Way`]): What is compared with. Its error is raised.
        candidates (`Sequence[Way]`): The more important ones first.
        bound (`float`): Largest relative distance of results that agree.
        device (`torch.device`): The device.
        repetitions (`int`): Timed calls of each.
        amortised_calls (`int`): Calls among which the seconds of a compilation are divided.

    Returns:
        `Iterator[PartResult]`: What is known after each of them.
    """
    call = waiting(eager.prepare(), device)
    expected = call().clone()
    timing = measure(eager, call, expected, device, repetitions)
    rows, gains = [_row(eager.name, timing, 0.0, "eager")], {}
    for candidate in candidates:
        try:
            timing = measure(candidate, call, expected, device, repetitions)
        except Exception as error:
            traceback.print_exc()
            rows.append([candidate.name, *["-"] * 6, f"cannot run: {short_message(error)}"])
        else:
            gain, verdict = timing.gain(amortised_calls), timing.verdict(amortised_calls, bound)
            rows.append(_row(candidate.name, timing, gain, verdict))
            if verdict == "wins":
                gains[candidate.name] = gain
        release_memory(device)
        best = max(gains, key=gains.__getitem__, default=eager.name)
        yield PartResult(ResultTable(title, TIMING_COLUMNS, list(rows), f"Best: {best}. {note}"), passed=True)


def _row(name: str, timing: Timing, gain: float, verdict: str) -> list[Any]:
    peak = "-" if timing.peak is None else timing.peak
    medians = (statistics.median(seconds) for seconds in (timing.seconds, timing.eager))
    return [name, timing.first, *medians, gain, timing.difference, peak, verdict]
