# SPDX-License-Identifier: Apache-2.0

"""Results of a check, kept in a file after every part, so that a check that was stopped goes on where it stopped."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

from alphagrpo_ext.files import write_text
from benchmark_parts.tables import ResultTable
from gpu_check_parts.arguments import GPUCheckArguments


REMINDER = 10.0
"""Seconds after which what did not stop is stopped once more."""


class OutOfTimeError(BaseException):
    """Raised when the time is over. It is no `Exception`, so that a part that reports its own failure does not catch it."""


@contextmanager
def stop_after(seconds: float) -> Iterator[None]:
    """
    Raise [`OutOfTimeError`] in the block after so many seconds, and again where something has swallowed it. Only the main thread
    can use it.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1), REMINDER)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@dataclass(frozen=True)
class PartResult:
    """
    Result of one part for one model.

    Args:
        table ([`ResultTable`]): What was measured.
        passed (`bool`): Whether the part ran and everything is within its bound.
    """

    table: ResultTable
    passed: bool


class ResultFile:
    """
    The file `gpu_check.json` of an output folder.

    Args:
        args ([`GPUCheckArguments`]): Arguments of the check.
        environment (`Mapping[str, str]`): What else results depend on, such as the name of the device.

    Raises:
        `ValueError`: If the file holds results of other arguments or of another environment.
    """

    def __init__(self, args: GPUCheckArguments, environment: Mapping[str, str]) -> None:
        self.folder = Path(args.output_dir)
        self.path = self.folder / "gpu_check.json"
        # What changes which parts run does not change a part.
        chosen = ("output_dir", "parts", "sizes", "time_limit")
        self.made_with = {name: value for name, value in asdict(args).items() if name not in chosen} | dict(
            environment
        )
        self.parts: dict[str, PartResult] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        saved = json.loads(self.path.read_text(encoding="utf-8"))
        for name, value in self.made_with.items():
            if (other := saved["made_with"].get(name)) != value:
                raise ValueError(
                    f"{self.path} holds results with {name}={other}, and this check has {name}={value}: name another output_dir"
                )
        for name, part in saved["parts"].items():
            self.parts[name] = PartResult(ResultTable(**part["table"]), part["passed"])

    def has_passed(self, name: str) -> bool:
        """Whether a part ran to its end, and everything was within its bounds."""
        return name in self.parts and self.parts[name].passed

    def add(self, name: str, result: PartResult) -> None:
        """Keep the result of a part."""
        self.parts[name] = result
        parts = {n: {"passed": r.passed, "table": r.table.to_json()} for n, r in self.parts.items()}
        write_text(self.path, json.dumps({"made_with": self.made_with, "parts": parts}, indent=2) + "\n")

    def to_markdown(self) -> str:
        """All tables, below what they were made with."""
        made_with = ", ".join(f"{name} {value}" for name, value in self.made_with.items())
        return "\n\n".join([f"Made with {made_with}.", *(str(result.table).strip() for result in self.parts.values())])

    def save_markdown(self) -> None:
        """Write `gpu_check.md`."""
        write_text(self.folder / "gpu_check.md", self.to_markdown() + "\n")


def short_message(error: Exception) -> str:
    """The type of an error and the beginning of its message, for a cell of a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".replace("|", "/")


def unfinished(title: str, last: PartResult | None, reason: str) -> PartResult:
    """
    Result of a part that did not run to its end.

    Args:
        title (`str`): Title of the table if there is none yet.
        last ([`PartResult`], *optional*): What was known when it stopped.
        reason (`str`): Why it stopped.
    """
    print(f"{title} did not finish: {reason}", file=sys.stderr, flush=True)
    if last is None:
        return PartResult(ResultTable(title, ["not finished"], [[reason]]), passed=False)
    return PartResult(replace(last.table, note=f"Not finished: {reason}. {last.table.note}"), passed=False)
