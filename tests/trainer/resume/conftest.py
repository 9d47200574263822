# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alphagrpo_ext.files import FolderLock
from alphagrpo_ext.trainer import AlphaGRPOTrainer


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test waits for a run that is about to end."""
    monkeypatch.setattr(FolderLock, "patience", 0.0)
    yield
    assert not FolderLock._held


@pytest.fixture
def make(make_trainer: Callable[..., AlphaGRPOTrainer], tmp_path: Path) -> Callable[..., AlphaGRPOTrainer]:
    """A trainer that saves after every step, in a folder of its own."""

    def make(name: str, **settings: Any) -> AlphaGRPOTrainer:
        defaults = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "lr_scheduler_type": "linear"}
        return make_trainer(**(defaults | settings), output_dir=str(tmp_path / name))

    return make


@pytest.fixture
def run_folder(make: Callable[..., AlphaGRPOTrainer]) -> Path:
    """A run with two checkpoints."""
    trainer = make("run", max_steps=2)
    trainer.train()
    return Path(trainer.args.output_dir)
