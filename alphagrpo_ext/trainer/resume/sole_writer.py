# SPDX-License-Identifier: Apache-2.0

"""An output folder has one run that writes to it at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainingArguments

from alphagrpo_ext.files import FolderInUseError, FolderLock
from alphagrpo_ext.trainer.resume import processes


T = TypeVar("T")


@contextmanager
def sole_writer(output_dir: str | Path) -> Iterator[None]:
    """
    Hold the lock of a folder during the block, and end with the launcher of this process. All processes of a run call it
    together; the main process holds the lock. Blocks may be nested.

    Args:
        output_dir (`str` or `Path`): The folder. It is created.

    Raises:
        [`FolderInUseError`]: In all processes, if another run holds it. The message names the folder and the process.
    """
    processes.end_with_launcher()
    lock, is_main, refusal = FolderLock(output_dir), processes.is_main(), None
    if is_main:
        try:
            lock.acquire()
        except FolderInUseError as error:
            refusal = str(error)
    if refusal := processes.gathered(refusal)[0]:
        raise FolderInUseError(refusal)
    try:
        yield
    finally:
        if is_main:
            lock.release()


def writes_alone(main: Callable[..., T]) -> Callable[..., T]:
    """
    Decorate the `main` of a recipe, so that its evaluations and its model belong to the run as training does: it holds the lock
    of the `output_dir` among its arguments; see [`sole_writer`].
    """

    @functools.wraps(main)
    def run(*arguments: Any) -> T:
        (training_args,) = [argument for argument in arguments if isinstance(argument, TrainingArguments)]
        with sole_writer(training_args.output_dir):
            return main(*arguments)

    return run
