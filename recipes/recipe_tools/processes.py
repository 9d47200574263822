# SPDX-License-Identifier: Apache-2.0

"""The processes of a recipe: their start, a model in each of them, and their end."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from transformers.processing_utils import ProcessorMixin

from alphagrpo_ext.models.attention.choice import choose_attention
from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.printable import printable
from alphagrpo_ext.trainer.resume.sole_writer import sole_writer


def limit_threads() -> None:
    """
    Let each process compute in one thread on a CPU, unless `OMP_NUM_THREADS` says otherwise. The threads of a small model wait for
    each other, so that more of them take longer.
    """
    if torch.accelerator.is_available() or "OMP_NUM_THREADS" in os.environ:
        return
    torch.set_num_threads(1)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("Each process computes in one thread; set OMP_NUM_THREADS for more.", flush=True)


@contextmanager
def sole_processes(output_dir: str | Path) -> Iterator[PartialState]:
    """
    Connect the processes of a recipe that does not train, as a trainer does itself, keep other runs from writing to its output folder
    during the block, and disconnect them.

    Args:
        output_dir (`str` or `Path`): The folder. It is created.

    Raises:
        [`~alphagrpo_ext.files.FolderInUseError`]: In all processes, if another run holds the folder.
    """
    limit_threads()
    # On a machine without an accelerator, processes find each other only if they are told to use the CPU.
    state = PartialState(cpu=not torch.accelerator.is_available())
    with sole_writer(output_dir):
        yield state
    end_processes()


def load_policy(name: str, dtype: str) -> tuple[UnifiedModel, ProcessorMixin]:
    """Load a model that is not trained onto the device of this process, and say which attention it uses."""
    state = PartialState()
    model, processor = load_model(name, dtype=dtype)
    choice = choose_attention(model.family, state.device.type)
    model.set_attn_implementation(choice.name)
    if state.is_main_process:
        print(f"attention of {name}: {choice}", flush=True)
    return model.to(state.device).eval(), processor


def end_processes() -> None:
    """Disconnect the processes. Threads of Gloo that outlive the interpreter may abort it."""
    PartialState().destroy_process_group()


def print_skipped(skipped: Sequence[str] | None) -> None:
    """Print which rows `--skip_broken_rows` left out, if it is given, and what is broken about each."""
    if skipped:
        print(
            "\n".join(("", "Rows that were left out, because their image cannot be read:", *map(printable, skipped)))
        )
