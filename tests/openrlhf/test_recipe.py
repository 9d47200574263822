# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path

import pytest
from datasets import load_dataset

from alphagrpo_ext.reward_client.client import parse_label
from reward_models.prompts.questions import from_row


ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "openrlhf_prompts.py"
SCRIPT = ROOT / "recipes" / "openrlhf_reflection.sh"


def convert(output: Path, *arguments: str, succeed: bool = True) -> str:
    command = [sys.executable, str(RECIPE), "--output_dir", str(output.parent), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode == 0) == succeed, result.stderr
    return result.stdout if succeed else result.stderr


def test_shapes_prompts_become_a_dataset_that_the_plug_in_reads(tmp_path: Path) -> None:
    output = tmp_path / "new" / "prompts.jsonl"
    convert(output, "--num_prompts", "9")
    # As OpenRLHF loads it.
    rows = load_dataset("json", data_files=str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 9 and rows.column_names == ["prompt", "label"]
    for row in rows:
        label = parse_label(row["label"])
        assert from_row(vars(label)).valid_semantic_questions
        assert row["prompt"].startswith(f"Plan an image for this request: {label.prompt}\n")
    assert list(output.parent.iterdir()) == [output]


QUESTION = {"question": "Is there a cat?", "tag": "Existence"}


def write_record(path: Path, prompt: str) -> str:
    record = {"prompt": prompt, "semantic_questions": [QUESTION], "quality_questions": []}
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return str(path)


def test_prompts_of_a_file_with_a_system_message(tmp_path: Path) -> None:
    file, output = write_record(tmp_path / "questions.jsonl", "a {cat} — 猫"), tmp_path / "prompts.jsonl"
    convert(output, "--prompt_file", file, "--system_prompt", "You plan.", "--template", r"Plan:\n{prompt}")
    (line,) = output.read_text(encoding="utf-8").splitlines()
    row = json.loads(line)
    assert row["prompt"] == [
        {"role": "system", "content": "You plan."},
        {"role": "user", "content": "Plan:\na {cat} — 猫"},
    ]
    label = parse_label(row["label"])
    assert label.prompt == "a {cat} — 猫"
    assert [question["question"] for question in label.semantic_questions] == [QUESTION["question"]]


def test_prompt_that_the_host_would_misread_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    file, output = write_record(tmp_path / "questions.jsonl", "an <image> tag"), tmp_path / "prompts.jsonl"
    error = convert(output, "--prompt_file", file, succeed=False)
    assert f"{file}, row 0: the prompt contains <image>" in error
    assert not output.exists()


def openrlhf_parser() -> argparse.ArgumentParser:
    """OpenRLHF's own parser, cut out of its command line, which imports vLLM and DeepSpeed before it."""
    # Not the package itself: without it, its name would be taken for the folder of this file.
    source = Path(pytest.importorskip("openrlhf.utils").__file__).parents[1] / "cli" / "train_ppo_ray.py"
    text = source.read_text(encoding="utf-8")
    body = text[text.index("    parser = argparse.ArgumentParser()") : text.index("    args = parser.parse_args()")]
    names: dict = {}
    exec("import argparse\nfrom datetime import datetime\n" + textwrap.dedent(body), names)
    return names["parser"]


@pytest.fixture
def fake_python(tmp_path: Path) -> Path:
    """A Python that runs everything but OpenRLHF and the reward server, whose commands it writes down."""
    script = tmp_path / "python"
    script.write_text(
        f"""#!/usr/bin/env bash
set -eu
case "$1 ${{2:-}}" in
    "-m openrlhf.cli.train_ppo_ray") printf '%s\\n' "$ALPHAGRPO_SERVER_URL" "${{@:3}}" > {tmp_path}/trainer ;;
    "-m reward_models.server")
        printf '%s\\n' "${{@:3}}" > {tmp_path}/server
        exec {shlex.quote(sys.executable)} -c "
import http.server, sys
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Health).serve_forever()
" "${{@: -1}}" ;;
    *) exec {shlex.quote(sys.executable)} "$@" ;;
esac
"""
    )
    script.chmod(0o755)
    return script


def run_script(fake_python: Path, output: Path, *flags: str, **settings: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ALPHAGRPO_")}
    environment |= {"PYTHON": str(fake_python), "OUTPUT_DIR": str(output), "OMP_NUM_THREADS": "1", **settings}
    result = subprocess.run(
        ["bash", str(SCRIPT), *flags], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_flags_of_the_script_are_openrlhfs_own(fake_python: Path, tmp_path: Path) -> None:
    parser = openrlhf_parser()
    run_script(
        fake_python,
        tmp_path / "run",
        "--train.seed",
        "7",
        "--vllm.gpu_memory_utilization",
        "0.5",
        ALPHAGRPO_SERVER_URL="http://rewards:1",
        ALPHAGRPO_NUM_REFLECTION_ROUNDS="2",
        GROUP_SIZE="4",
        PROMPTS_PER_STEP="8",
    )
    url, *flags = (tmp_path / "trainer").read_text().splitlines()
    args = vars(parser.parse_args(flags))
    assert url == "http://rewards:1" and not (tmp_path / "server").exists()
    assert args["train.seed"] == 7 and args["vllm.gpu_memory_utilization"] == 0.5
    assert args["train.batch_size"] == 32 and args["data.max_images_per_prompt"] == 2
    assert (ROOT / args["train.agent_func_path"]).is_file()
    rows = Path(args["data.prompt_dataset"]).read_text(encoding="utf-8").splitlines()
    assert {args["data.input_key"], args["data.label_key"]} == set(json.loads(rows[0]))
    # What OpenRLHF demands of a vision-language model, of groups and of shared GPUs.
    assert not args["ds.packing_samples"] and args["algo.advantage.estimator"] != "gae"
    assert args["actor.num_gpus_per_node"] == args["vllm.num_engines"] * args["vllm.tensor_parallel_size"]


@pytest.mark.slow
def test_script_starts_a_server_and_ends_it(fake_python: Path, tmp_path: Path, free_port: int) -> None:
    run_script(
        fake_python, tmp_path / "run", SERVER_PORT=str(free_port), ALPHAGRPO_POLICY_SEES_IMAGES="false", NUM_GPUS="2"
    )
    url, *flags = (tmp_path / "trainer").read_text().splitlines()
    assert url == f"http://127.0.0.1:{free_port}"
    expected = ["--judge", "shapes", "--painter", "policy", "--port", str(free_port)]
    assert (tmp_path / "server").read_text().split() == expected
    assert "--data.max_images_per_prompt" not in flags
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{url}/health", timeout=5)
