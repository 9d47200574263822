# SPDX-License-Identifier: Apache-2.0

"""The estimate of memory against what processes took, and against counts that can be done by hand."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from alphagrpo_ext.models import work
from alphagrpo_ext.models.bagel import BagelConfig
from alphagrpo_ext.models.cosmos3 import Cosmos3Config
from alphagrpo_ext.shapes.model import build_config, build_processor
from models.cosmos3.tiny_cosmos3 import tiny_config as tiny_cosmos3
from recipe_tools.memory import LiveBytes, MemoryEstimate, estimate_memory
from recipe_tools.memory_settings import MemorySettings


TINY = MemorySettings(
    lora_rank=8,
    batch_size=32,
    prompt_tokens=20,
    thought_tokens=40,
    height=24,
    width=24,
    sde_window_size=3,
    image_steps_per_forward="all",
    attn_implementation="sdpa",
    dtype="float32",
    autocast=False,
)
FULL = replace(TINY, lora_rank=0)


def tiny_config(num_layers: int | None = None) -> BagelConfig:
    """The packaged model's configuration, with fewer layers if a number is given."""
    config = build_config(build_processor().tokenizer)
    if num_layers is None:
        return config
    changes = {"num_hidden_layers": num_layers, "layer_types": None}
    return BagelConfig.from_dict(config.to_dict() | {"text_config": config.to_dict()["text_config"] | changes})


def mid_size_config() -> BagelConfig:
    """About 100 million parameters, of images of 8 x 8 tokens."""
    config = tiny_config().to_dict()
    config["text_config"] |= {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "layer_types": None,
    }
    return BagelConfig.from_dict(config | {"max_latent_size": 8})


COSMOS3 = replace(TINY, height=256, width=256, sde_window_size=5, batch_size=4)


def mid_size_cosmos3(variant: str) -> Cosmos3Config:
    """About 100 million parameters. An image of 256 pixels is 8 x 8 tokens."""
    tiny = tiny_cosmos3(variant)
    sizes = {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "rope_axes_dim": [12, 10, 10],
    }
    vision = tiny.vision_config | ({"out_hidden_size": 512} if variant == "omni" else {})
    return tiny_cosmos3(variant, transformer_config=tiny.transformer_config | sizes, vision_config=vision)


def measure(config: PreTrainedConfig, settings: MemorySettings) -> int:
    """Peak of a process, in bytes, that trains for two optimizer steps."""
    script = Path(__file__).parents[1] / "support" / "measure_update.py"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        # What is freed goes back to the system, so that the peak is that of what is alive.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
    arguments = [json.dumps(config.to_dict()), json.dumps(vars(settings))]
    result = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.low_priority
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(FULL, id="full"),
        pytest.param(replace(FULL, gradient_checkpointing=False, sde_window_size=5, num_branches=1), id="kept"),
    ],
)
def test_estimate_of_the_tiny_model(settings: MemorySettings) -> None:
    estimate = estimate_memory(tiny_config(), settings)
    assert estimate.total == pytest.approx(measure(tiny_config(), settings), rel=0.25)


@pytest.mark.slow
@pytest.mark.low_priority
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"lora_rank": 0}, id="full"),
        pytest.param({"lora_rank": 0, "gradient_checkpointing": False}, id="full, kept"),
        pytest.param({"lora_rank": 32}, id="LoRA"),
        pytest.param({"lora_rank": 32, "gradient_checkpointing": False, "dtype": "bfloat16"}, id="LoRA, kept, bf16"),
    ],
)
def test_estimate_of_a_model_of_100_million_parameters(settings: dict) -> None:
    settings = replace(TINY, height=32, width=32, batch_size=8, sde_window_size=5, **settings)
    estimate = estimate_memory(mid_size_config(), settings)
    assert estimate.total == pytest.approx(measure(mid_size_config(), settings), rel=0.25)


@pytest.mark.slow
@pytest.mark.low_priority
@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        pytest.param("omni", {"lora_rank": 32}, id="Nano's form, LoRA"),
        pytest.param("edge", {"lora_rank": 0, "attn_implementation": "eager"}, id="Edge's form, full, eager"),
        pytest.param(
            "omni",
            {
                "lora_rank": 0,
                "gradient_checkpointing": False,
                "context_images": 1,
                "batch_size": 2,
                "sde_window_size": 2,
            },
            id="full, kept, with an image",
        ),
    ],
)
def test_estimate_of_a_cosmos3_of_100_million_parameters(variant: str, settings: dict) -> None:
    settings = replace(COSMOS3, **settings)
    estimate = estimate_memory(mid_size_cosmos3(variant), settings)
    assert estimate.total == pytest.approx(measure(mid_size_cosmos3(variant), settings), rel=0.25)


@pytest.mark.slow
def test_counts() -> None:
    config = tiny_config()
    lora = estimate_memory(config, TINY)
    # Of both experts and 6 layers, a rank of 8: q, k, v, o, gate, up and down.
    adapter = 2 * 6 * 8 * (4 * (128 + 128) + 3 * (128 + 256))
    assert lora.gradients == 4 * adapter
    assert lora.optimizer == 8 * adapter
    assert (lora.reference, lora.gathered) == (0, 0)
    full = estimate_memory(config, replace(FULL, with_reference=True))
    assert lora.weights == full.weights + 4 * adapter
    assert full.reference == full.weights
    assert full.gradients < full.weights
    assert full.optimizer == 2 * full.gradients
    half = estimate_memory(config, replace(FULL, num_shards=2))
    assert half.weights == full.weights // 2
    assert half.optimizer == full.optimizer // 2
    assert half.activations == full.activations
    assert 0 < half.gathered < half.weights
    # Masters in fp32 of what is computed in bf16.
    masters = estimate_memory(config, replace(FULL, num_shards=2, dtype="bfloat16", autocast=True))
    assert (masters.gradients, masters.optimizer) == (half.gradients, half.optimizer)
    assert masters.weights == pytest.approx(half.weights, rel=0.1)
    # The autoencoder stays fp32.
    assert masters.gathered < 0.65 * half.gathered
    generation = estimate_memory(config, replace(TINY, lora_targets="generation"))
    assert generation.gradients == lora.gradients // 2


@pytest.mark.slow
def test_what_saves_memory_and_what_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(num_layers=3)

    def activations(**changes: object) -> int:
        return estimate_memory(config, replace(TINY, **changes)).activations

    base = activations()
    assert activations(gradient_checkpointing=False) > 2 * base
    assert activations(image_steps_per_forward=1) < 0.8 * base
    assert activations(image_steps_per_forward=3) == base
    # A step has 2,304 noised tokens, of 32 images in two branches, but little work for each.
    assert activations(image_steps_per_forward="auto") == base
    with monkeypatch.context() as patch:
        patch.setattr(work, "MIN_FORWARD_WORK", 0)
        assert activations(image_steps_per_forward="auto") == activations(image_steps_per_forward=1)
    assert activations(attn_implementation="flex_attention") < base < activations(attn_implementation="eager")
    assert activations(sde_window_size=6) > 1.3 * base
    assert activations(batch_size=64) == pytest.approx(2 * base, rel=0.1)
    assert activations(num_branches=1) < base < activations(num_branches=3, context_images=1)
    assert activations(autocast=True) < base


@pytest.mark.parametrize("variant", [pytest.param("omni", marks=pytest.mark.slow), "edge"])
def test_cosmos3_takes_memory_where_bagel_does(variant: str) -> None:
    config = tiny_cosmos3(variant)
    settings = replace(COSMOS3, sde_window_size=2)

    def estimate(**changes: object) -> MemoryEstimate:
        return estimate_memory(config, replace(settings, **changes))

    base = estimate()
    # Of both streams and 3 layers, a rank of 8: q, k, v, out, and what the MLP has.
    mlps = 3 if variant == "omni" else 2
    assert base.gradients == 4 * 2 * 3 * 8 * (2 * (64 + 64) + 2 * (64 + 32) + mlps * (64 + 96))
    assert base.optimizer == 2 * base.gradients
    assert estimate(num_branches=1).activations < base.activations
    assert estimate(image_steps_per_forward=1).activations < base.activations
    assert estimate(attn_implementation="eager").activations > base.activations
    # The image stands beside every noised copy.
    assert estimate(context_images=1).activations > 1.2 * base.activations


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        pytest.param(
            tiny_cosmos3("edge"),
            {"attn_implementation": "flex_attention"},
            "attn_implementation must be one of sdpa, eager for a Cosmos3Model, but is 'flex_attention'",
            id="attention",
        ),
        pytest.param(
            tiny_cosmos3("omni"),
            {"num_branches": 3},
            "num_branches must be at most 2 for a Cosmos3Model, whose branches are full, negative, but is 3",
            id="branches",
        ),
        pytest.param(
            tiny_cosmos3("omni"),
            {"height": 250},
            "height=250 is no positive multiple of the model's 32 pixels",
            id="stride",
        ),
        pytest.param(
            tiny_config(),
            {"width": 26},
            "width=26 is no positive multiple of the model's 4 pixels",
            id="BAGEL's stride",
        ),
        pytest.param(
            tiny_cosmos3("omni", vision=False), {"context_images": 1}, "no vision tower", id="without a vision tower"
        ),
    ],
)
def test_what_the_model_cannot_do_is_refused(config: PreTrainedConfig, changes: dict, message: str) -> None:
    size = {"height": 64, "width": 64} if config.model_type == "cosmos3" else {}
    with pytest.raises(ValueError, match=message):
        estimate_memory(config, replace(TINY, batch_size=1, **size | changes))


def test_only_what_is_alive_counts() -> None:
    known = torch.zeros(1000)
    with LiveBytes([known], ignored_sizes=[12]) as tracker:
        doubled = known * 2
        assert tracker.live == 4000
        view = doubled[:10].t()
        assert tracker.live == 4000
        known.add_(1)
        torch.zeros(3)
        assert tracker.live == 4000
        tripled = known * 3
        del doubled
        assert tracker.live == 8000
        del view
        assert tracker.live == 4000
        del tripled
    assert (tracker.live, tracker.peak) == (0, 8000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": -1}, "lora_rank must not be negative, but is -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, but is 0"),
        ({"num_branches": 4}, r"num_branches must be in \[1, 3\], but is 4"),
        ({"attn_implementation": "flash"}, "attn_implementation must be one of flex_attention"),
        ({"lora_targets": "all"}, "lora_targets must be one of both"),
        ({"image_steps_per_forward": 0}, "image_steps_per_forward must be 'auto', 'all' or a whole number"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, but is 'int8'"),
    ],
)
def test_impossible_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)
