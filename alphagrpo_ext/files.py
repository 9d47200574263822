# SPDX-License-Identifier: Apache-2.0

"""Files that are complete or absent, and optional dependencies with an error that names the extra that installs them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """
    Yield a temporary path beside `path`, and move it to `path` when the block ends.

    Readers see the old file or the whole new one. If the block raises, the temporary file is removed and `path` is unchanged.

    Args:
        path (`str` or `Path`): The file to write. Its folder is created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The ending stays last, because Pillow chooses the image format by it.
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to a file as UTF-8, atomically; see [`atomic_path`]."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def require_extra(module: str, extra: str) -> None:
    """
    Check that an optional dependency is installed.

    Args:
        module (`str`): Name of the module, e.g. `"openai"`.
        extra (`str`): Extra of this package that installs it, e.g. `"judge"`.

    Raises:
        `ImportError`: If it is not installed; the message says how to install it.
    """
    if find_spec(module) is None:
        raise ImportError(f"'{module}' is not installed: pip install 'alphagrpo-ext[{extra}]'")
