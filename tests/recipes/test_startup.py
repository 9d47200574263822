# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import gc

import pytest

from recipe_tools.startup import without_garbage_collection


@pytest.fixture(autouse=True)
def restore_collector():
    enabled = gc.isenabled()
    yield
    gc.unfreeze()
    gc.enable() if enabled else gc.disable()


@pytest.mark.parametrize("enabled", [True, False])
def test_collector_is_left_as_it_was(enabled: bool) -> None:
    gc.enable() if enabled else gc.disable()
    with pytest.raises(ImportError), without_garbage_collection():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() == enabled


def test_what_was_imported_is_not_looked_at_again() -> None:
    with without_garbage_collection():
        module = [{}]
    assert gc.get_freeze_count() > 0
    assert not any(found is module for found in gc.get_objects())
