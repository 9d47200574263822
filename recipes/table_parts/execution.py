# SPDX-License-Identifier: Apache-2.0

"""Runs several commands at a time, keeps what is finished, and ends them all with this process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from table_parts.plan import Run


RECIPES_FOLDER = Path(__file__).parents[1]
PATIENCE = 10.0
"""Seconds that a process has to end when it is told to."""
_POLL_SECONDS = 0.2


@contextmanager
def interrupted_by_termination() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that its processes are stopped. Only the main thread can use it."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class RunQueue:
    """
    Runs commands, each after what it needs, in processes with one thread.

    Args:
        logs (`Path`): Folder of `NAME.log`, which has the output of every try of a run.
        num_parallel (`int`): Number of processes at a time.
    """

    def __init__(self, logs: Path, num_parallel: int) -> None:
        self.logs = logs
        self.num_parallel = num_parallel
        self.failures: dict[str, str] = {}
        self._running: dict[str, tuple[Run, subprocess.Popen]] = {}

    def run_all(self, runs: Sequence[Run]) -> dict[str, str]:
        """
        Run what is not finished. A run that fails does not keep others from running, except those that need it.

        Args:
            runs (`Sequence[Run]`): The runs, each after those that it needs.

        Returns:
            `dict[str, str]`: What happened to runs that failed, by their names.
        """
        waiting = [run for run in runs if not run.finished]
        shown = None
        with tqdm(total=len(runs), initial=len(runs) - len(waiting), desc="runs", unit="run") as progress:
            try:
                while waiting or self._running:
                    waiting = self._start_ready(waiting)
                    self._collect()
                    # Only where something has changed, because a log keeps every line of the bar.
                    state = (", ".join(self._running), len(runs) - len(waiting) - len(self._running))
                    if state != shown:
                        shown = state
                        progress.set_postfix_str(state[0], refresh=False)
                        progress.update(state[1] - progress.n)
                        progress.refresh()
                    time.sleep(_POLL_SECONDS)
            finally:
                _stop([process for _, process in self._running.values()])
        return self.failures

    def _start_ready(self, waiting: Iterable[Run]) -> list[Run]:
        """Start runs whose needs are finished, and give up those whose needs failed. Returns the rest."""
        rest = []
        for run in waiting:
            failed = [other.name for other in run.needs if other.name in self.failures]
            if failed:
                self.failures[run.name] = f"not started, because {failed[0]} failed"
            elif len(self._running) < self.num_parallel and all(other.finished for other in run.needs):
                self._running[run.name] = (run, self._start(run))
            else:
                rest.append(run)
        return rest

    def _start(self, run: Run) -> subprocess.Popen:
        self.logs.mkdir(parents=True, exist_ok=True)
        script, *arguments = run.command
        places = [str(RECIPES_FOLDER), os.environ.get("PYTHONPATH", "")]
        with open(self._log(run), "ab") as log:
            return subprocess.Popen(
                # Scripts of a folder below import as those of `recipes/` do.
                [sys.executable, "-P", str(RECIPES_FOLDER / script), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, places))},
                # Ctrl-C in a terminal reaches this process alone, which stops its children itself.
                start_new_session=True,
            )

    def _collect(self) -> None:
        for name, (run, process) in list(self._running.items()):
            status = process.poll()
            if status is None:
                continue
            del self._running[name]
            if status:
                self.failures[name] = f"failed with status {status}: {self._log(run)}"
                continue
            # They are for a run that goes on, and take the most room.
            for checkpoint in run.folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            run.mark_finished()

    def _log(self, run: Run) -> Path:
        return self.logs / f"{run.name}.log"


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """End processes and what they have started. Their folders are made for processes that are killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        deadline = time.monotonic() + PATIENCE
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
