# SPDX-License-Identifier: Apache-2.0

"""The check of a GPU, run on a CPU with tiny models; and its parity on a GPU where there is one."""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from alphagrpo_ext.models.contract import FAMILIES
from benchmark_parts.flops import counted_flops
from gpu_check_parts import parity
from gpu_check_parts.arguments import IMAGE_SIZES, TINY_SIZES, GPUCheckArguments
from gpu_check_parts.parity import build_tiny, check_parity
from gpu_check_parts.speed import build_on_device, size_config, update, update_flops, update_settings
from recipe_tools.memory import prepare_policy
from recipes import gpu_check


def cpu_arguments(folder: Path, **changes: Any) -> GPUCheckArguments:
    settings = {
        "device": "cpu",
        "trained_steps": [2],
        "num_samples": 2,
        "prompt_tokens": 4,
        "thought_tokens": 4,
        "lora_rank": 2,
        "repetitions": 1,
        "output_dir": str(folder),
    }
    return GPUCheckArguments(**settings | changes)


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu_check.json").read_text())["parts"]


def test_command_runs_and_skips_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = cpu_arguments(tmp_path)
    assert gpu_check.main(args) == 0
    parts = read(tmp_path)
    assert list(parts) == [f"{part} {size}" for part in ("parity", "speed") for size in TINY_SIZES]
    bagel = parts["parity bagel-shapes"]["table"]
    assert [row[0] for row in bagel["rows"][::5]] == ["flex_attention", "sdpa", "eager"]
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
        assert part["table"]["rows"] == [["RuntimeError", f"{name.split()[1]} does not fit"]]


def test_the_check_stops_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "run_part", lambda *arguments: time.sleep(60))
    assert gpu_check.main(cpu_arguments(tmp_path, time_limit=1)) == 1
    assert "the time is over" in capsys.readouterr().out
    assert not (tmp_path / "gpu_check.json").exists()


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
        ({"parts": ["training"]}, "parts: unknown training; available: parity, speed"),
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
@pytest.mark.parametrize("name", TINY_SIZES)
def test_parity_on_a_gpu(name: str) -> None:
    result = check_parity(name, torch.device("cuda"))
    assert result.passed, str(result.table)
