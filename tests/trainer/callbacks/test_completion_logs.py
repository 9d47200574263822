# SPDX-License-Identifier: Apache-2.0

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from alphagrpo_ext.trainer import AlphaGRPOTrainer
from alphagrpo_ext.trainer.callbacks.completion_logs import markdown_table
from reward_models import DVReward


MakeTrainer = Callable[..., AlphaGRPOTrainer]


def train(make_trainer: MakeTrainer, **settings) -> AlphaGRPOTrainer:
    trainer = make_trainer(
        reward_funcs=DVReward("shapes"), task="self_reflection", log_completions=True, max_steps=2, **settings
    )
    trainer.train()
    return trainer


def test_tensorboard_gets_images_and_table(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, TENSORS, EventAccumulator

    train(make_trainer, report_to="tensorboard")
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file), {IMAGES: 0, TENSORS: 0}).Reload()
    assert sorted(events.Tags()["images"]) == [f"completions/{place}/image" for place in range(4)]
    images = events.Images("completions/0/image")
    assert [image.step for image in images][:2] == [1, 2]
    # The initial image and the refined one.
    assert (images[0].width, images[0].height) == (48, 24)
    text = events.Tensors("completions/text_summary")[0].tensor_proto.string_val[0].decode()
    header, _, *rows = text.split("\n")
    assert "dvreward/answers" in header.replace("\\", "") and len(rows) == 4


@pytest.mark.slow
def test_trackio_gets_images_and_table(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    for module in ("utils", "sqlite_storage"):
        monkeypatch.setattr(f"trackio.{module}.TRACKIO_DIR", tmp_path / "trackio")
    for module in ("utils", "run", "table", "media.media"):
        monkeypatch.setattr(f"trackio.{module}.MEDIA_DIR", tmp_path / "trackio" / "media")
    train(make_trainer, report_to="trackio", project="test", run_name="run", trackio_static_space_id=False)
    logs = SQLiteStorage.get_logs("test", "run")
    first, *_ = [entry["completions"]["_value"] for entry in logs if "completions" in entry]
    assert len(first) == 4
    for row in first:
        assert row["dvreward"] is not None and "semantic" in row["dvreward/answers"]
        paths = [image["file_path"] for image in row["image"]]
        assert len(paths) == 2 and all((tmp_path / "trackio" / "media" / path).is_file() for path in paths)


@pytest.mark.slow
def test_wandb_gets_images_and_table(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(make_trainer, report_to="wandb")
    wandb.finish()
    tables = sorted((tmp_path / "wandb").glob("offline-run-*/files/media/table/completions_*.json"))
    assert tables
    table = json.loads(tables[0].read_text())
    assert {"prompt", "completion", "dvreward", "dvreward/answers", "advantage", "image"} <= set(table["columns"])
    assert len(table["data"]) == 4
    images = list((tmp_path / "wandb").glob("offline-run-*/files/media/images/**/*.png"))
    # Those of four samples in each of two steps, the initial image beside the refined one.
    assert len(images) >= 8
    with Image.open(images[0]) as image:
        assert image.size == (48, 24)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a | b", "a \\| b"),
        ("<img src=x>", "&lt;img src=x&gt;"),
        ("one\ntwo", "one<br>two"),
        ("one\rtwo\x1b[0m", "one two \\[0m"),
        ("`code` [link](x)", "\\`code\\` \\[link\\](x)"),
        (0.123456, "0.1235"),
        (None, "None"),
    ],
)
def test_cells_are_text(value: str | float | None, expected: str) -> None:
    assert markdown_table({"column": [value]}).split("\n")[-1] == f"| {expected} |"


def test_the_table_on_the_terminal_cannot_steer_it(
    make_trainer: MakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reward(completions: list[str], log_extra: Callable, **kwargs: object) -> list[float]:
        log_extra("note", ["\x1b[2Jnote"] * len(completions))
        return [0.5] * len(completions)

    trainer = make_trainer(reward_funcs=reward, log_completions=True, max_steps=1)
    trainer.train()
    trainer._logs["prompt"].append("a\x1b]0;title\x07 circle")
    for name in ("completion", "advantages"):
        trainer._logs[name].append(trainer._logs[name][0])
    for values in (*trainer._logs["rewards"].values(), *trainer._logs["extra"].values()):
        values.append(values[0])
    trainer.log({})
    printed = capsys.readouterr().out
    assert "[2Jnote" in printed and "]0;title" in printed.replace("\n", "")
    assert not {"\x1b", "\x07"} & set(printed)
    # Data stay as they are.
    (file,) = (tmp_path / "completions").glob("completions_00001.parquet")
    assert "a\x1b]0;title\x07 circle" in set(pd.read_parquet(file)["prompt"])
