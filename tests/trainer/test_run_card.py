# SPDX-License-Identifier: Apache-2.0

"""The cards that a trainer writes, without and with an adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from alphagrpo_ext.trainer import AlphaGRPOTrainer
from reward_models import DVReward


@pytest.mark.parametrize("lora", [False, True])
def test_every_saved_folder_says_how_to_load_it(
    make_trainer: Callable[..., AlphaGRPOTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {"output_dir": "runs/x", "save_strategy": "steps", "save_steps": 1, "lora": lora}
    trainer = make_trainer(model="bagel-shapes", reward_funcs=DVReward("shapes"), **settings)
    trainer.train()
    trainer.save_model()
    trainer.save_model("elsewhere")
    for folder in (Path("runs/x"), Path("runs/x/checkpoint-1"), Path("elsewhere")):
        card = ModelCard.load(folder / "README.md")
        assert f'alphagrpo_ext.pipeline("{folder}")' in card.content
        assert f'pipe("{trainer.train_dataset[0]["prompt"]}")' in card.content
        for text in (
            "bagel-shapes, trained for the task `reasoning_t2i`",
            "dvreward (judge: ShapesJudge, aggregation: geometric)",
            "pip install",
        ):
            assert text in card.content
        for text in ("None", "time machine", "text-generation", "More Information Needed", str(Path.home())):
            assert text not in card.content
        assert card.data.library_name == "alphagrpo-ext"
        assert card.data.license == "apache-2.0"
        assert {"trl", "alphagrpo", "grpo"} <= set(card.data.tags)
        assert ("peft" in card.data.tags) is lora
        if lora:
            adapter = json.loads((folder / "adapter_config.json").read_text())
            assert adapter["base_model_name_or_path"] == "bagel-shapes"


def test_card_of_a_run_takes_what_its_caller_adds(
    make_trainer: Callable[..., AlphaGRPOTrainer], tmp_path: Path
) -> None:
    trainer = make_trainer(task="self_reflection", num_reflection_rounds=2, hub_model_id="me/model")
    trainer.model.config._name_or_path = "someone/base"
    trainer.card_details = {
        "table": "all 1 -> 2",
        "command": "accelerate launch x.py",
        "prompt": "a circle\x1b[31m\u2028# Circle",
        "facts": {"rewards": "good\n# Evil"},
    }
    trainer.create_model_card(dataset_name="me/prompts", tags="mine")
    card = ModelCard.load(tmp_path / "README.md")
    for text in (
        'pipeline("me/model")',
        ", num_rounds=2)",
        "all 1 -> 2",
        "*strict pass* is",
        "accelerate launch x.py",
        # What a prompt or the name of a reward holds neither steers a terminal nor begins a line.
        'pipe("a circle [31m # Circle"',
        "- rewards: good # Evil\n",
    ):
        assert text in card.content
    assert card.data.base_model == "someone/base"
    assert card.data.base_model_relation == "finetune"
    assert card.data.datasets == "me/prompts"
    assert "mine" in card.data.tags
