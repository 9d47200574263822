# SPDX-License-Identifier: Apache-2.0

import csv
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from trl import TrlParser

from alphagrpo_ext.files import FolderInUseError, FolderLock
from alphagrpo_ext.models.contract import FAMILIES
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.report import ReportStore
from recipe_tools.processes import sole_processes
from recipe_tools.recipe_arguments import RecipeParser
from reward_models.dvreward import JudgeFailedError
from reward_models.judges.shapes import ShapesJudge
from support.locked_folder import another_process
from support.recipe_modules import load_recipe, run_recipe


ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))


def run(*command: str | Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def recipe_of(config: Path) -> Path:
    """`recipes/configs/NAME_suffix.yaml` belongs to `recipes/NAME.py`."""
    (recipe,) = [path for path in RECIPES if config.stem == path.stem or config.stem.startswith(f"{path.stem}_")]
    return recipe


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_config_parses_with_its_recipe(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Parsed(Exception):
        pass

    parse = TrlParser.parse_args_and_config

    def parse_and_stop(*args, **kwargs):
        raise Parsed(parse(*args, **kwargs))

    recipe = recipe_of(config)
    monkeypatch.setattr(TrlParser, "parse_args_and_config", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [str(recipe), "--config", str(config)])
    with pytest.raises(Parsed):
        runpy.run_path(str(recipe), run_name="__main__")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipe_has_help(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # A folder, or a file where that is all there is; one that only computes something writes neither.
    option = "--model_name_or_path" if recipe.stem == "estimate_memory" else "--output"
    monkeypatch.setattr(sys, "argv", [str(recipe), "--help"])
    try:
        runpy.run_path(str(recipe), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code
    assert option in capsys.readouterr().out


SHOW_HELP = """
import contextlib, io, runpy, sys
from pathlib import Path

for path in map(Path, sys.argv[1:]):
    sys.path.insert(0, str(path.parent))
    sys.argv = [str(path), "--help"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        runpy.run_path(str(path), run_name="__main__")
print(*sys.modules, sep="\\n")
"""
TRAINING = ("ray_train", "reasoning_t2i", "self_reflection")


@pytest.mark.parametrize(
    ("recipes", "unwanted"),
    [
        pytest.param([path for path in RECIPES if path.stem not in TRAINING], ("torch", "datasets"), id="others"),
        # Configurations of trainers import PyTorch and PEFT, but no model has to be defined and no trainer.
        pytest.param(
            [path for path in RECIPES if path.stem in TRAINING],
            (
                *("datasets", "diffusers", "pandas", "transformers.trainer", "transformers.models.siglip"),
                *("trl.trainer.grpo_trainer", "alphagrpo_ext.trainer.trainer", "alphagrpo_ext.models.bagel"),
            ),
            id="training",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_help_imports_nothing_that_it_does_not_need(recipes: list[Path], unwanted: tuple[str, ...]) -> None:
    assert not set(unwanted) & set(run("-c", SHOW_HELP, *recipes).splitlines())


def test_memory_of_the_packaged_model_is_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe("estimate_memory")
    settings = {"height": 24, "width": 24, "batch_size": 8, "lora_rank": 0, "num_shards": 2}
    recipe.main(recipe.EstimationArguments(model_name_or_path="bagel-shapes", **settings), show_overview=False)
    output, progress = capsys.readouterr()
    assert "estimates: 100%" in progress and "1/1" in progress
    header, _, row, *_ = output.splitlines()
    assert header == "| | weights | gathered | reference | gradients | optimizer | activations | total |"
    values = [float(value) for value in row.split("|")[2:-1]]
    # In GiB, a model of 2 million parameters.
    assert values[-1] == pytest.approx(sum(values[:-1]), rel=0.01)
    assert 0.01 < values[-1] < 1


@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [
        ("benchmark", "BenchmarkArguments", ()),
        ("evaluate", "EvaluationArguments", ("--models", "bagel-shapes")),
        ("evaluate", "EvaluationArguments", ("--models", "bagel-shapes", "--task", "visual_question_answering")),
        ("export_benchmark", "ExportArguments", ("--benchmark", "geneval", "--prompts", "prompts.jsonl")),
        ("generate", "GenerationArguments", ()),
        ("gpu_check", "GPUCheckArguments", ("--device", "cpu")),
        ("pretrain_shapes", "PretrainingArguments", ()),
    ],
)
def test_a_folder_that_another_process_writes_to_is_left_alone(
    name: str, arguments: str, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FolderLock, "patience", 0.0)
    recipe = load_recipe(name)
    with another_process(tmp_path) as process:
        with pytest.raises(FolderInUseError, match=f"{tmp_path} is being written to by process {process.pid}"):
            run_recipe(recipe, getattr(recipe, arguments), *options, "--output_dir", tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [FolderLock.name]


def test_processes_of_a_recipe_hold_its_folder_to_the_end(tmp_path: Path) -> None:
    with sole_processes(tmp_path / "out") as state:
        assert state.is_main_process
        assert (tmp_path / "out" / FolderLock.name).exists()
    # Nothing was written.
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.low_priority
@pytest.mark.parametrize("model", [None, "Cosmos3-Edge", "Cosmos3-Nano"])
def test_memory_in_the_page_is_what_its_command_prints(model: str | None) -> None:
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## `estimate_memory.py`\n")[1].split("\n## ")[0]
    _, *parts = re.split(r"`python (recipes/estimate_memory\.py[^`]*)`", section)
    tables = dict(zip(parts[::2], parts[1::2], strict=True))
    assert len(tables) == 3
    command = "recipes/estimate_memory.py" + (f" --model_name_or_path {model}" if model else "")
    printed = [line for line in run(*shlex.split(command)).splitlines() if line.startswith("|")]
    assert len(printed) == 8
    assert [line for line in tables[command].splitlines() if line.startswith("|")] == printed


def parse_estimation(*arguments: str) -> Any:
    recipe = load_recipe("estimate_memory")
    (parsed,) = RecipeParser([recipe.EstimationArguments], recipe.__doc__).parse_args_and_config(arguments)
    return parsed


@pytest.mark.parametrize(
    ("name", "model_type", "settings"),
    [
        pytest.param("BAGEL-7B-MoT", "bagel", (512, 512, "flex_attention"), id="BAGEL"),
        pytest.param("bagel-shapes", "bagel", (24, 24, "flex_attention"), id="packaged"),
        pytest.param("Cosmos3-Edge", "cosmos3", (640, 640, "sdpa"), id="Edge"),
        pytest.param("nvidia/Cosmos3-Nano", "cosmos3", (640, 640, "sdpa"), id="Nano"),
    ],
)
def test_estimates_have_defaults_of_their_model(name: str, model_type: str, settings: tuple[int, int, str]) -> None:
    recipe = load_recipe("estimate_memory")
    config = recipe.load_config(name)
    assert config.model_type == model_type
    found = parse_estimation("--model_name_or_path", name).settings_for(config)
    assert (found.height, found.width, found.attn_implementation) == settings
    assert found.batch_size == 1
    given = parse_estimation("--height", "320", "--attn_implementation", "eager").settings_for(config)
    assert (given.height, given.width, given.attn_implementation) == (320, settings[1], "eager")


def test_help_of_the_estimate_names_all_models_whose_sizes_are_known() -> None:
    recipe = load_recipe("estimate_memory")
    help_text = RecipeParser([recipe.EstimationArguments], recipe.__doc__).format_help()
    names = [name for family in FAMILIES.names() for name in FAMILIES.get(family).released_sizes]
    assert len(names) == 3 and all(name in help_text for name in names)
    assert not recipe.names_model_alone(["--model_name_or_path", "Cosmos3-Edge", "--batch_size=2"])
    assert recipe.names_model_alone(["--model_name_or_path", "Cosmos3-Edge"]) and recipe.names_model_alone([])


@pytest.mark.slow
def test_reasoning_t2i_runs_from_prompts_to_report(tmp_path: Path) -> None:
    output = run(
        *("-m", "accelerate.commands.launch", ROOT / "recipes" / "reasoning_t2i.py"),
        *("--max_steps", "1", "--per_device_train_batch_size", "8", "--num_train_prompts", "16"),
        *("--num_eval_prompts", "14", "--eval_seeds", "1", "--eval_questions", "14", "--logging_steps", "1"),
        *("--output_dir", tmp_path),
    )
    assert "strict pass" in output
    summary = json.loads((tmp_path / "summary.json").read_text())
    for moment in ("before", "after"):
        scores = summary[moment]
        assert scores["num_samples"] + scores["num_failed"] == 14
        assert len(scores["categories"]) == 7
        assert sum(s["num_samples"] + s["num_failed"] for s in scores["categories"].values()) == 14
        assert 0 < scores["reward_error"] < 0.5
    assert 0 <= summary["gain_error"] < 0.5
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("image/ratio_mean" in entry for entry in entries)
    with Image.open(tmp_path / "before_after.png") as picture:
        assert min(picture.size) > 100
    assert len(ReportStore(tmp_path).comparison().pairs) == 14
    assert "Held-out prompts, before and after training" in (tmp_path / "report.html").read_text()
    model, processor = load_model(tmp_path)
    assert processor.generation_system_prompt
    assert not any(parameter.isnan().any() for parameter in model.parameters())


@pytest.mark.slow
def test_self_reflection_runs_from_prompts_to_report(tmp_path: Path) -> None:
    output = run(
        *("-m", "accelerate.commands.launch", ROOT / "recipes" / "self_reflection.py"),
        *("--max_steps", "1", "--per_device_train_batch_size", "8", "--num_train_prompts", "16"),
        *("--num_eval_prompts", "14", "--eval_seeds", "1", "--eval_questions", "14", "--logging_steps", "1"),
        *("--output_dir", tmp_path),
        *("--formats", "shapes_reflection", "think", "--reward_weights", "1.0", "0.1", "0.1"),
        *("--text_loss_weight", "0.05"),
    )
    assert "unchanged" in output
    summary = json.loads((tmp_path / "summary.json").read_text())
    for moment in ("before", "after"):
        scores = summary[moment]
        assert scores["num_pairs"] == scores["initial"]["num_samples"] == scores["refined"]["num_samples"] == 14
        assert scores["improved"] + scores["worsened"] + scores["unchanged"] == pytest.approx(1.0)
        gain = scores["refined"]["strict_pass_rate"] - scores["initial"]["strict_pass_rate"]
        assert scores["fixed"] - scores["broken"] == pytest.approx(gain)
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("reflection/improved_frac" in entry for entry in entries)
    with Image.open(tmp_path / "refined.png") as picture:
        assert min(picture.size) > 100


def test_generate_writes_a_picture_per_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe("generate")
    options = ("--num_prompts", "2", "--num_rounds", "1", "--output_dir", tmp_path)
    run_recipe(recipe, recipe.GenerationArguments, *options)
    assert "attention of bagel-shapes: eager (measured as the fastest on a CPU)\n" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert [step["image"] for step in line["steps"]] == sorted(step["image"] for step in line["steps"])
        assert sum(step["best"] for step in line["steps"]) == 1
        for step in line["steps"]:
            assert 0 <= step["reward"] <= 1
            with Image.open(tmp_path / step["image"]) as image:
                assert image.size == (24, 24)
    assert (tmp_path / "contact_sheet.png").exists()


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("prompts.txt", "a red circle on a white background\n\nTwo squares, on gray\n", ()),
        (
            "prompts.csv",
            'caption\na red circle on a white background\n"Two squares, on gray"\n',
            ("--prompt_column", "caption"),
        ),
        ("p.jsonl", '{"prompt": "a red circle on a white background"}\n{"prompt": "Two squares, on gray"}\n', ()),
    ],
)
def test_generate_paints_prompts_without_questions_if_there_is_no_judge(
    name: str, content: str, options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / name, tmp_path / "images"
    file.write_text(content)
    recipe = load_recipe("generate")
    given = ("--prompt_file", file, "--output_dir", output, *options)
    run_recipe(recipe, recipe.GenerationArguments, "--judge", "none", *given)

    lines = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["a red circle on a white background", "Two squares, on gray"]
    # Nothing says which image is good.
    assert not any(step["best"] for line in lines for step in line["steps"])
    assert "does not know these words, and reads each as an unknown one: 'Two' 'squares,'." in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"decompose_prompts\.py --input"):
        run_recipe(recipe, recipe.GenerationArguments, *given)


def test_generate_stops_with_a_judge_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As training does, beyond the share that may fail. Without a reward, no image is the best one."""

    async def fail(self: ShapesJudge, image: Image.Image, questions: list[str]) -> list[None]:
        return [None for _ in questions]

    monkeypatch.setattr(ShapesJudge, "answer", fail)
    recipe = load_recipe("generate")
    options = ("--num_prompts", "2", "--num_rounds", "1", "--keep_best", "--output_dir", tmp_path)
    with pytest.raises(JudgeFailedError, match="left 2 of 2 images without a score"):
        run_recipe(recipe, recipe.GenerationArguments, *options)
    run_recipe(recipe, recipe.GenerationArguments, *options, "--judge_max_failed_frac", "1.0")
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("wish", [("--keep_best",), ("--stop_reward", "0.9")])
@pytest.mark.parametrize("source", [("--judge", "none"), ("--prompts", "a red circle")])
def test_generate_needs_rewards_for_what_goes_by_them(source: tuple[str, ...], wish: tuple[str, ...]) -> None:
    recipe = load_recipe("generate")
    with pytest.raises(ValueError, match="keep_best and stop_reward go by rewards: give a judge"):
        RecipeParser([recipe.GenerationArguments], "").parse_args_and_config(args=[*source, *wish])


@pytest.mark.slow
def test_reasoning_t2i_reads_prompts_from_files_and_trains_an_adapter(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"a {color} circle",
            "semantic_questions": [
                {"question": f"Is there a {color} circle?", "tag": "Existence"},
                {"question": f"Is the circle {color}?", "tag": "Brand colour"},
            ],
            "quality_questions": [],
        }
        for color in ("red", "blue", "green", "yellow")
    ]
    prompts, table = tmp_path / "prompts.jsonl", tmp_path / "prompts.csv"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with table.open("w", newline="") as file:
        cells = [[json.dumps(v) if isinstance(v, list) else v for v in row.values()] for row in rows]
        csv.writer(file).writerows([rows[0].keys(), *cells])
    run(
        *("-m", "accelerate.commands.launch", ROOT / "recipes" / "reasoning_t2i.py"),
        *(
            "--train_file",
            table,
            "--eval_file",
            prompts,
            "--logging_steps",
            "1",
            "--use_peft",
            "true",
            "--lora_r",
            "4",
        ),
        *("--max_steps", "1", "--per_device_train_batch_size", "8", "--eval_seeds", "1"),
        *("--output_dir", tmp_path / "run"),
    )
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["before"]["categories"].keys() == {"all"}
    # A tag of one's own is logged like a known one.
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for tag in ("Existence", "Brand colour"):
        assert any(0 <= entry.get(f"dvreward/semantic/{tag}", -1) <= 1 for entry in entries)
        assert f"{tag} (semantic)" in (tmp_path / "run" / "report.html").read_text()


PRETRAINING = (
    *("--vae_steps", "3", "--decoder_steps", "2", "--steps", "4", "--save_steps", "2", "--warmup_steps", "2"),
    *("--vision_steps", "2", "--vision_answers", "4", "--grounding_steps", "3"),
    *("--num_paintings", "4", "--grounding_rounds", "2"),
)

STOP_AFTER_FIRST_SAVE = """
import runpy, sys
from pathlib import Path

class Stop(Exception):
    pass

write_text = Path.write_text
def write_and_stop(self, *args, **kwargs):
    write_text(self, *args, **kwargs)
    if self.name == "pretraining.json":
        raise Stop
Path.write_text = write_and_stop
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except Stop:
    print("stopped")
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bagel", pytest.param("cosmos3", marks=pytest.mark.low_priority)])
def test_pretraining_resumes_bit_equal(family: str, tmp_path: Path) -> None:
    recipe, settings = ROOT / "recipes" / "pretrain_shapes.py", (*PRETRAINING, "--family", family)
    run(recipe, *settings, "--output_dir", tmp_path / "whole")
    stopped = run("-c", STOP_AFTER_FIRST_SAVE, recipe, *settings, "--output_dir", tmp_path / "resumed")
    assert "stopped" in stopped
    state = tmp_path / "resumed" / "painting.pt"
    assert torch.load(state, weights_only=True)["step"] == 2
    run(recipe, *settings, "--output_dir", tmp_path / "resumed")
    for stage, steps in (("painting", 4), ("grounding_0", 3), ("grounding_1", 3)):
        resumed, whole = (
            torch.load(tmp_path / name / f"{stage}.pt", weights_only=True) for name in ("resumed", "whole")
        )
        assert resumed["step"] == whole["step"] == steps
        for part in ("model", "average"):
            for name, expected in whole[part].items():
                assert torch.equal(resumed[part][name], expected), f"{stage}, {part}: {name}"
    # The finished model, and the newest averaged weights.
    model, _ = load_model(tmp_path / "resumed")
    expected, _ = load_model(tmp_path / "whole" / "checkpoint")
    for (name, actual), (_, value) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(actual, value), name


@pytest.mark.slow
def test_adapter_is_put_on_the_expert_that_is_named(tmp_path: Path) -> None:
    run(
        *("-m", "accelerate.commands.launch", ROOT / "recipes" / "reasoning_t2i.py"),
        *("--max_steps", "1", "--per_device_train_batch_size", "8", "--num_train_prompts", "16", "--eval_seeds", "0"),
        *("--use_peft", "--lora_r", "4", "--lora_targets", "generation", "--generation_learning_rate", "1e-4"),
        *("--output_dir", tmp_path),
    )
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert len(names) == 6 * 7 * 2
    assert all("_moe_gen" in name for name in names)
