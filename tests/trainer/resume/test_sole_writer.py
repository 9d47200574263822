# SPDX-License-Identifier: Apache-2.0

"""An output folder has one run at a time, and nothing of a run outlives its launcher."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alphagrpo_ext.files import FolderInUseError, FolderLock
from alphagrpo_ext.trainer import AlphaGRPOTrainer
from alphagrpo_ext.trainer.resume.sole_writer import sole_writer, writes_alone
from support.locked_folder import another_process


ROOT = Path(__file__).parents[3]
MakeTrainer = Callable[..., AlphaGRPOTrainer]


def test_a_trainer_is_refused_while_another_process_writes(make: MakeTrainer) -> None:
    trainer = make("run", max_steps=1)
    folder = Path(trainer.args.output_dir)
    with another_process(folder) as process:
        message = (
            f"the folder {folder} is being written to by process {process.pid} on .*: wait for it, stop it, or name"
        )
        with pytest.raises(FolderInUseError, match=message):
            trainer.train()
        # To make a trainer is not to write.
        make("run")
        # Another folder is free.
        make("other", max_steps=1).train()
    # The lock died with the process.
    trainer.train()
    assert trainer.state.global_step == 1
    assert not (folder / FolderLock.name).exists()


@pytest.mark.slow
def test_trainers_follow_each_other_in_a_process_and_after_an_error(make: MakeTrainer) -> None:
    def no_reward(**kwargs: Any) -> list[float]:
        raise RuntimeError("out of paint")

    first = make("run", max_steps=1)
    first.train()
    first.train()
    with pytest.raises(RuntimeError, match="out of paint"):
        make("run", reward_funcs=no_reward).train()
    make("run", max_steps=1).train()
    with another_process(Path(first.args.output_dir)):
        pass


def test_a_recipe_holds_the_folder_from_beginning_to_end(make: MakeTrainer) -> None:
    trainer = make("run", max_steps=1)
    folder = Path(trainer.args.output_dir)

    @writes_alone
    def main(script_args: dict[str, Any], training_args: Any) -> str:
        assert (folder / FolderLock.name).exists()
        trainer.train()
        # An evaluation after training still belongs to the run.
        assert (folder / FolderLock.name).exists()
        return "done"

    assert main({}, trainer.args) == "done"
    assert not (folder / FolderLock.name).exists()
    with another_process(folder), pytest.raises(FolderInUseError):
        main({}, trainer.args)


def test_a_forked_process_neither_has_nor_keeps_the_lock(tmp_path: Path) -> None:
    """As the workers of a data loader, which may outlive their parent for a moment."""
    reading, writing = os.pipe()
    with sole_writer(tmp_path):
        child = os.fork()
        if not child:
            try:
                FolderLock(tmp_path).acquire()
                os.write(writing, b"locked")
            except FolderInUseError:
                os.write(writing, b"refused")
            signal.pause()
        assert os.read(reading, 10) == b"refused"
    try:
        with another_process(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_one_of_many_processes_gets_the_lock(tmp_path: Path) -> None:
    """They come and go at the same time, each removing the file when it is done."""
    code = (
        "import sys, os\nfrom pathlib import Path\nfrom alphagrpo_ext.files import FolderLock\nFolderLock.patience = 60\n"
        "folder = Path(sys.argv[1])\nfor _ in range(20):\n    lock = FolderLock(folder)\n    lock.acquire()\n"
        "    os.close(os.open(folder / 'alone', os.O_CREAT | os.O_EXCL))\n    os.unlink(folder / 'alone')\n    lock.release()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    others = [subprocess.Popen([sys.executable, "-c", code, tmp_path], env=environment) for _ in range(3)]
    assert [process.wait(60) for process in others] == [0, 0, 0]
    assert not list(tmp_path.iterdir())


def test_a_killed_run_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FolderLock, "patience", 30.0)
    with another_process(tmp_path) as process:
        threading.Timer(0.3, process.kill).start()
        started = time.monotonic()
        with sole_writer(tmp_path):
            assert time.monotonic() - started < 10


CHILD = """
import os, sys, time
from alphagrpo_ext.trainer.resume.processes import end_with_launcher
end_with_launcher()
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends children with their parent")
@pytest.mark.parametrize("name", ["accelerate", "a_shell"])
def test_a_process_ends_with_its_launcher_and_not_with_a_shell(tmp_path: Path, name: str) -> None:
    launcher = tmp_path / name
    launcher.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {CHILD!r}])\n")
    process = subprocess.Popen(
        [sys.executable, launcher],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + (20 if name == "accelerate" else 1)
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    is_alive = Path(f"/proc/{child}").exists()
    if is_alive:
        os.kill(child, signal.SIGKILL)
    process.stdout.close()
    assert is_alive == (name == "a_shell")
