# SPDX-License-Identifier: Apache-2.0

"""Start and end of the processes that `accelerate launch` runs a recipe in."""

from __future__ import annotations

import torch
from accelerate import PartialState


def start_processes() -> PartialState:
    """Connect the processes of a recipe that does not train; a trainer does this itself."""
    # On a machine without an accelerator, processes find each other only if they are told to use the CPU.
    return PartialState(cpu=not torch.accelerator.is_available())


def end_processes() -> None:
    """Disconnect the processes. Threads of Gloo that outlive the interpreter may abort it."""
    PartialState().destroy_process_group()
