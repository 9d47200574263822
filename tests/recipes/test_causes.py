# SPDX-License-Identifier: Apache-2.0

"""Recipes find a judge that cannot judge before they load a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from trl import ModelConfig, TrlParser

from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from reward_models.dvreward import JudgeFailedError
from reward_models.endpoints import preflight
from reward_models.server import __main__ as server_command
from reward_models.server.arguments import ServerArguments
from support.recipe_modules import ROOT, load_recipe, run_recipe
from support.scripted_endpoint import Reply, chat_body, scripted_endpoint


GOOD = Reply(chat_body("Yes", [("Yes", [("Yes", -0.1), ("No", -2.4)])]))
NO_MODEL = "no/such/model"
SOME = ("--num_eval_prompts", "2")


class LoadedError(Exception):
    """A model was loaded."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "PAUSES", ())


@pytest.fixture
def foreign_prompts(tmp_path: Path) -> Path:
    """Prompts whose second row is not of the shapes world."""
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": name, "semantic_questions": [{"question": f"Is there a {name}?", "tag": "Existence"}]}
        for name in ("circle", "dog")
    ]
    path.write_text("".join(json.dumps({**row, "quality_questions": []}) + "\n" for row in rows))
    return path


def train(name: str, *options: str | Path) -> None:
    recipe = load_recipe(name)
    arguments = recipe.PromptArguments
    config = ROOT / "recipes" / "configs" / f"{name}_shapes.yaml"
    parser = TrlParser((arguments, AlphaGRPOConfig, ModelConfig))
    settings = ("--config", config, "--use_cpu", "--model_name_or_path", NO_MODEL, *SOME, *options)
    recipe.main(*parser.parse_args_and_config([str(option) for option in settings]))


@pytest.fixture
def recipe_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Loads a recipe whose policy must not be loaded."""

    def refuse(*args: Any) -> None:
        raise LoadedError

    def load(name: str) -> ModuleType:
        recipe = load_recipe(name)
        import recipe_tools.benchmark_export.images
        import recipe_tools.evaluation.models
        import recipe_tools.processes

        for module in (recipe_tools.processes, recipe_tools.evaluation.models, recipe_tools.benchmark_export.images):
            monkeypatch.setattr(module, "load_policy", refuse)
        return recipe

    return load


@pytest.mark.parametrize("name", ["reasoning_t2i", "self_reflection"])
def test_training_asks_the_judge_before_it_loads_the_model(name: str, tmp_path: Path) -> None:
    with scripted_endpoint(GOOD) as endpoint:
        judge = ("--judge", "openai", "--judge_model", "m", "--output_dir", tmp_path, "--judge_base_url")
        with pytest.raises(JudgeFailedError, match=f"try {endpoint.url}"):
            train(name, *judge, endpoint.root)
        with pytest.raises(OSError, match=NO_MODEL):
            train(name, *judge, endpoint.url)
        assert len(endpoint.bodies) == 1


@pytest.mark.parametrize("option", ["--train_file", "--eval_file"])
def test_training_names_the_row_that_the_shapes_judge_cannot_judge(
    option: str, foreign_prompts: Path, tmp_path: Path
) -> None:
    message = rf"{option[2:]} {foreign_prompts}: row 1 \('dog'\): .* choose another judge"
    with pytest.raises(ValueError, match=message):
        train("reasoning_t2i", option, foreign_prompts, "--output_dir", tmp_path)


@pytest.mark.parametrize("option", ["--train_file", "--eval_file"])
def test_training_reads_the_column_of_prompts_that_is_named(
    option: str, foreign_prompts: Path, tmp_path: Path
) -> None:
    renamed = tmp_path / "captions.jsonl"
    renamed.write_text(foreign_prompts.read_text().replace('"prompt"', '"caption"'))
    # The row that the judge cannot judge is named by its prompt, so it was read.
    with pytest.raises(ValueError, match=r"row 1 \('dog'\): .* choose another judge"):
        train("reasoning_t2i", option, renamed, "--prompt_column", "caption", "--output_dir", tmp_path)


@pytest.mark.parametrize("name", ["evaluate", "generate", "export_benchmark"])
def test_painting_recipes_ask_the_judge_before_they_load_the_model(
    name: str, recipe_of: Callable[[str], ModuleType], foreign_prompts: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(name)
    arguments, file = {
        "evaluate": ("EvaluationArguments", "--eval_file"),
        "generate": ("GenerationArguments", "--prompt_file"),
        "export_benchmark": ("ExportArguments", "--questions"),
    }[name]
    options = [file, foreign_prompts, "--output_dir", tmp_path / "out"]
    if name == "export_benchmark":
        options += ["--benchmark", "dpg_bench", "--prompts", write_dpg_prompts(tmp_path)]

    def run(*judge: str) -> None:
        run_recipe(recipe, getattr(recipe, arguments), *options, *judge)

    with pytest.raises(ValueError, match=r"\('dog'\): .* choose another judge"):
        run("--judge", "shapes")
    with scripted_endpoint(GOOD) as endpoint:
        judge = ("--judge", "openai", "--judge_model", "m", "--judge_base_url")
        with pytest.raises(JudgeFailedError, match=f"try {endpoint.url}"):
            run(*judge, endpoint.root)
        with pytest.raises(LoadedError):
            run(*judge, endpoint.url)
        assert len(endpoint.bodies) == 1


def write_dpg_prompts(folder: Path) -> Path:
    prompts = folder / "dpg"
    prompts.mkdir()
    (prompts / "0.txt").write_text("dog")
    return prompts


def test_reward_server_does_not_start_without_its_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise LoadedError

    monkeypatch.setattr(server_command, "configure_logging", lambda: None)
    monkeypatch.setattr("reward_models.server.app.create_app", refuse)
    with scripted_endpoint(GOOD) as endpoint:
        for url, error in ((endpoint.root, JudgeFailedError), (endpoint.url, LoadedError)):
            with pytest.raises(error):
                server_command.main(ServerArguments(judge="openai", judge_model="m", judge_base_url=url))
