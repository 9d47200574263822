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

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.shapes import build_dataset
from alphagrpo_ext.trainer import AlphaGRPOTrainer
from alphagrpo_ext.trainer.callbacks import JsonLinesCallback
from alphagrpo_ext.trainer.checkpoint_folder import (
    DamagedCheckpointError,
    last_checkpoint,
    read_manifest,
    resolve_checkpoint,
)
from alphagrpo_ext.trainer.rollout_buffer import load_rollouts, save_rollouts
from alphagrpo_ext.trajectory import ImageSegment, TextSegment, Trajectory
from trainer.conftest import brightness


MakeTrainer = Callable[..., AlphaGRPOTrainer]

# What two equal runs differ in.
TIMINGS = ("timing/", "judge/latency", "judge/questions_per_second", "step_time", "runtime", "per_second")


def without_timings(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if not any(timing in k for timing in TIMINGS)} for entry in entries]


def weights(trainer: AlphaGRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def assert_same_run(actual: AlphaGRPOTrainer, expected: AlphaGRPOTrainer) -> None:
    for name, value in weights(expected).items():
        assert torch.equal(weights(actual)[name], value), name
    assert without_timings(actual.state.log_history) == without_timings(expected.state.log_history)


class Stopped(Exception):
    pass


@pytest.fixture
def make(make_trainer: MakeTrainer, tmp_path: Path) -> MakeTrainer:
    """A trainer that saves after every step, in a folder of its own."""

    def make(name: str, **settings: Any) -> AlphaGRPOTrainer:
        defaults = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "lr_scheduler_type": "linear"}
        return make_trainer(**(defaults | settings), output_dir=str(tmp_path / name))

    return make


@pytest.mark.invariant
@pytest.mark.parametrize("task", ["reasoning_t2i", "self_reflection"])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="plain"),
        pytest.param({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, id="accumulation"),
        pytest.param({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, id="two rollouts a step"),
        pytest.param({"num_iterations": 2, "steps_per_generation": 2}, id="buffered"),
        pytest.param({"logging_steps": 3, "num_iterations": 3}, id="between logs"),
        pytest.param({"lora": True, "image_beta": 0.1, "max_grad_norm": 0.5}, id="LoRA"),
    ],
)
def test_resumed_run_equals_one_that_was_not_stopped(make: MakeTrainer, task: str, settings: dict[str, Any]) -> None:
    settings = {"task": task, **settings}
    whole = make("whole", **settings)
    whole.train()
    folder = Path(whole.args.output_dir)
    # Each checkpoint in turn: one of them lies in the middle of a buffered rollout.
    for step in (1, 2):
        resumed = make("resumed", **settings)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert_same_run(resumed, whole)


