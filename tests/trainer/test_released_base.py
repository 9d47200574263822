# SPDX-License-Identifier: Apache-2.0

"""Training of an adapter on a base in BAGEL's released layout, given by its folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file

from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.trainer import AlphaGRPOConfig, AlphaGRPOTrainer


@pytest.fixture
def trainer(make_trainer: Callable[..., AlphaGRPOTrainer], golden) -> AlphaGRPOTrainer:
    return make_trainer(
        model=str(golden.checkpoint),
        lora=True,
        image_height=32,
        image_width=32,
        model_init_kwargs={"dtype": "bfloat16"},
        freeze_vision_tower=True,
    )


def test_adapter_of_a_released_base_trains_and_loads(trainer: AlphaGRPOTrainer, tmp_path: Path, golden) -> None:
    digest = (golden.checkpoint / "ema.safetensors").read_bytes()
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    model, processor = load_model(tmp_path / "adapter", dtype="bfloat16")
    assert isinstance(model, PeftModel)
    assert processor.generation_system_prompt == trainer.processing_class.generation_system_prompt
    loaded = dict(model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(loaded[name], parameter), name
        if ".lora_B" in name:
            assert parameter.dtype == torch.float32
            assert not torch.equal(parameter, before[name]), name
        elif ".lora_" not in name:
            assert torch.equal(parameter, before[name]), name
    # The weights are mapped from this file.
    assert (golden.checkpoint / "ema.safetensors").read_bytes() == digest


def test_processor_of_a_released_base_is_found(golden, tmp_path: Path) -> None:
    model, processor = load_model(str(golden.checkpoint))
    settings = {"image_height": 32, "image_width": 32, "bf16": False, "use_cpu": True, "report_to": "none"}
    trainer = AlphaGRPOTrainer(
        model=model,
        reward_funcs=lambda prompts, **kwargs: [0.0] * len(prompts),
        args=AlphaGRPOConfig(str(tmp_path), **settings),
        train_dataset=Dataset.from_list([{"prompt": "a red circle"}] * 14),
    )
    assert type(trainer.processing_class) is type(processor)
    assert trainer.processing_class.generation_system_prompt == processor.generation_system_prompt
