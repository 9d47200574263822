# SPDX-License-Identifier: Apache-2.0

"""A run that has no room for what it writes at the end does not begin."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alphagrpo_ext.trainer import AlphaGRPOTrainer
from alphagrpo_ext.trainer.resume.checkpoint_folder import read_manifest
from alphagrpo_ext.trainer.resume.disk_space import checkpoint_bytes, model_bytes, optimizer_bytes


MakeTrainer = Callable[..., AlphaGRPOTrainer]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], None]:
    """Sets the free space of the disk."""
    disk_usage = shutil.disk_usage

    def free(num_bytes: Callable[[], int]) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: disk_usage(path)._replace(free=num_bytes()))

    return free


@pytest.mark.parametrize("settings", [{}, {"lora": True}, {"save_only_model": True}, {"save_strategy": "no"}], ids=str)
def test_room_for_a_checkpoint_and_the_model_is_looked_for_before_training(
    make: MakeTrainer, free: Callable[..., None], settings: dict[str, Any]
) -> None:
    trainer = make("run", max_steps=1, **settings)
    needed = model_bytes(trainer.model)
    needed += checkpoint_bytes(trainer.model, trainer.args) if settings.get("save_strategy") != "no" else 0
    free(lambda: needed - 1)
    with pytest.raises(OSError, match=r"run needs 0\.\d\d GB, but its disk has 0\.\d\d GB free: make room"):
        trainer.train()
    assert trainer.state.global_step == 0
    free(lambda: needed)
    trainer.train()
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".safetensors", ".pt"))
    assert needed <= written < needed + 300_000


def test_a_run_stops_before_it_begins_a_checkpoint_that_has_no_room(
    make: MakeTrainer, free: Callable[..., None]
) -> None:
    trainer = make("run", max_steps=2)
    folder, checkpoint = Path(trainer.args.output_dir), checkpoint_bytes(trainer.model, trainer.args)
    # A disk that has room for the first checkpoint alone.
    free(lambda: checkpoint - 1 if list(folder.glob("checkpoint-*")) else 10 * checkpoint)
    with pytest.raises(OSError, match="make room"):
        trainer.train()
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["checkpoint-1"]
    assert sum(record.size for record in read_manifest(folder / "checkpoint-1").files.values()) >= checkpoint


def test_a_size_that_is_not_known_is_said(make: MakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make("run", max_steps=1, optim="adafactor")
    assert optimizer_bytes(trainer.model, trainer.args) is None
    assert checkpoint_bytes(trainer.model, trainer.args) == model_bytes(trainer.model)
    trainer.train()
    assert "the size of the state of optim=adafactor is not known" in caplog.text
    assert optimizer_bytes(trainer.model, make("run", optim="sgd").args) == 0
