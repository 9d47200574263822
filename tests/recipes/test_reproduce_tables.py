# SPDX-License-Identifier: Apache-2.0

"""The tables of the READMEs from files of runs, the queue that runs their commands, and the commands themselves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from PIL import Image
from trl import ModelConfig, TrlParser

from alphagrpo_ext.models.loading import resolve_model_path
from alphagrpo_ext.shapes.editing import EDITS
from alphagrpo_ext.shapes.prompts import CATEGORIES
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from recipe_tools.evaluation import costs
from recipe_tools.evaluation.arguments import EvaluationArguments
from recipes.reproduce_tables import check_made_with, main, save_pages, tables_overview
from reward_models.arguments import PromptArguments
from reward_models.decomposition.base import DecomposerArguments
from reward_models.evaluation.statistics import standard_error
from support.recipe_modules import load_recipe
from table_parts import execution
from table_parts.arguments import TABLE_NAMES, TablesArguments
from table_parts.execution import RunQueue
from table_parts.fewer_evaluations import MeasurementArguments
from table_parts.fewer_evaluations import main as measure_costs
from table_parts.frozen_rewards import AgreementArguments, within_prompt_auc
from table_parts.objectives import step_costs
from table_parts.objectives.step_costs import CostArguments
from table_parts.objectives.table import OTHER_OBJECTIVES
from table_parts.plan import CONFIGS, Plan, Run, with_needs
from table_parts.refinement import _better_of_two
from table_parts.registry import TABLES
from table_parts.results import ScoredSamples
from table_parts.tables import MeasuredTable
from table_parts.time_to_quality import learning_curve
from table_parts.time_to_quality.curve import CurvePoint, read_curve, seconds_until
from table_parts.time_to_quality.learning_curve import CurveArguments, LearningCurve


ROOT = Path(__file__).parents[2]


def plan_in(folder: Path, **changes: Any) -> Plan:
    return Plan(TablesArguments(**{"output_dir": str(folder), "seeds": [0, 2], "num_parallel": 2} | changes))


def tables_of(plan: Plan) -> dict[str, MeasuredTable]:
    return {name: make(plan) for name, make in TABLES.items()}


def all_runs(plan: Plan) -> list[Run]:
    return with_needs(run for table in tables_of(plan).values() for run in table.runs)


def score(strict: float, reward: float) -> dict[str, Any]:
    return {
        "strict_pass_rate": strict,
        "reward": reward,
        "strict_pass_error": 0.016,
        "reward_error": 0.007,
        "categories": {name: {"strict_pass_rate": strict, "reward": reward} for name in CATEGORIES},
    }


def refinement(gain: float) -> dict[str, Any]:
    stops = {"right_kept": 0.9, "broken": 0.0, "wrong_kept": 0.4, "fixed": gain}
    return {"initial": score(0.1, 0.5), "refined": score(0.1 + gain, 0.8), "stops": stops, "gain_error": 0.02}


def sample(mode: str, index: int, seed: int, passes: bool, category: str) -> dict[str, Any]:
    return {
        **{"mode": mode, "prompt_index": index, "noise_seed": seed, "prompt": "a circle", "category": category},
        **{
            "image": "image.png",
            "reward": 0.5 + 0.25 * passes,
            "semantic": 0.9,
            "quality": 0.8,
            "strict_pass": passes,
        },
    }


def write_results(run: Run) -> None:
    """What a run leaves behind that tables read. Seeds differ by two points, and trained models pass more often."""
    run.folder.mkdir(parents=True)
    seed = int(run.name[-1]) if "-seed" in run.name else 0
    script = run.command[0]
    if script == "reasoning_t2i.py":
        summary = {"before": score(0.5, 0.7), "after": score(0.6 + 0.01 * seed, 0.8), "gain_error": 0.015}
        (run.folder / "summary.json").write_text(json.dumps(summary))
    elif script == "self_reflection.py":
        summary = {"before": refinement(0.3), "after": refinement(0.4 + 0.01 * seed)}
        (run.folder / "summary.json").write_text(json.dumps(summary))
    elif script == "evaluate.py":
        Image.new("RGB", (24, 24), "red").save(run.folder / "image.png")
        rounds = int(run.command[run.command.index("--num_rounds") + 1]) if "--num_rounds" in run.command else 0
        modes = ["thought", *(f"round {turn + 1}" for turn in range(rounds))]
        passes = [index < (2 if "untrained" in run.name else 3) for index in range(4)]
        rows = [sample(m, i, s, passes[i], EDITS[i]) for m in modes for i in range(4) for s in range(2)]
        (run.folder / "samples.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif script == "table_parts/fewer_evaluations.py":
        row = {"name": "euler", "images": 10.0, "fewer": 1.0, "reward": 0.78, "difference": 0.0, "error": 0.0}
        row |= {"strict_pass_rate": 0.5, "spread": None}
        rows = [row if run.name.endswith("solvers") else row | {"name": "ab2", "spread": 0.17}]
        (run.folder / "costs.json").write_text(json.dumps(rows))
    elif script == "table_parts/frozen_rewards.py":
        found = {"DVReward": {"auc": 0.9, "error": 0.01}, "one question": {"auc": 0.8, "error": None}}
        (run.folder / "frozen_rewards.json").write_text(json.dumps(found))
    elif script == "table_parts/objectives/step_costs.py":
        seconds = {name: [2.0, 1.0] if "awm" in name else [1.0, 0.5] for name in ("default", *OTHER_OBJECTIVES)}
        (run.folder / "step_costs.json").write_text(json.dumps(seconds))
    elif script == "table_parts/time_to_quality/learning_curve.py":
        # A fast step takes half of the time and learns as much; a step on small batches learns less.
        step_seconds, gain = (1.0 if "fast" in run.name else 2.0), (0.1 if "released" in run.name else 0.2)
        rates = [0.5, 0.5 + gain / 2 + 0.01 * seed, 0.5 + gain + 0.01 * seed]
        points = [CurvePoint(step, step_seconds * step, r, r) for step, r in zip((0, 10, 20), rates, strict=True)]
        (run.folder / "curve.json").write_text(json.dumps([asdict(point) for point in points]))
    run.mark_finished()


def read_logs(file: Path) -> list[dict[str, Any]]:
    return [log for line in file.read_text().splitlines() if "reward" in (log := json.loads(line))]


def cells(page: Path, label: str) -> list[str]:
    lines = [line for line in page.read_text().splitlines() if line.startswith(f"| {label} |")]
    assert len(lines) == 1
    return [cell.strip() for cell in lines[0].split("|")[2:-1]]


def test_all_tables_are_made_of_the_files_of_runs(tmp_path: Path) -> None:
    assert tuple(TABLES) == TABLE_NAMES
    plan = plan_in(tmp_path)
    for run in all_runs(plan):
        write_results(run)
    save_pages(tmp_path, tables_of(plan))
    pages = {name: tmp_path / f"{name}.md" for name in TABLE_NAMES}
    assert all("not finished" not in page.read_text() for page in pages.values())
    assert (tmp_path / "tables.md").read_text() == "\n".join(page.read_text() for page in pages.values())
    gains = ["+10.0 +- 1.5", "+12.0 +- 1.5", "50.0% → **61.0%** (+11.0 (sd 1.4) points)", "0.700 → 0.800 (sd 0.000)"]
    assert cells(pages["training"], "image only, 80 steps") == gains
    assert cells(pages["categories"], "counting")[:2] == ["50.0% (sd 0.0)", "61.0% (sd 1.4)"]
    rates = ["60.0% +- 1.6", "62.0% +- 1.6", "61.0% (sd 1.4)", "0.800 (sd 0.000)"]
    assert cells(pages["objectives"], "`--sde_type flow_cps`") == [*rates, "0.75", "1.00"]
    # Ratios are those of runs beside each other.
    assert cells(pages["objectives"], f"`{' '.join(OTHER_OBJECTIVES['awm'])}`") == [*rates, "1.50", "2.00"]
    words = " ".join(OTHER_OBJECTIVES["awm_authors"])
    assert cells(pages["objectives_in_equal_time"], f"41 steps: `{words}`") == rates
    assert cells(pages["settings"], "untrained") == ["50.0% +- 1.6", "0.700 +- 0.007"]
    # Two of four prompts pass, with both seeds.
    assert cells(pages["guidance"], "not at all") == ["50.0% +- 28.9", "50.0% +- 28.9"]
    assert cells(pages["solvers"], "euler")[-1] == "" and cells(pages["rollouts"], "ab2")[-1] == "0.170"
    assert cells(pages["reflection"], "trained, seed 2")[1] == "10.0% → 52.0% (+42.0 +- 2.0)"
    assert cells(pages["reflection"], "**trained, mean of the seeds**")[1] == "10.0% → 51.0% (+41.0 (sd 1.4))"
    assert cells(pages["reflection"], "untrained")[2:] == ["90.0% / 0.0%", "40.0% / 30.0%"]
    tried = pages["reflection_settings"].read_text()
    assert tried.count("| 10.0% → 50.0% (+40.0 +- 2.0) | 90.0% / 0.0% | 40.0% / 40.0% |") == 10
    assert cells(pages["refine_strength"], "0.9") == ["50.0%", "50.0% (+0.0 +- 0.0)", "0.0%", "0.0%"]
    after_painting = cells(pages["refinement_after_painting"], "then refinement, seed 2")
    # The policy gives every image that passes the higher reward, but both images of a prompt pass alike.
    assert after_painting == ["75.0% +- 25.0", *["75.0% (+0.0 +- 0.0)"] * 3]
    assert (
        cells(pages["refinement_after_painting"], "**then refinement, mean of the seeds**")[1]
        == "75.0% (+0.0 (sd 0.0))"
    )
    assert cells(pages["rounds"], "untrained") == ["50.0% +- 28.9 (reward 0.625)"] * 4
    assert cells(pages["editing"], "trained on self-reflection, 2 seeds")[:5] == ["100.0%"] * 3 + [
        "0.0%",
        "75.0% (sd 0.0)",
    ]
    assert cells(pages["frozen_rewards"], "DVReward") == ["0.900 +- 0.010"]
    assert cells(pages["decomposed_or_holistic"], "one question") == (
        ["+25.0 +- 25.0"] * 2 + ["75.0% (sd 0.0)", "0.688 (sd 0.000)", "0.900", "0.800"]
    )
    # The way of seeds 0 and 2 of the default is from 50% to 71%: half of it is 60.5%.
    expected = ["1.00", "10 (9 to 10)", "18 (17 to 19)", "71.0% (70.0% to 72.0%)"]
    assert cells(pages["time_to_quality"], "text-to-image: `--preset fast`") == expected
    slower = cells(pages["time_to_quality"], "self-reflection: released code's, micro-batches of 2")
    assert slower == [
        "2.00",
        "not reached (34 to not reached)",
        "not reached",
        "61.0% (60.0% to 62.0%)",
    ]
    assert (tmp_path / "time_to_quality.png").is_file()
    with Image.open(tmp_path / "decomposed_or_holistic.png") as picture:
        assert picture.width > 6 * 144


def test_the_better_of_two_images_is_the_one_that_the_policy_prefers() -> None:
    passes = {(0, 0): True, (0, 1): False, (1, 0): False, (1, 1): True, (2, 0): False, (2, 1): False}
    pixels = ScoredSamples(
        [sample("thought", index, seed, strict, "color") for (index, seed), strict in passes.items()]
    )
    # Right for the first prompt, wrong for the second.
    own = ScoredSamples([row | {"reward": 1.0 - row["noise_seed"]} for row in pixels.rows])
    gain, error = _better_of_two(pixels, own)
    assert gain == pytest.approx(0)
    assert error == pytest.approx(stdev([0.5, -0.5, 0.0]) / 3**0.5)
    gain, _ = _better_of_two(pixels, pixels)
    assert gain == pytest.approx(1 / 3)


def test_right_and_wrong_images_are_compared_within_a_prompt() -> None:
    prompts, is_right = [0, 0, 0, 1, 1, 2], [True, False, False, True, False, True]
    # Two of prompt 0's pairs, the right one higher in one and equal in the other; prompt 2 has no pair, a missing value none either.
    values = [-1.0, -2.0, -1.0, -9.0, -8.0, -0.1]
    assert within_prompt_auc(prompts, is_right, values) == {
        "auc": pytest.approx(0.5),
        "error": pytest.approx(standard_error([0, 0, 1], [1.0, 0.5, 0.0])),
        "prompts": 2,
        "pairs": 3,
    }
    assert within_prompt_auc(prompts, is_right, [*values[:4], None, -0.1])["auc"] == 0.75
    with pytest.raises(ValueError, match="no prompt has a right and a wrong image"):
        within_prompt_auc([0, 1], [True, False], [0.0, 1.0])


def test_a_row_says_which_runs_are_missing_and_others_stay(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    for run in TABLES["training"](plan).runs:
        if run.name != "image_only-seed2":
            write_results(run)
    save_pages(tmp_path, {"training": TABLES["training"](plan)})
    assert cells(tmp_path / "training.md", "image only, 80 steps") == ["not finished: image_only-seed2", "", "", ""]
    assert cells(tmp_path / "training.md", "text only, 80 steps")[0] == "+10.0 +- 1.5"


def test_a_command_that_is_stopped_leaves_the_pages_of_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: RunQueue, runs: list[Run]) -> dict[str, str]:
        raise KeyboardInterrupt

    plan = plan_in(tmp_path)
    for run in TABLES["training"](plan).runs[:2]:
        write_results(run)
    monkeypatch.setattr(RunQueue, "run_all", stopped)
    arguments = TablesArguments(output_dir=str(tmp_path), seeds=[0, 2], num_parallel=2, only=["training"])
    assert main(arguments) == 130
    assert cells(tmp_path / "training.md", r"text and image (the default)")[0] == "+10.0 +- 1.5"
    assert "not finished" in (tmp_path / "tables.md").read_text()


def test_tables_share_runs_and_the_list_counts_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_in(tmp_path)
    tables = tables_of(plan)
    runs = {name: with_needs(table.runs) for name, table in tables.items()}
    assert runs["categories"] == list(plan.default_reasoning()) and set(runs["categories"]) <= set(
        runs["rounds"] + runs["editing"]
    )
    # A name stands for one command and one folder.
    assert (
        len({run.folder for run in all_runs(plan)}) == len(all_runs(plan)) == len({r.command for r in all_runs(plan)})
    )
    write_results(plan.default_reasoning()[0])
    assert main(TablesArguments(output_dir=str(tmp_path), seeds=[0, 2], num_parallel=2, list_tables=True)) == 0
    text = capsys.readouterr().out
    assert text.strip() == tables_overview(plan, tables)
    lines = {line.split()[0]: line.split() for line in text.splitlines()}
    assert lines["categories"] == ["categories", "2", "1", "2"] and lines["training"][1:3] == ["8", "7"]
    assert not (tmp_path / "tables.md").exists()


def test_runs_of_other_settings_or_of_a_replaced_model_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(resolve_model_path("bagel-shapes"), model)
    plan = plan_in(tmp_path / "tables", model_name_or_path=str(model))
    check_made_with(plan)
    check_made_with(plan)
    with pytest.raises(ValueError, match="runs with max_steps=None, and this command has 2: name another output_dir"):
        check_made_with(plan_in(tmp_path / "tables", model_name_or_path=str(model), max_steps=2))
    os.utime(model / "config.json", (0, 0))
    with pytest.raises(ValueError, match="holds runs with files of the model="):
        check_made_with(plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": ["trainig"]}, "only: unknown trainig; available: training"),
        ({"seeds": [1, 1]}, "seeds must be different numbers"),
        ({"seeds": []}, "at least one"),
        ({"num_parallel": 0}, "num_parallel must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TablesArguments(**changes)


def test_recipes_accept_the_arguments_of_every_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    training = (AlphaGRPOConfig, ModelConfig)
    parsers = {}
    for name in ("reasoning_t2i", "self_reflection"):
        config = ["--config", str(ROOT / "recipes" / "configs" / f"{name}_shapes.yaml")]
        parsers[f"{name}.py"] = (TrlParser((PromptArguments, *training), allow_abbrev=False), config)
    others = {
        "evaluate.py": EvaluationArguments,
        "decompose_prompts.py": load_recipe("decompose_prompts").DecompositionArguments,
        "table_parts/fewer_evaluations.py": MeasurementArguments,
        "table_parts/frozen_rewards.py": AgreementArguments,
    }
    config = ["--config", str(CONFIGS / "reasoning_t2i_shapes.yaml")]
    parsers["table_parts/objectives/step_costs.py"] = (
        TrlParser((CostArguments, *training), allow_abbrev=False),
        config,
    )
    curve = TrlParser((CurveArguments, *training), allow_abbrev=False)
    assert issubclass(others["decompose_prompts.py"], DecomposerArguments)
    parsers |= {name: (TrlParser((kind,), allow_abbrev=False), []) for name, kind in others.items()}
    # Its commands name their configuration.
    parsers["table_parts/time_to_quality/learning_curve.py"] = (curve, [])
    seen = set()
    for run in all_runs(plan_in(tmp_path, seeds=[0])):
        parser, config = parsers[run.command[0]]
        (_, *values) = parser.parse_args_and_config([*config, *run.command[1:]]) if config else (None, None)
        if not config:
            parser.parse_args_and_config(list(run.command[1:]))
        elif "awm" in run.name:
            assert values[0].image_epsilon == 1
        seen.add(run.command[0])
    assert seen == parsers.keys()


def test_seconds_until_a_rate_are_those_of_the_first_crossing() -> None:
    rates = [0.5, 0.6, 0.55, 0.7]
    curve = [CurvePoint(10 * i, 3.0 * i, rate, 0.0) for i, rate in enumerate(rates)]
    assert seconds_until(curve, 0.4) == seconds_until(curve, 0.5) == 0.0
    assert seconds_until(curve, 0.55) == pytest.approx(1.5)
    assert seconds_until(curve, 0.65) == pytest.approx(6 + 3 * 2 / 3)
    assert seconds_until(curve, 0.71) == float("inf")


def test_released_algorithm_has_the_batch_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parser = TrlParser((CurveArguments, AlphaGRPOConfig, ModelConfig))
    found = {}
    for run in TABLES["time_to_quality"](plan_in(tmp_path, seeds=[0])).runs:
        _, args, _ = parser.parse_args_and_config(list(run.command[1:]))
        assert args.generation_batch_size == 64
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 64
        split = (args.per_device_train_batch_size, args.image_steps_per_forward, args.context_gradient)
        work = (args.ode_steps, args.branches_per_thought, args.sde_window_size)
        found[run.name.removeprefix(f"curve_{args.task}_")] = (*split, *work)
    assert found == {
        "released_2-seed0": (2, 1, "detached", None, 1, 3),
        "released_8-seed0": (8, 1, "detached", None, 1, 3),
        "released_64-seed0": (64, 1, "detached", None, 1, 3),
        "paper-seed0": (64, "auto", "exact", None, 1, 3),
        "fast-seed0": (64, "auto", "exact", 3, 2, 3),
        "fast_awm-seed0": (64, "auto", "exact", 5, 1, 3),
        "fast_awm_2-seed0": (64, "auto", "exact", 5, 1, 2),
    }


@pytest.mark.slow
def test_curve_of_a_training_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The policy is evaluated before, on the way and after, and seconds are those of steps alone. A run that is stopped goes on from its
    last point.
    """
    config = [
        "--config",
        str(ROOT / "recipes" / "configs" / "self_reflection_shapes.yaml"),
        "--use_cpu",
        "--report",
        "false",
    ]
    amounts = [
        "--num_eval_prompts",
        "2",
        "--eval_seeds",
        "1",
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "4",
    ]
    sizes = ["--num_generations", "4", "--num_points", "2", "--preset", "fast", "--output_dir", str(tmp_path)]
    words = [*config, *amounts, *sizes, "--resume_from_checkpoint", "last"]
    parser = TrlParser((CurveArguments, AlphaGRPOConfig, ModelConfig))
    start = time.process_time()

    begin = LearningCurve.on_step_begin

    def interrupt(self: LearningCurve, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            raise KeyboardInterrupt
        begin(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LearningCurve, "on_step_begin", interrupt)
        learning_curve.main(*parser.parse_args_and_config(words))
    stopped = read_curve(tmp_path)
    learning_curve.main(*parser.parse_args_and_config(words))
    points = read_curve(tmp_path)
    assert points[:2] == stopped
    assert [point.step for point in points] == [0, 1, 2]
    assert 0 == points[0].seconds < points[1].seconds < points[2].seconds < time.process_time() - start
    assert all(0 <= point.strict_pass_rate <= 1 and 0 <= point.reward <= 1 for point in points)


@pytest.mark.slow
def test_costs_of_objectives_are_those_of_their_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_costs, "OTHER_OBJECTIVES", {"awm_fast": OTHER_OBJECTIVES["awm_fast"]})
    run = plan_in(tmp_path).objective_costs()
    few = ["--per_device_train_batch_size", "4", "--num_generations", "4", "--max_steps", "2", "--repetitions", "2"]
    start = time.process_time()
    step_costs.main([*run.command[1:], *few, "--use_cpu", "--bf16", "false", "--num_train_prompts", "16"])
    seconds = json.loads((run.folder / "step_costs.json").read_text())
    assert seconds.keys() == {"default", "awm_fast"}
    assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())
    assert sum(map(sum, seconds.values())) < time.process_time() - start


def test_presets_are_compared_on_the_same_prompts_and_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("--per_device_train_batch_size", "8", "--num_generations", "4", "--bf16", "false")
    settings = {"painting": ("reasoning_t2i", *few), "refining": ("self_reflection", *few)}
    monkeypatch.setattr(costs, "PRESET_SETTINGS", settings)
    run = plan_in(tmp_path, num_eval_prompts=8).costs("presets", minutes=1.0)
    (arguments,) = TrlParser((MeasurementArguments,)).parse_args_and_config(list(run.command[1:]))
    assert arguments.num_groups == 2
    measure_costs(arguments)
    rows = {row["name"]: row for row in json.loads((run.folder / "costs.json").read_text())}
    assert list(rows) == [f"{title}, `{preset}`" for title in settings for preset in ("paper", "fast")]
    painting = [rows[f"painting, `{preset}`"] for preset in ("paper", "fast")]
    # Two images of a thought share the steps before their window.
    assert painting[0]["images"] == 10 and 4 < painting[1]["images"] < 6
    assert painting[1]["fewer"] == 10 / painting[1]["images"]
    assert painting[0]["difference"] == 0 and painting[1]["difference"] == pytest.approx(
        painting[1]["reward"] - painting[0]["reward"], abs=1e-6
    )
    refining = rows["refining, `paper`"]
    # One first image for every two samples takes ten evaluations, too, and so does a repaint.
    assert 5 <= refining["images"] <= 15 and 0 <= refining["strict_pass_rate"] <= 1 and 0 < refining["reward"] <= 1


SCRIPT = """
import os, sys, time
folder = sys.argv[sys.argv.index("--output_dir") + 1]
os.makedirs(folder, exist_ok=True)
with open(os.path.join(folder, "tries"), "a") as file:
    file.write(f"{os.environ['OMP_NUM_THREADS']} {os.getpid()}\\n")
os.makedirs(os.path.join(folder, "checkpoint-20"), exist_ok=True)
print("said by", sys.argv[1])
time.sleep(float(sys.argv[2]))
sys.exit(int(sys.argv[3]))
"""


def small_run(folder: Path, name: str, seconds: float = 0, status: int = 0, needs: tuple[Run, ...] = ()) -> Run:
    words = (name, str(seconds), str(status), "--output_dir", str(folder / name))
    return Run(name, folder / name, ("small.py", *words), 0.1, needs)


@pytest.fixture
def small_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the runs of one small script."""
    (tmp_path / "small.py").write_text(SCRIPT)
    monkeypatch.setattr(execution, "RECIPES_FOLDER", tmp_path)
    return tmp_path / "runs"


def test_a_failed_run_is_named_and_others_go_on_and_are_not_repeated(small_recipes: Path, tmp_path: Path) -> None:
    good, bad = small_run(small_recipes, "good"), small_run(small_recipes, "bad", status=3)
    after_good = small_run(small_recipes, "after_good", needs=(good,))
    after_bad = small_run(small_recipes, "after_bad", needs=(bad,))
    last = small_run(small_recipes, "last", needs=(after_bad,))
    runs = with_needs([last, after_good])
    log = tmp_path / "logs" / "bad.log"
    expected = {
        "bad": f"failed with status 3: {log}",
        "after_bad": "not started, because bad failed",
        "last": "not started, because after_bad failed",
    }
    for attempt in (1, 2):
        assert RunQueue(tmp_path / "logs", 2).run_all(runs) == expected
        assert log.read_text() == "said by bad\n" * attempt
    assert good.finished and after_good.finished and not bad.finished and not last.folder.exists()
    assert (good.folder / "tries").read_text().startswith("1 ")
    assert len((good.folder / "tries").read_text().splitlines()) == 1
    # What only a run that goes on needs is kept where it may go on.
    assert not (good.folder / "checkpoint-20").exists() and (bad.folder / "checkpoint-20").exists()
    changed = small_run(small_recipes, "good", seconds=0.01)
    assert not changed.finished
    assert not small_run(small_recipes, "after_good", needs=(changed,)).finished


def test_an_interrupted_queue_ends_its_processes(small_recipes: Path, tmp_path: Path) -> None:
    run = small_run(small_recipes, "long", seconds=600)
    tries = run.folder / "tries"

    def interrupt() -> None:
        while not (tries.is_file() and tries.read_text().endswith("\n")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt), execution.interrupted_by_termination():
        RunQueue(tmp_path / "logs", 1).run_all([run])
    process = int(tries.read_text().split()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert not run.finished


@pytest.mark.slow
@pytest.mark.low_priority
def test_command_runs_trains_by_all_rewards_and_goes_on(tmp_path: Path) -> None:
    words = [
        "--only",
        "categories",
        "decomposed_or_holistic",
        "--seeds",
        "0",
        "--max_steps",
        "1",
        "--num_eval_prompts",
        "2",
    ]
    command = [sys.executable, str(ROOT / "recipes" / "reproduce_tables.py"), *words]
    for _ in range(2):
        result = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert "all runs are finished" in result.stdout
    folder = tmp_path / "runs" / "tables"
    assert "not finished" not in (folder / "tables.md").read_text()
    assert len(cells(folder / "decomposed_or_holistic.md", "both")) == 5
    # The judge prefers yes or no for every image, whatever it was taught to be asked.
    (log,) = read_logs(folder / "runs" / "by_one_question-seed0" / "metrics.jsonl")
    assert log["judge/failed_frac"] == 0 and 0 < log["reward"] < 1
    assert (folder / "decomposed_or_holistic.png").is_file()
    # The second command repeated nothing.
    assert (folder / "logs" / "reasoning-seed0.log").read_text().count("Before training") == 1
