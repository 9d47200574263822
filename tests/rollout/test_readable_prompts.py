# SPDX-License-Identifier: Apache-2.0

"""Prompts that the model's context cannot hold are refused before anything is painted, wherever they come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import alphagrpo_ext
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator
from support.recipe_modules import load_recipe, run_recipe


GOOD = "a red circle on a white background"
LONG = "a red circle and " * 200 + GOOD
REFUSAL = "needs at least [0-9]+ positions, more than the model's 512: shorten the prompt"
QUESTIONS = {
    "semantic_questions": [{"question": "is there a red circle ?", "tag": "Existence"}],
    "quality_questions": [],
}


def test_generator_names_the_row() -> None:
    model, processor = load_model("bagel-shapes")
    generate = RolloutGenerator(model, processor, TASKS.get("reasoning_t2i")(think=False))
    rows = [{"prompt": GOOD}, {"prompt": LONG}]
    generators = [torch.Generator() for _ in rows]
    with pytest.raises(ValueError, match=f"row 1 {REFUSAL}"):
        generate(rows, generators, RolloutConfig(24, 24))


@pytest.mark.parametrize("options", [{}, {"num_rounds": 1}], ids=["paints", "reflects"])
def test_pipeline_names_the_row(options: dict[str, int]) -> None:
    pipe = alphagrpo_ext.pipeline("bagel-shapes")
    with pytest.raises(ValueError, match=f"row 1 {REFUSAL}"):
        pipe([GOOD, LONG], **options)


@pytest.mark.parametrize(
    ("name", "arguments", "option"),
    [
        ("generate", "GenerationArguments", "--prompt_file"),
        ("evaluate", "EvaluationArguments", "--eval_file"),
        ("export_benchmark", "ExportArguments", "--prompts"),
    ],
)
def test_recipes_read_all_prompts_before_they_paint(name: str, arguments: str, option: str, tmp_path: Path) -> None:
    file, output = tmp_path / "rows.jsonl", tmp_path / "out"
    rows = [{"prompt": prompt, "tag": "single_object", "include": [], **QUESTIONS} for prompt in (GOOD, GOOD, LONG)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(name)
    with pytest.raises(ValueError, match=REFUSAL):
        run_recipe(recipe, getattr(recipe, arguments), option, file, "--output_dir", output, "--batch_size", "1")
    assert not list(output.rglob("*.png"))
