# SPDX-License-Identifier: Apache-2.0

"""Errors in what a user gave: one line and status 2, as for a wrong argument. All other errors keep their traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from alphagrpo_ext.files import FileInUseError, FolderInUseError
from alphagrpo_ext.printable import printable
from reward_models.dvreward import JudgeFailedError


EXIT_STATUS = 2
_EXPECTED = (JudgeFailedError, FolderInUseError, FileInUseError)


@contextmanager
def checking_input() -> Iterator[None]:
    """
    Check and load what the user gave. Errors of the block that are the user's (a wrong value, a file that is missing or malformed,
    a module that cannot be imported, a judge that does not answer) pass through and are marked for [`input_errors_in_a_line`].
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (ValueError, OSError, ImportError, yaml.YAMLError)) or _is_failed_preflight(error):
            error.is_of_input = True
        raise


@contextmanager
def input_errors_in_a_line() -> Iterator[None]:
    """
    Run a recipe from its command line. An error that [`checking_input`] marked, a judge that fails, and an output that another
    process writes to end the program with one line and [`EXIT_STATUS`].
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, _EXPECTED) and not getattr(error, "is_of_input", False):
            raise
        sys.stdout.flush()
        # A message of another library may have several lines, of which each counts.
        kind = type(error).__name__
        # It may quote what a file holds.
        message = printable(f"{error} ({kind})" if str(error) else kind, keep="\n")
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
        sys.exit(EXIT_STATUS)


def _is_failed_preflight(error: Exception) -> bool:
    # Its module has been imported if there is such an error, and is slow to import for `--help`.
    module = sys.modules.get("alphagrpo_ext.trainer.reward_functions")
    return module is not None and isinstance(error, module.PreflightError)
