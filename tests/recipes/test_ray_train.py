# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
from safetensors.torch import load_file

from alphagrpo_ext.trainer.resume.checkpoint_folder import DamagedCheckpointError, write_manifest
from recipe_tools import ray_job, recipe_arguments
from recipe_tools.recipe_arguments import UnknownArgumentError


ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "ray_train.py"
DEADLINE = 900.0

# A few seconds of work. Two workers share every group.
TINY = (
    *("--eval_seeds", "0", "--num_train_prompts", "16", "--max_completion_length", "8", "--num_timesteps", "6"),
    *("--sde_window_size", "2", "--sde_window_range", "0", "4", "--bf16", "false", "--logging_steps", "1"),
    *("--max_grad_norm", "0", "--num_eval_prompts", "4", "--disable_tqdm", "true"),
    # The step of plain gradient descent is the gradient; Adam's is its sign, which turns rounding into whole steps.
    *("--optim", "sgd"),
)
NATIVE = ("--per_device_train_batch_size", "4", "--num_generations", "4", "--learning_rate", "1e-1")
DOTTED = (
    *("--rollout.batch_size", "2", "--rollout.n_samples_per_prompt", "4", "--train.batch_size", "8"),
    *("--train.micro_batch_size", "4", "--actor.adam.lr", "1e-1"),
)


def environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray starts workers with a niceness of 15, which on a busy machine is minutes for an import.
        "RAY_worker_niceness": "0",
    }


@pytest.fixture(scope="module")
def ray_train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ray_train", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def start(log: Path, *arguments: str) -> Iterator[subprocess.Popen]:
    """The recipe in a process of its own, which is gone at the end with all that it started."""
    command = [sys.executable, str(RECIPE), "--num_workers", "2", *TINY, *arguments]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment(), stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
    started: list[psutil.Process] = []
    try:
        yield process
    finally:
        if process.poll() is None:
            started = psutil.Process(process.pid).children(recursive=True)
            process.kill()
        process.wait()
        for child in started:
            if child.is_running():
                child.kill()


def wait(process: subprocess.Popen, log: Path) -> str:
    process.wait(timeout=DEADLINE)
    output = log.read_text()
    assert process.returncode == 0, output[-20000:]
    return output


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def test_arguments_are_checked_before_ray_starts() -> None:
    recipe = recipe_arguments.load_recipe(recipe_arguments.find_recipe("self_reflection"))
    settings = recipe_arguments.read_settings(recipe, ["--learning_rate", "1e-5", "--formats", "think"])
    assert settings.learning_rate == 1e-5
    # Of the recipe's own configuration.
    assert settings.task == "self_reflection"
    other = str(recipe_arguments.RECIPES / "configs" / "reasoning_t2i_shapes.yaml")
    for spelling in (["--config", other], [f"--config={other}"]):
        assert recipe_arguments.read_settings(recipe, spelling).task == "reasoning_t2i"
        assert recipe_arguments.with_config(recipe, spelling) == ["--config", other]
    with pytest.raises(UnknownArgumentError, match="unknown argument --learnin_rate: did you mean --learning_rate?"):
        recipe_arguments.read_settings(recipe, ["--learnin_rate", "1e-5"])
    with pytest.raises(UnknownArgumentError, match="did you mean --num_workers?"):
        recipe_arguments.read_settings(recipe, ["--num_worker", "2"], ["num_workers"])


def test_unknown_names_in_a_configuration_are_found(tmp_path: Path) -> None:
    recipe = recipe_arguments.load_recipe(recipe_arguments.find_recipe("reasoning_t2i"))
    config = tmp_path / "config.yaml"
    config.write_text("learning_rat: 1.0e-5\n")
    with pytest.raises(UnknownArgumentError, match="--learning_rat"):
        recipe_arguments.read_settings(recipe, ["--config", str(config)])


def test_recipes_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    path = ROOT / "recipes" / "reasoning_t2i.py"
    assert recipe_arguments.find_recipe("reasoning_t2i") == path
    assert recipe_arguments.find_recipe(str(path)) == path
    with pytest.raises(ValueError, match="did you mean 'reasoning_t2i'.*reasoning_t2i, self_reflection"):
        recipe_arguments.find_recipe("reasoning_t2")
    other = tmp_path / "other.py"
    other.write_text("def main(args: dict) -> None:\n    pass\n")
    with pytest.raises(ValueError, match="does not train"):
        recipe_arguments.load_recipe(other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": 0}, "num_workers must be at least 1"),
        ({"max_failures": -1}, "max_failures must not be negative"),
        ({"environment": ["WANDB_PROJECT"]}, "NAME=VALUE"),
        ({"environment": ["WANDB_API_KEY=0123"]}, "must not hold WANDB_API_KEY"),
    ],
)
def test_ray_arguments_are_validated(ray_train: ModuleType, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ray_train.RayArguments(**settings)
    assert "0123" not in str(error.value)


def test_a_restart_never_takes_the_checkpoint_of_another_run(tmp_path: Path) -> None:
    def checkpoint(folder: Path, step: int) -> Path:
        path = folder / f"checkpoint-{step}"
        path.mkdir(parents=True)
        write_manifest(path, step, num_processes=1)
        return path

    other, output = checkpoint(tmp_path / "other", 3), tmp_path / "run"
    assert ray_job.choose_initial_checkpoint(output, None) is None
    assert ray_job.choose_initial_checkpoint(output, "last") is None
    assert ray_job.choose_initial_checkpoint(output, str(other)) == str(other)
    earlier, last = checkpoint(output, 5), checkpoint(output, 20)
    # A checkpoint that a failure left unfinished does not count.
    (output / "checkpoint-25").mkdir()
    for resume_from in ("last", "true", str(last)):
        assert ray_job.choose_initial_checkpoint(output, resume_from) == str(last)
    with pytest.raises(ValueError, match="checkpoint-20 of an earlier run.*--resume_from_checkpoint last"):
        ray_job.choose_initial_checkpoint(output, None)
    with pytest.raises(ValueError, match="checkpoint-20, from which a restart would continue"):
        ray_job.choose_initial_checkpoint(output, str(earlier))
    for path in (tmp_path / "no-such", output / "checkpoint-25"):
        with pytest.raises(DamagedCheckpointError, match=path.name):
            ray_job.choose_initial_checkpoint(output, str(path))


def test_attempts_are_told_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    starts = [None, None, "/run/checkpoint-2"]
    path.write_text("".join(json.dumps({"resumed_from": start}) + "\n" for start in starts))
    sentence = ray_job.describe_attempts(path, Path("/run"))
    assert sentence == "Finished after 2 restarts, from the start, checkpoint-2: /run"


@pytest.mark.slow
@pytest.mark.low_priority
def test_two_workers_train_as_two_launched_processes(tmp_path: Path) -> None:
    arguments = ("--max_steps", "2", "--save_strategy", "no")
    log = tmp_path / "log"
    with start(log, *DOTTED, *arguments, "--ckpt.output_dir", str(tmp_path / "ray")) as process:
        assert "Finished without a restart" in wait(process, log)
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    command = [sys.executable, *launch, str(ROOT / "recipes" / "reasoning_t2i.py"), *TINY, *NATIVE, *arguments]
    command += ["--output_dir", str(tmp_path / "launched")]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=ROOT, timeout=DEADLINE)
    assert result.returncode == 0, result.stderr

    by_ray, launched = (load_file(tmp_path / name / "model.safetensors") for name in ("ray", "launched"))
    start_weights = load_file(ROOT / "alphagrpo_ext" / "shapes" / "checkpoint" / "model.safetensors")
    assert by_ray.keys() == launched.keys()
    for name, weight in launched.items():
        torch.testing.assert_close(by_ray[name], weight, rtol=0, atol=1e-5, msg=name)
    moved = [name for name in launched if not launched[name].float().equal(start_weights[name].float())]
    assert len(moved) > 50
    # What they did on the way is the same, too, and both processes took part: eight rollouts a step.
    for name in ("ray", "launched"):
        entries = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in entries if "reward" in entry] == [1, 2]
    assert not list((tmp_path / "ray").glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.low_priority
def test_a_run_outlives_a_killed_worker(tmp_path: Path) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    with start(
        log, *DOTTED, "--max_steps", "8", "--ckpt.save_steps", "1", "--ckpt.output_dir", str(output)
    ) as process:
        deadline = time.monotonic() + DEADLINE
        while not (output / "checkpoint-2" / "trainer_state.json").exists():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-20000:]
            time.sleep(0.1)
        victim = workers_of(process)[-1]
        victim.send_signal(signal.SIGKILL)
        text = wait(process, log)
    assert "Finished after 1 restart, from checkpoint-" in text
    (attempts,) = output.glob("ray_*/attempts.jsonl")
    first, second = [json.loads(line) for line in attempts.read_text().splitlines()]
    assert first["resumed_from"] is None
    step = int(second["resumed_from"].rpartition("-")[2])
    assert 2 <= step < 8
    state = json.loads((output / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["global_step"] == 8
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps.count(8) >= 1 and steps.count(step) == 1
    assert not any(weight.isnan().any() for weight in load_file(output / "model.safetensors").values())
