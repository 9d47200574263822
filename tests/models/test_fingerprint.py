# SPDX-License-Identifier: Apache-2.0


import json
import os
from pathlib import Path

from alphagrpo_ext.models.fingerprint import checkpoint_fingerprint, model_label


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
