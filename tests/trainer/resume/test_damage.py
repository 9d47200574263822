# SPDX-License-Identifier: Apache-2.0

"""Every kind of damage to a checkpoint is found and named."""

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alphagrpo_ext.trainer import AlphaGRPOTrainer
from alphagrpo_ext.trainer.resume import file_records, processes
from alphagrpo_ext.trainer.resume.checkpoint_folder import (
    MANIFEST_NAME,
    DamagedCheckpointError,
    Manifest,
    check_checkpoint,
    check_contents,
    last_checkpoint,
    record_files,
    write_manifest,
)
from alphagrpo_ext.trainer.resume.file_records import checksums, file_sizes, make_records, pieces


MakeTrainer = Callable[..., AlphaGRPOTrainer]

FILES = {
    "model.safetensors": bytes(range(256)) * 9,
    "optimizer.pt": b"moments" * 300,
    "scheduler.pt": b"moment " * 300,
    "trainer_state.json": b'{"global_step": 7}',
    "global_step7/rank_0.pt": b"shard 0",
    "global_step7/rank_1.pt": b"shard 1",
    "empty": b"",
}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that files here have several."""
    monkeypatch.setattr(file_records, "PIECE_BYTES", 1000)
    monkeypatch.setattr(file_records, "_BUFFER_BYTES", 300)


@pytest.fixture
def fresh(tmp_path: Path, small_pieces: None) -> Iterator[Callable[[], Path]]:
    """Writes a checkpoint anew."""

    def fresh() -> Path:
        folder = tmp_path / "checkpoint-7"
        shutil.rmtree(folder, ignore_errors=True)
        for name, content in FILES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        write_manifest(folder, step=7, num_processes=2)
        return folder

    yield fresh


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


NONEMPTY = st.sampled_from([name for name, content in FILES.items() if content])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NONEMPTY, bit=st.integers(0, 10**6), keep_time=st.booleans())
def test_any_flipped_bit_is_found(fresh: Callable[[], Path], name: str, bit: int, keep_time: bool) -> None:
    folder = fresh()
    before = (folder / name).stat()
    flip(folder / name, bit)
    if keep_time:
        os.utime(folder / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DamagedCheckpointError, match=f"damaged: {name} has other contents than were written"):
        check_checkpoint(folder)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(list(FILES)), length=st.integers(0, 4000))
def test_any_other_length_is_found(fresh: Callable[[], Path], name: str, length: int) -> None:
    folder = fresh()
    size = len(FILES[name])
    (folder / name).write_bytes((FILES[name] * 3000)[:length] or bytes(length))
    if length == size:
        check_checkpoint(folder)
        return
    with pytest.raises(
        DamagedCheckpointError, match=f"{name} (is empty|has {length} bytes) where {size} were written"
    ):
        check_checkpoint(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_there_or_not_a_file_is_named(fresh: Callable[[], Path], name: str) -> None:
    path = fresh() / name
    path.unlink()
    with pytest.raises(DamagedCheckpointError, match=f"{name} is missing"):
        check_checkpoint(path.parents[name.count("/")])
    path.mkdir()
    with pytest.raises(DamagedCheckpointError, match=f"{name} is a folder where a file"):
        check_checkpoint(path.parents[name.count("/")])
    path.rmdir()
    path.symlink_to(path.with_name("nowhere"))
    with pytest.raises(DamagedCheckpointError, match=f"{name} is missing"):
        check_checkpoint(path.parents[name.count("/")])


def test_files_that_changed_places_are_named(fresh: Callable[[], Path]) -> None:
    folder = fresh()
    # Of the same size, so that their contents alone tell them apart.
    os.replace(folder / "optimizer.pt", folder / "other")
    os.replace(folder / "scheduler.pt", folder / "optimizer.pt")
    os.replace(folder / "other", folder / "scheduler.pt")
    with pytest.raises(
        DamagedCheckpointError, match="optimizer.pt has other contents.*scheduler.pt has other contents"
    ):
        check_checkpoint(folder)


@pytest.mark.parametrize("name", ["rollouts_0.pt", "global_step6/rank_0.pt", "notes.txt"])
def test_a_file_of_another_checkpoint_is_named(fresh: Callable[[], Path], name: str) -> None:
    folder = fresh()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"of another step")
    with pytest.raises(DamagedCheckpointError, match=f"{name} is not one of its files"):
        check_checkpoint(folder)


def test_what_file_managers_and_file_systems_leave_is_no_damage(fresh: Callable[[], Path]) -> None:
    folder = fresh()
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "global_step7" / ".nfs0001").write_bytes(b"x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_bytes(b"x")
    assert check_checkpoint(folder).files.keys() == FILES.keys()


def test_a_folder_of_another_step_is_named(fresh: Callable[[], Path], tmp_path: Path) -> None:
    shutil.copytree(fresh(), tmp_path / "checkpoint-9")
    with pytest.raises(DamagedCheckpointError, match="checkpoint-9 is damaged: its files are those of step 7"):
        check_checkpoint(tmp_path / "checkpoint-9")
    # A name of its own is no claim.
    assert check_checkpoint((tmp_path / "checkpoint-9").rename(tmp_path / "best")).step == 7


def test_any_flipped_bit_of_the_manifest_is_found(fresh: Callable[[], Path]) -> None:
    written = (fresh() / MANIFEST_NAME).read_bytes()
    whole = Manifest.from_json(written.decode())
    for bit in range(8 * len(written)):
        data = bytearray(written)
        data[bit // 8] ^= 1 << bit % 8
        # A blank, or a digit of the time beyond its precision, can differ without a difference.
        with contextlib.suppress(ValueError):
            assert Manifest.from_json(data.decode()) == whole, bytes(data)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        "3",
        '"x"',
        "{",
        "[" * 100_000,
        '{"files": 3}',
        '{"checksum": 1}',
        '{"files": {"a": {}}}',
    ],
)
def test_a_manifest_that_is_none_is_named(fresh: Callable[[], Path], text: str) -> None:
    folder = fresh()
    (folder / MANIFEST_NAME).write_text(text)
    with pytest.raises(DamagedCheckpointError, match="damaged: checkpoint.json cannot be read"):
        check_checkpoint(folder)
    (folder / MANIFEST_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DamagedCheckpointError, match="damaged: checkpoint.json cannot be read"):
        check_checkpoint(folder)
    (folder / MANIFEST_NAME).unlink()
    (folder / MANIFEST_NAME).mkdir()
    with pytest.raises(DamagedCheckpointError, match="has no checkpoint.json"):
        check_checkpoint(folder)


def test_contents_are_read_once_while_they_stay_as_they_are(
    fresh: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    checksum = file_records._checksum
    monkeypatch.setattr(file_records, "_checksum", lambda *piece: read.append(piece) or checksum(*piece))
    folder = fresh()
    num_pieces = len(read)
    for _ in range(2):
        check_checkpoint(folder)
    assert len(read) == 2 * num_pieces
    flip(folder / "optimizer.pt", 3)
    with pytest.raises(DamagedCheckpointError, match="optimizer.pt"):
        check_checkpoint(folder)


def test_processes_of_a_node_share_the_work_and_know_of_each_others_faults(
    fresh: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    values: list[Any] = [None, None]
    barrier, own = threading.Barrier(2), threading.local()

    def gathered(value: Any) -> list[Any]:
        values[own.index] = value
        barrier.wait()
        result = list(values)
        barrier.wait()
        return result

    monkeypatch.setattr(processes, "gathered", gathered)
    monkeypatch.setattr(processes, "node_share", lambda work: work[own.index :: 2])
    read: list[tuple[Path, int]] = []
    checksum = file_records._checksum

    def together(call: Callable[[], Any]) -> list[Any]:
        """What two processes, which are threads here, get from a call."""

        def one(index: int) -> Any:
            own.index = index
            try:
                return call()
            except DamagedCheckpointError as error:
                return str(error)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, range(2)))

    folder = fresh()
    sizes = file_sizes(folder, MANIFEST_NAME)
    expected = make_records(sizes, checksums(folder, pieces(sizes)))
    monkeypatch.setattr(file_records, "_checksum", lambda *piece: read.append(piece) or checksum(*piece))
    assert together(lambda: record_files(folder)) == [expected, expected]
    # No piece was read twice.
    assert len(read) == len(set(read)) == len(pieces(sizes))
    manifest = Manifest(7, 2, 0.0, expected)
    assert together(lambda: check_contents(folder, manifest)) == [None, None]
    flip(folder / "optimizer.pt", 8 * 1500)
    for outcome in together(lambda: check_contents(folder, manifest)):
        assert "optimizer.pt has other contents" in outcome


@pytest.mark.invariant
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    make: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make("run")
    whole.train()
    folder = Path(whole.args.output_dir)
    expected = {name: value.clone() for name, value in whole.model.state_dict().items()}
    shutil.rmtree(folder / "checkpoint-3")
    flip(folder / "checkpoint-2" / "optimizer.pt", 4321)
    with pytest.raises(DamagedCheckpointError, match="optimizer.pt has other contents"):
        make("run").train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    caplog.clear()
    resumed = make("run")
    resumed.train(resume_from_checkpoint="last")
    assert "checkpoint-2 is not used" in caplog.text and "optimizer.pt has other contents" in caplog.text
    assert "the run goes on from" in caplog.text and "checkpoint-1" in caplog.text
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_every_file_that_a_trainer_writes_is_compared(run_folder: Path) -> None:
    folder = run_folder / "checkpoint-2"
    names = {path.name for path in folder.iterdir()} - {MANIFEST_NAME}
    assert {"model.safetensors", "optimizer.pt", "progress_0.json", "settings.json", "rng_state.pth"} <= names
    for name in names:
        flip(folder / name, 77)
        with pytest.raises(DamagedCheckpointError, match=f"{name} has other contents"):
            check_checkpoint(folder)
        assert last_checkpoint(run_folder) == run_folder / "checkpoint-1"
        flip(folder / name, 77)
    assert last_checkpoint(run_folder) == folder


def test_a_checkpoint_of_an_earlier_version_resumes_with_a_warning(
    make: MakeTrainer, run_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It has sizes and no checksums, and no settings."""
    folder = run_folder / "checkpoint-1"
    (folder / "settings.json").unlink()
    files = ", ".join(f'"{p.name}": {p.stat().st_size}' for p in folder.iterdir() if p.name != MANIFEST_NAME)
    (folder / MANIFEST_NAME).write_text(
        f'{{"step": 1, "num_processes": 1, "written_at": 1.0, "files": {{{files}}}}}', encoding="utf-8"
    )
    with caplog.at_level(logging.WARNING):
        trainer = make("again", max_steps=2, learning_rate=0.5)
        trainer.train(resume_from_checkpoint=str(folder))
    assert "saved by an earlier version, which kept no checksums and no settings" in caplog.text
    # What cannot be compared is applied all the same.
    assert trainer.state.log_history[1]["learning_rate"] == 0.25
    (folder / "optimizer.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match="optimizer.pt is missing"):
        check_checkpoint(folder)
