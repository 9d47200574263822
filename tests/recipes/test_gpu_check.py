# SPDX-License-Identifier: Apache-2.0

"""The check of a GPU, run on a CPU with tiny models; and its parity on a GPU where there is one."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from alphagrpo_ext.models.contract import FAMILIES
from benchmark_parts.flops import counted_flops
from benchmark_parts.tables import ResultTable
from gpu_check_parts import parity
from gpu_check_parts.arguments import IMAGE_SIZES, TINY_SIZES, GPUCheckArguments
from gpu_check_parts.compilation import check_denoising, check_update
from gpu_check_parts.parity import build_tiny, check_parity
from gpu_check_parts.results import PartResult
from gpu_check_parts.speed import build_on_device, size_config, update, update_flops, update_settings
from recipe_tools.memory import prepare_policy
from recipes import gpu_check


def cpu_arguments(folder: Path, **changes: Any) -> GPUCheckArguments:
    settings = {
        # Ways to compute have tests of their own.
        "parts": ["parity", "speed"],
        "device": "cpu",
        "trained_steps": [2],
        "num_samples": 2,
        "prompt_tokens": 4,
        "thought_tokens": 4,
        "lora_rank": 2,
        "repetitions": 1,
        # A busy machine takes longer than a GPU.
        "time_limit": 3600,
        "output_dir": str(folder),
    }
    return GPUCheckArguments(**settings | changes)


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu_check.json").read_text())["parts"]


@pytest.mark.slow
def test_command_runs_and_skips_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = cpu_arguments(tmp_path)
    assert gpu_check.main(args) == 0
    parts = read(tmp_path)
    assert list(parts) == [f"{part} {size}" for part in ("parity", "speed") for size in TINY_SIZES]
    bagel = parts["parity bagel-shapes"]["table"]
    assert [row[0] for row in bagel["rows"][::6]] == ["flex_attention", "sdpa", "eager"]
    for name in TINY_SIZES:
        steps, *measured = parts[f"speed {name}"]["table"]["rows"][0]
        assert steps == 2
        assert all(value == "-" or value > 0 for value in measured)
    page = (tmp_path / "gpu_check.md").read_text()
    assert page.strip() in capsys.readouterr().out

    def run_again(*arguments: Any) -> None:
        raise AssertionError("a finished part is run again")

    monkeypatch.setattr(gpu_check, "run_part", run_again)
    assert gpu_check.main(args) == 0
    assert (tmp_path / "gpu_check.md").read_text() == page
    with pytest.raises(ValueError, match=r"holds results with lora_rank=2, and this check has lora_rank=3"):
        gpu_check.main(cpu_arguments(tmp_path, lora_rank=3))


@pytest.mark.slow
def test_a_bound_that_is_exceeded_fails_and_is_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "TINY_SIZES", ("cosmos3-shapes",))
    args = cpu_arguments(tmp_path, parts=["parity"])
    with monkeypatch.context() as patch:
        patch.setitem(parity.BOUNDS, "velocity", -1.0)
        assert gpu_check.main(args) == 1
    rows = read(tmp_path)["parity cosmos3-shapes"]["table"]["rows"]
    assert {row[2] for row in rows if row[-1] == "FAIL"} == {"velocity"}
    assert "not everything passed" in capsys.readouterr().out
    assert gpu_check.main(args) == 0


def test_an_error_of_a_part_is_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, attention: str) -> None:
        raise RuntimeError(f"{name} does not fit")

    monkeypatch.setattr(parity, "build_tiny", fail)
    assert gpu_check.main(cpu_arguments(tmp_path, parts=["parity"])) == 1
    for name, part in read(tmp_path).items():
        assert not part["passed"]
        assert part["table"]["rows"] == [[f"RuntimeError: {name.split()[1]} does not fit"]]


def test_a_slow_part_is_stopped_and_leaves_the_others_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it knew is kept, and the same command runs it alone, in all of the time."""
    is_slow, started = True, []

    def results(part: str, size: str, *arguments: Any) -> Iterator[PartResult]:
        started.append(size)
        yield PartResult(ResultTable(size, ["step"], [[1]], "Half of it."), passed=True)
        if is_slow and size == "bagel-shapes":
            time.sleep(60)
        yield PartResult(ResultTable(size, ["step"], [[1], [2]]), passed=True)

    monkeypatch.setattr(gpu_check, "part_results", results)
    args = cpu_arguments(tmp_path, parts=["parity"], time_limit=2)
    assert gpu_check.main(args) == 1
    slow, other = read(tmp_path).values()
    assert slow["table"]["rows"] == [[1]] and not slow["passed"]
    assert slow["table"]["note"] == "Not finished: its 1 s were over. Half of it."
    assert other["table"]["rows"] == [[1], [2]] and other["passed"]
    assert "parity bagel-shapes: 1 s at most" in capsys.readouterr().err
    is_slow = False
    assert gpu_check.main(args) == 0
    assert started == ["bagel-shapes", "cosmos3-shapes", "bagel-shapes"]
    assert all(part["passed"] for part in read(tmp_path).values())
    assert "parity bagel-shapes: 2 s at most" in capsys.readouterr().err


def installed_closure(names: list[str]) -> list[Any]:
    """Distributions of these names, and all that they require, as far as they are installed."""
    found, waiting = {}, [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        key = (re.sub(r"[-_.]+", "-", requirement.name).lower(), frozenset(requirement.extras))
        try:
            found[key], is_new = distribution(requirement.name), key not in found
        except PackageNotFoundError:
            continue
        for line in found[key].requires or () if is_new else ():
            needed = Requirement(line)
            extras = [{"extra": extra} for extra in requirement.extras or ("",)]
            if needed.marker is None or any(map(needed.marker.evaluate, extras)):
                waiting.append(needed)
    return list(found.values())


@pytest.mark.slow
def test_the_listed_wheels_are_enough(tmp_path: Path) -> None:
    """The check runs where nothing else can be imported."""
    listed = re.search(r"needs the wheels of (.*), which are those of this package", gpu_check.__doc__, re.DOTALL)[1]
    names = re.split(r",\s+|\s+and\s+", listed)
    project = (Path(gpu_check.__file__).parents[1] / "pyproject.toml").read_text()
    dependencies = re.search(r"\ndependencies = \[(.*?)\]", project, re.DOTALL)[1]
    assert sorted([*names, "torch"]) == sorted(re.findall(r'"([a-z_]+)', dependencies))
    site = tmp_path / "site"
    site.mkdir()
    for wheel in installed_closure([*names, "torch"]):
        for top in {file.parts[0] for file in wheel.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(wheel.locate_file(top))
    script = Path(gpu_check.__file__)
    flags = "--device cpu --sizes cosmos3-shapes --trained_steps 2 --num_samples 2 --prompt_tokens 4 --thought_tokens 4 --lora_rank 2"
    command = [
        sys.executable,
        "-S",
        str(script),
        *flags.split(),
        "--repetitions",
        "1",
        "--compile_backend",
        "eager",
        "--time_limit",
        "3600",
    ]
    run = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parents[1]), str(site)])},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    assert len(read(tmp_path / "out")) == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY_SIZES)
def test_operations_are_those_that_run(tmp_path: Path, name: str) -> None:
    """Counted without contents, they are as many as a CPU runs."""
    settings = update_settings(name, 2, "eager", cpu_arguments(tmp_path))
    model, _ = build_tiny(name, "eager")
    policy = prepare_policy(model, settings)
    assert update_flops(model.config, settings) == counted_flops(lambda: update(model, policy, settings))


@pytest.mark.parametrize("name", [name for name in IMAGE_SIZES if name not in TINY_SIZES])
def test_large_sizes_exist_and_are_built_on_the_device(name: str) -> None:
    model = build_on_device(size_config(name), "sdpa", "meta")
    family = FAMILIES.get(model.config.model_type)()
    side = IMAGE_SIZES[name]
    assert model.latent_grid(side, side)
    for parameter_name, parameter in model.named_parameters():
        assert parameter.device.type == "meta"
        assert parameter.dtype == (torch.float32 if family.keeps_fp32(parameter_name) else torch.bfloat16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": ["training"]}, "parts: unknown training; available: parity, speed, denoising, update"),
        ({"sizes": ["7b"]}, "sizes: unknown 7b"),
        ({"device": "cpu", "sizes": ["BAGEL-7B-MoT"]}, "BAGEL-7B-MoT is too large for a CPU"),
        ({"trained_steps": [5, 16]}, "trained_steps must be at most 15, the steps of an image, but has 16"),
        ({"trained_steps": [0]}, "trained_steps"),
        ({"num_samples": 1}, "num_samples must be at least 2, but is 1"),
    ],
)
def test_wrong_arguments_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPUCheckArguments(**settings)


@pytest.mark.parametrize(
    ("device", "message"), [("xpu:7", "finds no xpu:7"), ("gpu", "'gpu' is no device of PyTorch")]
)
def test_a_device_that_is_missing_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: str, message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", device])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(gpu_check.__file__, run_name="__main__")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpu_check.py: error: device: ") and message in line


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", TINY_SIZES)
def test_parity_on_a_gpu(name: str) -> None:
    *_, result = check_parity(name, torch.device("cuda"))
    assert result.passed, str(result.table)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("check", [check_denoising, check_update])
@pytest.mark.parametrize("name", TINY_SIZES)
def test_ways_to_compute_agree_on_a_gpu(tmp_path: Path, name: str, check: Any) -> None:
    args = cpu_arguments(tmp_path, device="cuda", sizes=[name])
    *_, result = check(name, torch.device("cuda"), args)
    verdicts = {row[0]: row[-1] for row in result.table.rows}
    assert not any(verdict.startswith("differs") for verdict in verdicts.values()), str(result.table)
    if name == "bagel-shapes" and check is check_denoising:
        assert not verdicts["CUDA graph"].startswith("cannot run"), str(result.table)
