# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipe_tools.startup import without_garbage_collection


RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPT = """
import atexit, gc
from recipe_tools.startup import without_garbage_collection
atexit.register(lambda: print("frozen", gc.get_freeze_count() > 0))
with without_garbage_collection():
    pass
print("frozen", gc.get_freeze_count() > 0)
"""


@pytest.fixture(autouse=True)
def restore_collector() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.parametrize("enabled", [True, False])
def test_collector_is_left_as_it_was(enabled: bool) -> None:
    if not enabled:
        gc.disable()
    with pytest.raises(ImportError), without_garbage_collection():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() == enabled


def test_objects_are_frozen_at_the_end_alone() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], cwd=RECIPES, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["frozen False", "frozen True"]
