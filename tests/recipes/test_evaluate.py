# SPDX-License-Identifier: Apache-2.0


import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from alphagrpo_ext.models.adapters import save_adapter
from alphagrpo_ext.models.loading import PACKAGED_CHECKPOINTS, load_model
from alphagrpo_ext.models.saving import save_model
from alphagrpo_ext.shapes.editing import editing_rows
from support.recipe_modules import load_recipe, run_recipe


ROOT = Path(__file__).parents[2]
RECIPE = load_recipe("evaluate")


def start(output_dir: Path, *arguments: str | Path, launch: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [*launch, ROOT / "recipes" / "evaluate.py", *arguments, "--output_dir", output_dir]
    output_dir.mkdir(parents=True, exist_ok=True)
    with output_dir.with_suffix(".txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )


def run_process(output_dir: Path, *arguments: str | Path, launch: tuple[str, ...] = ()) -> str:
    process = start(output_dir, *arguments, launch=launch)
    code = process.wait(timeout=600)
    output = output_dir.with_suffix(".txt").read_text()
    assert code == 0, output[-3000:]
    return output


def run(output_dir: Path, *options: str | Path) -> None:
    run_recipe(RECIPE, RECIPE.EvaluationArguments, *options, "--output_dir", output_dir)


def content(output_dir: Path) -> dict[str, Any]:
    return json.loads((output_dir / "evaluation.json").read_text())


def make_adapter(folder: Path) -> Path:
    model, _ = load_model("bagel-shapes")
    # What one process saves, another finds by this name.
    model.name_or_path = "bagel-shapes"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj_moe_gen"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = "bagel-shapes"
    save_adapter(adapted, folder)
    return folder


@pytest.mark.slow
def test_rounds_stop_by_a_threshold_that_is_calibrated_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = load_model("bagel-shapes")
    save_model(model, processor, tmp_path / "model")
    arguments = (
        *("--models", tmp_path / "model", "--num_rounds", "2", "--num_eval_prompts", "7", "--eval_seeds", "1"),
        *("--num_timesteps", "4", "--allow_stop"),
    )
    run(tmp_path / "out", *arguments, "--calibrate_stop", "7")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    threshold = config["sampling"]["stop_threshold"]
    output = capsys.readouterr().out
    assert f"stop_threshold {threshold:.4f} from 7 images" in output
    # What is calibrated is found again, and another threshold is another evaluation.
    run(tmp_path / "again", *arguments)
    assert content(tmp_path / "again")["evaluations"] == content(tmp_path / "out")["evaluations"]
    run(tmp_path / "again", *arguments, "--stop_threshold", "0.0")
    assert "of right: kept" in capsys.readouterr().out
    *_, last = content(tmp_path / "again")["evaluations"]
    first = content(tmp_path / "again")["evaluations"][0]
    assert (last["mode"], last["total"]) == ("round 2", first["total"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--calibrate_stop", "7"), "set allow_stop"),
        (("--calibrate_stop", "7", "--allow_stop", "--stop_threshold", "0.5"), "and no stop_threshold"),
        (("--stop_threshold", "0.5"), "needs allow_stop"),
        (("--calibration_file", "a.jsonl"), "needs calibrate_stop"),
    ],
)
def test_what_a_threshold_needs_is_said(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "--num_rounds", "1", *arguments)


def test_checkpoint_and_adapter_are_compared_in_all_modes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    arguments = ("--num_eval_prompts", "7", "--eval_seeds", "1", "--num_timesteps", "4")
    run(
        *(tmp_path / "out", "--models", "bagel-shapes", adapter, "bagel-shapes"),
        *("--modes", "direct", "thought", "refine", "--num_rounds", "1", *arguments),
    )
    results = content(tmp_path / "out")
    modes = ["direct", "thought", "round 1"]
    assert [(e["model"], e["mode"]) for e in results["evaluations"]] == [
        (model, mode) for model in ("bagel-shapes", str(adapter)) for mode in modes
    ]
    assert [comparison["mode"] for comparison in results["comparisons"]] == modes
    for entry in results["evaluations"]:
        assert entry["total"]["reward"]["num_samples"] == 7
        assert len(entry["categories"]) == 7
        assert (entry["refinement"] is not None) == (entry["mode"] == "round 1")
    # With random weights it paints something else.
    assert results["comparisons"][1]["differences"][0]["reward"]["difference"]["value"] != 0
    assert f"bagel-shapes -> {adapter}, thought" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 3 * 7
    assert all((tmp_path / "out" / line["image"]).is_file() for line in lines)
    assert {line["mode"] for line in lines if line["thought"]} == {"thought", "round 1"}


def test_images_of_a_file_are_edited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = editing_rows(3, seed=1)
    for index, row in enumerate(rows):
        row["image"].save(tmp_path / f"{index}.png")
        row["image"] = f"{index}.png"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--task", "image_editing", "--eval_seeds", "1", "--num_timesteps", "3")
    run(tmp_path / "file", *arguments, "--eval_file", prompts)
    (entry,) = content(tmp_path / "file")["evaluations"]
    assert [category["name"] for category in entry["categories"]] == [row["category"] for row in rows]
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"line 2: .*1.png: .*--skip_broken_rows"):
        run(tmp_path / "broken", *arguments, "--eval_file", prompts)
    run(tmp_path / "skipped", *arguments, "--eval_file", prompts, "--skip_broken_rows")
    (entry,) = content(tmp_path / "skipped")["evaluations"]
    assert entry["total"]["reward"]["num_samples"] == 2
    assert (
        f"Rows that were left out, because their image cannot be read:\n{prompts}, line 2: " in capsys.readouterr().out
    )
    for row in rows:
        del row["image"]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="has no images, which task 'image_editing' needs"):
        run(tmp_path / "none", *arguments, "--eval_file", prompts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--modes", "refine"), "mode 'refine' and num_rounds go together"),
        (("--modes", "direct", "--num_rounds", "1"), "mode 'refine' and num_rounds go together"),
        (("--modes", "painted"), "modes must be among"),
    ],
)
def test_modes_that_do_not_fit_are_refused(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *arguments)


SETTINGS = ("--num_rounds", "1", "--num_eval_prompts", "42", "--eval_seeds", "1", "--batch_size", "4")
NUM_BATCHES = 11


def num_lines(output_dir: Path) -> int:
    """Scored batches, and a head a stage."""
    return sum(path.read_bytes().count(b"\n") for path in output_dir.rglob("batches-*.jsonl"))


def test_settings_of_a_task_reach_its_stages_alone(tmp_path: Path) -> None:
    """Rounds of reflection are painted anew when their guidance changes, and the first images are kept."""
    arguments = ("--num_rounds", "1", "--num_eval_prompts", "3", "--eval_seeds", "1", "--num_timesteps", "3")
    run(tmp_path, *arguments)
    before = content(tmp_path)["evaluations"]
    files = {name: next(tmp_path.rglob(f"{name}/batches-0.jsonl")) for name in ("thought", "round_1")}
    written = {name: path.stat().st_mtime_ns for name, path in files.items()}
    own = {"self_reflection": {"cfg_text_scale": 5.0, "num_timesteps": 4}}
    run(tmp_path, *arguments, "--task_settings", json.dumps(own))
    assert files["thought"].stat().st_mtime_ns == written["thought"]
    assert files["round_1"].stat().st_mtime_ns != written["round_1"]
    after = content(tmp_path)
    assert after["settings"]["task_settings"] == own
    assert after["evaluations"][0]["total"] == before[0]["total"]


@pytest.mark.slow
def test_killed_evaluation_goes_on_and_equals_a_whole_one(tmp_path: Path) -> None:
    run_process(tmp_path / "whole", *SETTINGS)
    killed = tmp_path / "killed"
    for least in (3, NUM_BATCHES + 6):
        process = start(killed, *SETTINGS)
        deadline = time.monotonic() + 300
        while num_lines(killed) < least:
            assert process.poll() is None and time.monotonic() < deadline, killed.with_suffix(".txt").read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (killed / "evaluation.json").exists()
    assert num_lines(killed) < 2 * (NUM_BATCHES + 1)
    run_process(killed, *SETTINGS)
    assert num_lines(killed) == 2 * (NUM_BATCHES + 1)
    assert content(killed) == content(tmp_path / "whole")
    for name in ("samples.jsonl", "summary.csv"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    images = sorted(path.relative_to(killed) for path in killed.rglob("*.png"))
    assert len(images) == 2 * 42
    assert all((killed / path).read_bytes() == (tmp_path / "whole" / path).read_bytes() for path in images)


@pytest.mark.slow
@pytest.mark.low_priority
def test_more_models_and_rounds_add_what_is_new_and_changed_weights_begin_anew(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(PACKAGED_CHECKPOINTS["bagel-shapes"], checkpoint)
    arguments = ("--num_eval_prompts", "7", "--eval_seeds", "1", "--num_timesteps", "3")
    out = tmp_path / "out"
    run_process(out, "--models", checkpoint, *arguments)
    (first,) = out.rglob("thought/batches-0.jsonl")
    written = first.stat().st_mtime_ns
    run_process(out, "--models", checkpoint, "bagel-shapes", *arguments, "--num_rounds", "1")
    assert first.stat().st_mtime_ns == written
    entries = content(out)["evaluations"]
    assert entries[0]["total"] == entries[2]["total"]
    (checkpoint / "model.safetensors").touch()
    output = run_process(out, "--models", checkpoint, *arguments)
    assert "made with other settings and is made anew" in output
    assert first.stat().st_mtime_ns != written
    assert content(out)["evaluations"][0]["total"] == entries[0]["total"]


@pytest.mark.slow
@pytest.mark.low_priority
def test_two_processes_share_the_work(tmp_path: Path) -> None:
    arguments = ("--num_eval_prompts", "14", "--eval_seeds", "1", "--batch_size", "4", "--num_rounds", "1")
    run_process(tmp_path / "one", *arguments)
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_processes", "2")
    run_process(tmp_path / "two", *arguments, launch=launch)
    files = {path: path.read_bytes() for path in (tmp_path / "two").rglob("batches-*.jsonl")}
    assert len(files) == 2 * 2
    for one, two in zip(
        content(tmp_path / "one")["evaluations"], content(tmp_path / "two")["evaluations"], strict=True
    ):
        assert two["total"]["reward"]["num_samples"] == 14
        # Batches of other samples round otherwise.
        assert two["total"]["reward"]["value"] == pytest.approx(one["total"]["reward"]["value"], abs=0.02)
    run_process(tmp_path / "two", *arguments, launch=launch)
    assert all(path.read_bytes() == content for path, content in files.items())
