# SPDX-License-Identifier: Apache-2.0

"""Two processes train Cosmos3 as one does, with sharded parameters."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alphagrpo_ext.models.saving import save_model
from models.cosmos3.test_conformance import make_case
from trainer.test_distributed import TASKS, TRAIN, run


SETTINGS = {"image_height": 32, "image_width": 64, "cfg_text_scale": 2.0, "max_steps": 2, "learning_rate": 0.05}


def train(backend: str | None, base: Path, folder: Path) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
    """Weights after two steps of eight trajectories, some of which look at images, and the texts that were sampled."""
    folder.mkdir()
    settings = SETTINGS | TASKS["mixed"] | {"per_device_train_batch_size": 8 if backend is None else 4}
    settings |= {"ddp_backend": "gloo"} if backend == "zero3" else {}
    run(backend, TRAIN, base, folder, json.dumps(settings))
    outcome = json.loads((folder / "outcome.json").read_text())
    return load_file(folder / "model" / "model.safetensors"), [text for *_, text in outcome["rollouts"]]


@pytest.mark.slow
@pytest.mark.low_priority
@pytest.mark.parametrize(("variant", "backend"), [("omni", "fsdp2"), ("edge", "zero3")])
def test_two_processes_train_as_one(variant: str, backend: str, tmp_path: Path) -> None:
    case = make_case(variant)
    save_model(case.model, case.processor, tmp_path / "base")
    alone, texts = train(None, tmp_path / "base", tmp_path / "alone")
    together, same_texts = train(backend, tmp_path / "base", tmp_path / "together")
    assert texts == same_texts
    before = case.model.state_dict()
    assert max((alone[name] - before[name]).abs().max() for name in alone) > 1e-3
    for name, weight in together.items():
        torch.testing.assert_close(weight, alone[name], atol=1e-6, rtol=1e-4)
