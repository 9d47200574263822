# SPDX-License-Identifier: Apache-2.0

"""
The processes of a run as its files see them: which of them share a disk, and what all of them know.

It also works before a trainer exists and where nothing is distributed.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist


T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
_LAUNCHERS = {"accelerate", "accelerate-launch", "torchrun", "deepspeed"}
_LAUNCHER_MODULES = {
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
    "torch.distributed.run",
    "torch.distributed.launch",
    "deepspeed.launcher.launch",
}


def is_distributed() -> bool:
    """Whether this process is connected to others."""
    return dist.is_available() and dist.is_initialized()


def is_main() -> bool:
    """Whether this process is the first of all."""
    return not is_distributed() or dist.get_rank() == 0


def gathered(value: T) -> list[T]:
    """The values of all processes in their order. All processes call it together."""
    if not is_distributed():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _local_world() -> tuple[int, int]:
    """Position of this process on its node, and the number of processes there. Launchers say so in the environment."""
    index, count = (os.environ.get(name) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    return (int(index), int(count)) if is_distributed() and index and count else (0, 1)


def node() -> int:
    """Position of this process' node among all. Where the launcher does not say, every process counts as a node."""
    if not is_distributed():
        return 0
    # The names of torchrun and of Ray.
    named = os.environ.get("GROUP_RANK") or os.environ.get("NODE_RANK")
    return int(named) if named else dist.get_rank() // _local_world()[1]


def node_share(work: Sequence[T]) -> Sequence[T]:
    """What this process does of the work of its node."""
    index, count = _local_world()
    return work[index::count]


def end_with_launcher() -> None:
    """
    Have the operating system end this process when its launcher dies, so that nothing goes on training unseen.

    Only a parent that is `accelerate launch`, `torchrun` or DeepSpeed's launcher counts; a shell may end. It does nothing on
    other systems than Linux.

    Raises:
        `SystemExit`: If `torchrun`, or `accelerate launch` with several processes, has died since it started this process.
    """
    parent = os.getppid()
    if parent == 1 and "TORCHELASTIC_RUN_ID" in os.environ and not _is_launcher(parent):
        raise SystemExit("the launcher of this process has ended, and so does the process")
    if not _is_launcher(parent):
        return
    # Checkpoints are complete or absent at every moment, so nothing is lost by an end without notice.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _is_launcher(process: int) -> bool:
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return any(os.path.basename(part) in _LAUNCHERS or part in _LAUNCHER_MODULES for part in command[:4])
