# SPDX-License-Identifier: Apache-2.0

import copy
import json
import os
from pathlib import Path

import pytest
import torch

from alphagrpo_ext.models.cosmos3 import Cosmos3Processor
from alphagrpo_ext.models.fingerprint import (
    checkpoint_fingerprint,
    model_label,
    processor_settings,
    weights_digest,
)
from alphagrpo_ext.models.loading import load_model, load_processor
from alphagrpo_ext.models.saving import save_model
from models.cosmos3.tiny_cosmos3 import make_tiny_tokenizer


def write_adapter(folder: Path) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "bagel-shapes"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def test_adapter_is_told_from_one_in_its_place_and_from_its_base(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter")
    before, base = checkpoint_fingerprint(folder), checkpoint_fingerprint("bagel-shapes")
    assert before == checkpoint_fingerprint(folder)
    assert before[-len(base) :] == base and len(before) == len(base) + 2
    (folder / "notes.txt").touch()
    assert checkpoint_fingerprint(folder) == before
    os.utime(folder / "adapter_model.safetensors", ns=(0, 0))
    assert checkpoint_fingerprint(folder) != before


def test_labels_are_names_of_folders_and_tell_models_apart() -> None:
    assert model_label("bagel-shapes") == "bagel-shapes"
    names = ["runs/a", "runs-a", "runs/a/", "./runs/a", "../runs/a", "ByteDance-Seed/BAGEL-7B-MoT", ".."]
    labels = {model_label(name) for name in names}
    assert len(labels) == len(names)
    assert all("/" not in label and not label.startswith(".") for label in labels)


def test_digest_of_weights_tells_frozen_models_apart_wherever_they_came_from(tmp_path: Path) -> None:
    model, processor = load_model("bagel-shapes")
    save_model(model, processor, tmp_path / "moved")
    again = load_model(tmp_path / "moved")[0].requires_grad_(False)
    assert weights_digest(again) == weights_digest(model.requires_grad_(False))
    with torch.no_grad():
        again.get_input_embeddings().weight.add_(1e-3)
    assert weights_digest(again) != weights_digest(model)
    # What is trained changes.
    again.get_input_embeddings().requires_grad_(True)
    model.get_input_embeddings().requires_grad_(True)
    assert weights_digest(again) == weights_digest(model)


def test_digest_leaves_out_values_that_are_offloaded() -> None:
    here, away = (
        torch.nn.Linear(2, 2).requires_grad_(False),
        torch.nn.Linear(2, 2, device="meta").requires_grad_(False),
    )
    assert weights_digest(away) == weights_digest(copy.deepcopy(away)) != weights_digest(here)


@pytest.mark.parametrize("family", ["bagel", "cosmos3"])
def test_a_processor_has_the_settings_that_it_was_saved_with(family: str, tmp_path: Path) -> None:
    processor = load_processor("bagel-shapes") if family == "bagel" else Cosmos3Processor(make_tiny_tokenizer("omni"))
    settings = processor_settings(processor)
    assert {"reflection_prompt", "verdict_request", "chat_template", "vocabulary"} <= settings.keys()
    processor.save_pretrained(tmp_path)
    assert processor_settings(type(processor).from_pretrained(tmp_path)) == settings
    for name, change in {
        "chat_template": lambda changed: setattr(changed.tokenizer, "chat_template", "{{ messages }}"),
        "vocabulary": lambda changed: changed.tokenizer.add_tokens(["purple"]),
        "reflection_prompt": lambda changed: setattr(changed, "reflection_prompt", "again"),
    }.items():
        changed = copy.deepcopy(processor)
        change(changed)
        now = processor_settings(changed)
        assert [key for key in settings if settings[key] != now[key]] == [name]
