# SPDX-License-Identifier: Apache-2.0

"""Every command of the READMEs is run in a process of its own, as far as a machine without a GPU can."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from _pytest.mark import ParameterSet
from peft import LoraConfig, get_peft_model

from alphagrpo_ext.models.adapters import save_adapter
from alphagrpo_ext.models.loading import load_model, resolve_model_path
from alphagrpo_ext.shapes.editing import editing_rows
from alphagrpo_ext.shapes.prompts import prompt_rows
from support.chat_stub import chat_stub
from support.faulty_endpoint import Faults, faulty_endpoint
from support.laptop_commands import CHAT_URL, JUDGE_URL, laptop_command, reason_not_to_run, script_of
from support.readme_commands import PAGES, ROOT, Snippet, all_snippets


FOLDERS = ("alphagrpo_ext", "recipes", "reward_models", "tests")
DEADLINE = 900.0
LONG = (
    "--config_file",
    "--multi_gpu",
    "estimate_memory.py",
    "pretrain_shapes.py",
    "ray_train.py",
    "reproduce_tables.py",
    "weight_digests.py",
)
"""Words of commands that take half a minute or more, or several processes."""
RESULTS = {
    "benchmark.py": "runs/*/benchmark.json",
    "convert_checkpoint.py": "runs/*/model.safetensors",
    "decompose_prompts.py": "**/*questions.jsonl",
    "evaluate.py": "runs/*/evaluation.json",
    "export_benchmark.py": "runs/*/images/00000/samples/00000.png",
    "generate.py": "runs/*/contact_sheet.png",
    "openrlhf_prompts.py": "runs/*/prompts.jsonl",
    "pretrain_shapes.py": "runs/*/checkpoint/model.safetensors",
    "ray_train.py": "runs/*/ray_*/attempts.jsonl",
    "reasoning_t2i.py": "runs/*/report.html",
    "self_reflection.py": "runs/*/report.html",
}
"""A file that a script writes. Those that are not here print their results."""


def write_lines(path: Path, rows: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_edits(folder: Path) -> None:
    rows = editing_rows(4, seed=1)
    for index, row in enumerate(rows):
        row["image"].save(folder / f"{index}.png")
        row["image"] = f"{index}.png"
    write_lines(folder / "edits.jsonl", rows)


def write_adapter(folder: Path) -> None:
    model, _ = load_model("bagel-shapes")
    model.name_or_path = "bagel-shapes"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj_moe_gen"]))
    adapted.peft_config["default"].base_model_name_or_path = "bagel-shapes"
    save_adapter(adapted, folder)


@pytest.fixture
def workplace(tmp_path: Path, snippet: Snippet) -> Path:
    """A folder with the files that a reader has. The repository's folders are found in it, and what is written stays in it."""
    for name in FOLDERS:
        (tmp_path / name).symlink_to(ROOT / name)
    wise = {"Prompt": "Candy", "Explanation": "e", "Category": "c", "Subcategory": "s", "prompt_id": 1}
    (tmp_path / "WISE" / "data_verified").mkdir(parents=True)
    (tmp_path / "WISE" / "data_verified" / "culture_verified.json").write_text(json.dumps([wise]))
    (tmp_path / "prompts.txt").write_text("two cats\na red car in the rain\n", encoding="utf-8")
    if "--output questions.jsonl" not in snippet.code:
        write_lines(tmp_path / "questions.jsonl", prompt_rows("train", 8, seed=0))
    write_lines(tmp_path / "held_out.jsonl", prompt_rows("evaluation", 7, seed=0))
    circle = {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "draw a circle"}
    for name in ("FILE", "geneval/prompts/evaluation_metadata.jsonl"):
        write_lines(tmp_path / name, [circle, circle])
    write_edits(tmp_path)
    write_adapter(tmp_path / "runs" / "adapter")
    for name in ("BASE", "runs/a", "runs/seed0"):
        (tmp_path / name).symlink_to(resolve_model_path("bagel-shapes"))
    return tmp_path


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, str]]:
    """A language model that decomposes prompts and a vision-language model that answers questions, both on loopback."""
    with chat_stub() as chat, faulty_endpoint(Faults()) as (judge, _):
        yield {CHAT_URL: chat.url, JUDGE_URL: judge.url}


def environment(**settings: str) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OPENAI_API_KEY": "of-a-stub",
        "RAY_worker_niceness": "0",
        **settings,
    }


def program(words: Sequence[str]) -> list[str]:
    """A command with the programs of this environment."""
    if words[0] == "accelerate":
        return [sys.executable, "-m", "accelerate.commands.launch", *words[2:]]
    return [sys.executable, *words[1:]] if words[0] == "python" else list(words)


def run(words: Sequence[str], folder: Path, **settings: str) -> str:
    """Run a command, which must succeed, and return what it prints."""
    result = subprocess.run(
        program(words), env=environment(**settings), cwd=folder, capture_output=True, text=True, timeout=DEADLINE
    )
    assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result.stdout


def run_script(words: Sequence[str], folder: Path, addresses: dict[str, str]) -> None:
    """Run a shortened command, and check that it leaves its result."""
    words = [addresses.get(word, word) for word in words]
    # Times of files are rounded.
    start = time.time() - 1
    output = run(words, folder, **({"ACCELERATE_TORCH_DEVICE": "cpu"} if "--config_file" in words else {}))
    patterns = [RESULTS[name] for word in words if (name := Path(word).name) in RESULTS and "--help" not in words]
    assert patterns or output.strip()
    for pattern in patterns:
        assert any(path.stat().st_mtime >= start for path in folder.glob(pattern)), f"{pattern} was not written"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def run_server(command: Sequence[str], folder: Path, addresses: dict[str, str]) -> None:
    """Start a server, ask for its health, and stop it as a reader does."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    replaced = {"http://localhost:8000/v1": addresses[JUDGE_URL]}
    words = [*(replaced.get(word, word) for word in program(command)), "--port", str(port)]
    process = subprocess.Popen(words, env=environment(), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + DEADLINE
        while process.poll() is None:
            assert time.monotonic() < deadline
            try:
                assert httpx.get(f"{url}/health", timeout=60).json()["status"] == "ok"
                break
            except httpx.TransportError:
                time.sleep(0.1)
        was_ready = process.poll() is None
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert was_ready and process.returncode == 0, output.decode()


def run_shell_script(command: Sequence[str], folder: Path) -> None:
    """Everything that the script starts is real, but OpenRLHF's trainer, which needs GPUs: its flags are written down."""
    python = folder / "python"
    python.write_text(
        '#!/usr/bin/env bash\ncase "$*" in "-m openrlhf.cli.train_ppo_ray "*) printf "%s\\n" "$@" > trainer_flags; exit ;; esac\n'
        f'exec {shlex.quote(sys.executable)} "$@"\n'
    )
    python.chmod(0o755)
    run(command, folder, PYTHON=str(python), SERVER_PORT=str(free_port()))
    flags = (folder / "trainer_flags").read_text().splitlines()
    dataset = folder / flags[flags.index("--data.prompt_dataset") + 1]
    assert dataset.read_text().count("\n") > 1


def is_run_here(command: Sequence[str]) -> bool:
    return command[0] != "pytest" and reason_not_to_run(command) is None


def cases() -> Iterator[ParameterSet]:
    """
    All shell code, without what only installs or tests. What takes long, and what runs no script that was not run before,
    has a low priority, but for the commands of the first page.
    """
    run_before: set[str] = set()
    for snippet in all_snippets():
        scripts = {script_of(command) or " ".join(command[:3]) for command in snippet.commands if is_run_here(command)}
        if not scripts:
            continue
        is_low = any(word in snippet.code for word in LONG) or (snippet.page != PAGES[0] and scripts <= run_before)
        if not is_low:
            run_before |= scripts
        yield pytest.param(snippet, id=snippet.name, marks=[pytest.mark.low_priority] if is_low else [])


@pytest.mark.slow
@pytest.mark.parametrize("snippet", list(cases()))
def test_commands_run(snippet: Snippet, workplace: Path, addresses: dict[str, str]) -> None:
    done = []
    for command in filter(is_run_here, snippet.commands):
        if command[:3] == ("python", "-m", "reward_models.server"):
            run_server(command, workplace, addresses)
        elif command[0] == "bash":
            run_shell_script(command, workplace)
        elif (words := laptop_command(command)) not in done:
            # The seeds of a loop are one command here.
            run_script(words, workplace, addresses)
            done.append(words)


COLLECT = """
import json, sys
import pytest

for words in json.loads(sys.argv[1]):
    code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *words])
    if code:
        sys.exit(f"pytest {words}: exit code {code}")
"""


@pytest.mark.slow
@pytest.mark.low_priority
def test_commands_of_pytest_select_tests() -> None:
    commands = {command for snippet in all_snippets() for command in snippet.commands if command[0] == "pytest"}
    assert len(commands) > 5
    arguments = [command[1:] for command in sorted(commands)]
    # In one process, which imports the libraries once.
    run(["python", "-c", COLLECT, json.dumps(arguments)], ROOT)
