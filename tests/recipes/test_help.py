# SPDX-License-Identifier: Apache-2.0

"""What `--help` of a recipe shows, and what a wrong command line is answered with."""

from __future__ import annotations

import re
import runpy
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
from trl import GRPOConfig, ModelConfig

from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from recipe_tools import recipe_arguments
from recipe_tools.recipe_arguments import RecipeParser
from reward_models.arguments import PromptArguments
from reward_models.holdout.arguments import HoldoutArguments
from reward_models.judges.arguments import JudgeArguments
from reward_models.likelihood.arguments import LikelihoodArguments


ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
TRAINING = ["reasoning_t2i", "self_reflection"]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a recipe that ends before it does anything; returns its exit code and what it printed."""

    def run(name: str, *arguments: str | Path) -> tuple[int, str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("COLUMNS", "110")
        monkeypatch.setattr(sys, "argv", [f"recipes/{name}.py", *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(f"recipes/{name}.py", run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        output, errors = capsys.readouterr()
        return code, output + errors

    return run


def options(text: str) -> list[str]:
    return re.findall(r"^  --(\w+) ", text, flags=re.MULTILINE)


def section(text: str, title: str) -> list[str]:
    return options(text.split(f"\n{title}:\n")[1].split("\n\n")[0])


@pytest.mark.parametrize("name", TRAINING)
def test_help_of_training_has_purpose_examples_and_own_options(call, name: str) -> None:
    code, text = call(name, "--help")
    assert code == 0
    purpose = "reasoning text-to-image" if name == "reasoning_t2i" else "self-reflective refinement"
    assert text.split("\n\n")[1].startswith("Train a unified multimodal model on " + purpose)
    assert f"\n    accelerate launch recipes/{name}.py\n" in text and "```" not in text
    assert text.rstrip().endswith("\n\nAll options of GRPOConfig and ModelConfig: --help_all")
    shown = options(text)
    assert len(shown) == len(set(shown))
    declared = {f.name for f in fields(PromptArguments)} | set(AlphaGRPOConfig.__annotations__)
    assert declared <= set(shown)
    # Of the others, those of the configuration alone.
    others = set(section(text, "Of GRPOConfig and ModelConfig, what the configuration sets"))
    assert others == set(shown) - declared
    assert {"model_name_or_path", "output_dir", "max_steps"} <= others
    assert "vllm_mode" not in shown and "lora_r" not in shown


def test_options_are_in_sections(call) -> None:
    _, text = call("self_reflection", "--help")
    titles = re.findall(r"^(\S.*):\n  --", text, flags=re.MULTILINE)
    assert titles[:5] == ["Prompts", "Reward", "Judge", "Likelihood reward", "Hold-out judge"]
    known = dict.fromkeys(recipe_arguments.SECTIONS.values())
    assert titles == [*known, "Of GRPOConfig and ModelConfig, what the configuration sets"]
    assert {"reward", "formats"} <= set(section(text, "Reward"))
    assert section(text, "Prompts")[:3] == ["train_file", "eval_file", "prompt_column"]
    assert section(text, "Judge") == [f.name for f in fields(JudgeArguments)]
    assert section(text, "Likelihood reward") == [f.name for f in fields(LikelihoodArguments)]
    assert set(section(text, "Hold-out judge")) == {f.name for f in fields(HoldoutArguments)}
    assert {"eval_seeds", "eval_num_timesteps"} <= set(section(text, "Evaluation"))
    assert {"temperature", "num_timesteps", "sde_window_size"} <= set(section(text, "Rollout"))
    assert {"image_objective", "loss_type", "image_beta"} <= set(section(text, "Objective"))
    assert {"learning_rate", "num_generations"} <= set(section(text, "Training"))


def test_sections_begin_at_fields_that_exist() -> None:
    def classes(kind: type) -> set[type]:
        return {kind, *(owner for owner in kind.__mro__)}

    known = {owner.__name__: owner for kind in (PromptArguments, AlphaGRPOConfig) for owner in classes(kind)}
    for place in recipe_arguments.SECTIONS:
        name, field_name = place.split(".")
        assert field_name in known[name].__annotations__, place


def test_defaults_are_those_of_the_configuration(call) -> None:
    def entry(text: str, name: str) -> str:
        return " ".join(text.split(f"\n  --{name} ")[1].split("\n  --")[0].split())

    _, text = call("reasoning_t2i", "--help")
    assert "configuration recipes/configs/reasoning_t2i_shapes.yaml" in text
    assert entry(text, "image_height").endswith("(here: 24)")
    assert entry(text, "per_device_train_batch_size").startswith("INT") and "(here: 64)" in text
    assert entry(text, "sde_window_range").startswith("INT ... ")
    assert entry(text, "noise_level").startswith("FLOAT ") and entry(text, "think").startswith("[BOOL] ")
    assert entry(text, "temperature").startswith("FLOAT ") and "(default: None)" not in text
    _, text = call("reasoning_t2i", "--config", "recipes/configs/reasoning_t2i_bagel.yaml", "--help")
    assert entry(text, "eval_num_timesteps").endswith("(here: 40)")
    assert entry(text, "lora_r").endswith("(here: 32)")
    assert entry(text, "image_beta").endswith("(default: 0.0)")


def test_help_all_shows_every_argument(call) -> None:
    for spelling in ("--help_all", "--help-all"):
        code, text = call("reasoning_t2i", spelling)
        assert code == 0
        every = {f.name for kind in (PromptArguments, GRPOConfig, AlphaGRPOConfig, ModelConfig) for f in fields(kind)}
        assert not {name for name in every if f"--{name}" not in text}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_help_begins_with_what_the_recipe_is_for(call, recipe: Path) -> None:
    purpose = recipe.read_text(encoding="utf-8").split('"""')[1].strip().split("\n\n")[0]
    code, text = call(recipe.stem, "--help")
    assert code == 0
    assert text.startswith(f"usage: {recipe.name} [--config FILE] [--NAME VALUE ...]\n\n{purpose}\n\n")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "reasoning_t2i",
            ["--learnin_rate", "1e-5"],
            "unknown argument --learnin_rate: did you mean --learning_rate?",
        ),
        ("self_reflection", ["--train_task=x"], "unknown argument --train_task=x: did you mean --train_tasks?"),
        ("reasoning_t2i", ["--max_step", "3"], "did you mean --max_steps?"),
        ("reasoning_t2i", ["--conf", "a.yaml"], "unknown argument --conf: did you mean --config?"),
        ("reasoning_t2i", ["qqqqqqqqqqqq"], "unknown argument qqqqqqqqqqqq: --help lists the arguments"),
        ("reasoning_t2i", ["--config"], "--config takes the path of a YAML file, and got nothing"),
        ("reasoning_t2i", ["--config=a/b.yaml"], "--config takes the path of a YAML file, and got a/b.yaml"),
        ("evaluate", ["--eval_fil", "a"], "did you mean --eval_file?"),
        ("generate", ["--prompt", "a"], "did you mean --prompts?"),
    ],
)
def test_unknown_arguments_get_a_suggestion(call, name: str, arguments: list[str], message: str) -> None:
    code, text = call(name, *arguments)
    assert code == 2
    assert text == f"usage: {name}.py [--config FILE] [--NAME VALUE ...]\n{text.splitlines()[1]}\n"
    assert text.splitlines()[1].startswith(f"{name}.py: error: ") and text.endswith(f"{message}\n")


def test_unknown_names_in_a_configuration_get_a_suggestion(call, tmp_path: Path) -> None:
    config = tmp_path / "own.yaml"
    config.write_text("learning_rat: 1.0e-5\n")
    code, text = call("reasoning_t2i", "--config", config)
    assert code == 2
    assert f"{config}: unknown argument --learning_rat: did you mean --learning_rate?" in text


@dataclass
class OwnJudgeArguments:
    """Stands for the arguments of a recipe outside this repository."""

    colour: str = field(default="red", metadata={"help": "Colour."})
    flags: list[str] = field(default_factory=list)


def test_other_dataclasses_have_a_section_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The configuration sets it, and the test's end restores it.
    monkeypatch.setenv("OWN_VARIABLE_OF_A_TEST", "0")
    parser = RecipeParser([OwnJudgeArguments], None)
    assert (
        "\nOwn judge:\n  --colour TEXT\n        Colour. (default: red)\n  --flags TEXT ...\n" in parser.format_help()
    )
    assert "help_all" not in parser.format_help()
    config = tmp_path / "own.yaml"
    config.write_text("colour: blue\nenv: {OWN_VARIABLE_OF_A_TEST: '1'}\n")
    parser.show_config(str(config))
    assert "(here: blue)" in parser.format_help()
    (parsed,) = RecipeParser([OwnJudgeArguments], None, config).parse_args_and_config(["--flags", "a", "b"])
    assert (parsed.colour, parsed.flags) == ("blue", ["a", "b"])
