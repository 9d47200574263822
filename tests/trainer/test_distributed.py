# Copyright 2026 The AlphaGRPO-Ext Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor


ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "train_one_step.py"
# `--num_processes` alone starts one process on a CPU.
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def run(launch: list[str], model: Path, output: Path, batch_size: int, task: str) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, str(SCRIPT), str(model), str(output), str(batch_size), task]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return torch.load(output, weights_only=True)


@pytest.mark.slow
@pytest.mark.invariant
@pytest.mark.parametrize("task", ["reasoning_t2i", "self_reflection"])
def test_two_processes_update_as_one(
    make_shapes_bagel: Callable[[], BagelModel], shapes_processor: BagelProcessor, tmp_path: Path, task: str
) -> None:
    base = tmp_path / "base"
    make_shapes_bagel().save_pretrained(base)
    shapes_processor.save_pretrained(base)
    one = run([], base, tmp_path / "one.pt", batch_size=8, task=task)
    two = run(LAUNCH, base, tmp_path / "two.pt", batch_size=4, task=task)
    assert (one["num_processes"], two["num_processes"]) == (1, 2)

    assert len(two["rollouts"]) == 8
    assert len({start for _, start, _ in two["rollouts"]}) == 1
    for (reward, start, text), expected in zip(two["rollouts"], one["rollouts"], strict=True):
        assert (start, text) == expected[1:]
        assert reward == pytest.approx(expected[0], abs=1e-3)

    before = load_file(base / "model.safetensors")
    updates = {name: (one["weights"][name] - weight, two["weights"][name] - weight) for name, weight in before.items()}
    moved = [name for name, (expected, _) in updates.items() if expected.any()]
    assert len(moved) > 50
    for name in moved:
        expected, actual = updates[name]
        error = (actual - expected).norm() / expected.norm()
        assert error < 1e-3, f"{name}: {error}"
