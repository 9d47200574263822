# SPDX-License-Identifier: Apache-2.0

"""Peak memory of a call in a process of its own. It is read from `/proc`, so it needs Linux."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


_PEAK_IN_A_PROCESS = "import sys; from benchmark_parts.peaks import print_peak; print_peak(*sys.argv[1:])"


@dataclass(frozen=True)
class Peak:
    """
    Peak memory of a process, in bytes.

    Args:
        above_imports (`int`): What the peak is above the memory of the process after its imports.
        resident (`int`): The peak itself, imports included.
    """

    above_imports: int
    resident: int


def peak_in_a_process(module: str, function: str, *arguments: str) -> Peak:
    """
    Peak of a call in a process of its own, with as many threads as this one.

    Args:
        module (`str`): Module of the function, as recipes import it. What it imports does not count above the imports.
        function (`str`): Name of the function.
        arguments (`str`): Its arguments, which are texts.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        # What is freed goes back to the system, so that the peak is that of what is alive.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", _PEAK_IN_A_PROCESS, module, function, *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise RuntimeError(
            f"the process that measures the peak of {function}{arguments} failed:\n{result.stderr[-4000:]}"
        )
    return Peak(**json.loads(result.stdout.splitlines()[-1]))


def print_peak(module: str, function: str, *arguments: str) -> None:
    """The work of such a process: one call, and its [`Peak`] on the last line."""
    call = getattr(importlib.import_module(module), function)
    # Libraries allocate buffers of their own at first use.
    layer = torch.nn.Linear(64, 64)
    for dtype in (torch.float32, torch.bfloat16):
        layer.to(dtype)(torch.ones(64, 64, dtype=dtype)).sum().backward()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call(*arguments)
    peak = _status("VmHWM")
    print(json.dumps(asdict(Peak(peak - before, peak))))


def _status(name: str) -> int:
    """A size of this process in bytes: `VmRSS` now, or `VmHWM`, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
