# SPDX-License-Identifier: Apache-2.0

"""
Peak of memory while a checkpoint of more than 2 GB is loaded.

Measured in a process of its own: the growth of `VmHWM`, the largest resident set, over the resident set before loading.
That counts everything, also pages of the mapped file, which the kernel could drop and which processes share. Every weight
is read before the peak is taken, so that a map is not counted as empty.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from alphagrpo_ext.models.bagel import BagelModel
from alphagrpo_ext.models.bagel.checkpoint import MODEL_WEIGHTS, config_from_released, released_tensors
from alphagrpo_ext.models.weight_files import read_shapes, write_tensors


logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
MIN_BYTES = 2 * 2**30
SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 2}

LOAD = """
import contextlib, json, sys
from pathlib import Path
from alphagrpo_ext.models.loading import load_model

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

folder, warm_up, dtype = sys.argv[1:]
load_model(warm_up, dtype=dtype)
with contextlib.suppress(OSError):
    Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
model, _ = load_model(folder, dtype=dtype)
loaded = resident("VmHWM") - before
total = sum(float(parameter.sum()) for parameter in model.parameters())
assert total == total
result = {
    "loaded": loaded,
    "peak": resident("VmHWM") - before,
    "resident": resident("VmRSS") - before,
    "mapped": resident("RssFile"),
    "model": sum(parameter.nbytes for parameter in model.parameters()),
    "dtype": str(model.dtype),
}
print(json.dumps(result))
"""


@dataclass
class Checkpoint:
    folder: Path
    num_bytes: int


@pytest.fixture
def make_checkpoint(golden, tmp_path) -> Iterator:
    """Writes a released checkpoint of at least [`MIN_BYTES`] in a type, every byte of it on the disk."""
    folder = tmp_path / "checkpoint"

    def make(dtype: torch.dtype) -> Checkpoint:
        shutil.copytree(golden.checkpoint, folder)
        settings = json.loads((folder / "llm_config.json").read_text()) | SIZES
        settings["num_hidden_layers"] = 9 if dtype == torch.bfloat16 else 5
        (folder / "llm_config.json").write_text(json.dumps(settings))
        small = read_shapes(folder / MODEL_WEIGHTS)
        tables = {
            name: (*small[name][:-1], SIZES["hidden_size"]) for name in small if name.endswith("pos_embed.pos_embed")
        }
        shapes = {"vae2llm.weight": (SIZES["hidden_size"], small["vae2llm.weight"][1]), **tables}
        config = config_from_released(folder, shapes, read_shapes(folder / "ae.safetensors"))
        with torch.device("meta"):
            tensors = released_tensors(BagelModel(config)).values()
        # Rows that are all the same take memory when they are written, one tensor at a time.
        weights = {
            t.name: torch.randn(t.shape[-1]).to(dtype).expand(t.shape) for t in tensors if t.file == MODEL_WEIGHTS
        }
        write_tensors(folder / MODEL_WEIGHTS, weights)
        status = (folder / MODEL_WEIGHTS).stat()
        assert status.st_blocks * 512 >= status.st_size >= MIN_BYTES
        return Checkpoint(folder, sum(path.stat().st_size for path in folder.glob("*.safetensors")))

    yield make
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.low_priority
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_peak_of_loading_in_bf16(make_checkpoint, golden, stored: torch.dtype) -> None:
    checkpoint = make_checkpoint(stored)
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(checkpoint.folder), str(golden.checkpoint), "bfloat16"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout) | {"checkpoint": checkpoint.num_bytes}
    logger.info("stored in %s: %s", stored, measured)
    assert measured["dtype"] == "torch.bfloat16"
    assert measured["peak"] <= 1.15 * checkpoint.num_bytes
    if stored == torch.float32:
        # Half of the checkpoint stays, and beside it no more than what is mapped at once.
        assert measured["model"] < 0.51 * checkpoint.num_bytes
        assert measured["peak"] <= 1.15 * measured["model"] + 256 * 2**20
