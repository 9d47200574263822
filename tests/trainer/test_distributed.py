# SPDX-License-Identifier: Apache-2.0

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.report import ReportStore


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate_configs"
TRAIN = ROOT / "tests" / "support" / "train_steps.py"
LAUNCH_ON_CPU = ROOT / "tests" / "support" / "launch_on_cpu.py"
# What accelerate makes of each file, without accelerators; the others do shard there.
DISTRIBUTED_TYPES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


def run(backend: str | None, script: Path, *arguments: str | Path) -> str:
    """Runs a script in one process, or in two as a file of accelerate's settings says, in fp32. Returns its output."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable]
    if backend is not None:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{backend}.yaml")]
        command += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0", str(LAUNCH_ON_CPU)]
    if backend not in (None, "ddp"):
        environment |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    command += [str(script), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


@dataclass(frozen=True)
class Run:
    """
    Args:
        outcome (`dict`): What the processes saw; see `train_steps.Outcome`.
        path (`Path`): Folder of the run.
    """

    outcome: dict[str, Any]
    path: Path

    def weights(self) -> dict[str, torch.Tensor]:
        (file,) = (self.path / "model").glob("*.safetensors")
        return load_file(file)


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory,
    make_shapes_bagel: Callable[[], BagelModel],
    shapes_processor: BagelProcessor,
) -> Path:
    """Checkpoint that all runs start from."""
    path = tmp_path_factory.mktemp("base")
    make_shapes_bagel().save_pretrained(path)
    shapes_processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def train(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Trains 8 trajectories a step, as `train_steps.py` does."""

    def train(backend: str | None, **settings: Any) -> Run:
        path = tmp_path_factory.mktemp(backend or "one")
        settings["per_device_train_batch_size"] = 8 if backend is None else 4
        if backend in ("zero2", "zero3"):
            settings["ddp_backend"] = "gloo"
        run(backend, TRAIN, base, path, json.dumps(settings))
        return Run(json.loads((path / "outcome.json").read_text()), path)

    return train


TASKS = {
    "t2i": {"task": "reasoning_t2i"},
    "reflection": {"task": "self_reflection"},
    # In some steps one process has an image to look at and the other has none.
    "mixed": {"tasks": ["self_reflection", "reasoning_t2i"]},
    # Rollouts are those of a reference that follows, which is sharded, too, as is the model before training.
    "following": {
        "rollout_policy": "reference",
        "image_base_beta": 0.1,
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 0.5,
    },
}


@pytest.fixture(scope="module")
def trained_alone(train: Callable[..., Run]) -> Callable[[str], Run]:
    """Three steps of one process on the tasks of that name."""
    return functools.cache(lambda tasks: train(None, max_steps=3, **TASKS[tasks]))


@pytest.mark.slow
@pytest.mark.invariant
@pytest.mark.parametrize(
    "backend, tasks, gradient_checkpointing",
    [
        ("ddp", "t2i", False),
        ("ddp", "reflection", False),
        pytest.param("zero2", "t2i", False, marks=pytest.mark.low_priority),
        pytest.param("zero3", "t2i", True, marks=pytest.mark.low_priority),
        pytest.param("zero3", "mixed", False, marks=pytest.mark.low_priority),
        pytest.param("fsdp2", "t2i", True, marks=pytest.mark.low_priority),
        pytest.param("fsdp2", "reflection", False, marks=pytest.mark.low_priority),
        pytest.param("fsdp2", "mixed", False, marks=pytest.mark.low_priority),
        pytest.param("ddp", "following", False, marks=pytest.mark.low_priority),
        pytest.param("zero3", "following", False, marks=pytest.mark.low_priority),
        pytest.param("fsdp2", "following", False, marks=pytest.mark.low_priority),
    ],
)
def test_two_processes_train_as_one(
    base: Path,
    train: Callable[..., Run],
    trained_alone: Callable[[str], Run],
    backend: str,
    tasks: str,
    gradient_checkpointing: bool,
) -> None:
    one = trained_alone(tasks)
    two = train(backend, max_steps=3, gradient_checkpointing=gradient_checkpointing, **TASKS[tasks])
    assert (one.outcome["num_processes"], two.outcome["num_processes"]) == (1, 2)
    assert two.outcome["distributed_type"] == DISTRIBUTED_TYPES[backend]

    assert len(two.outcome["rollouts"]) == len(one.outcome["rollouts"]) == 3 * 8
    for (task, reward, *actions), expected in zip(two.outcome["rollouts"], one.outcome["rollouts"], strict=True):
        assert [task, *actions] == [expected[0], *expected[2:]]
        assert reward == pytest.approx(expected[1], abs=1e-3)
    if tasks == "mixed":
        names = [name for name, *_ in two.outcome["rollouts"]]
        assert any(names[i] != names[i + 4] for i in range(0, len(names), 8))

    for run in (one, two):
        scored, sampled = run.outcome["scored_log_probs"], run.outcome["sampled_log_probs"]
        assert len(scored) == len(sampled) == 3
        # Later rollouts of a reference that follows are not the policy's.
        num_compared = 1 if tasks == "following" else 3
        np.testing.assert_allclose(scored[:num_compared], sampled[:num_compared], atol=1e-4)

    (whole,) = one.outcome["num_parameters"]
    shares = [held / whole for held in two.outcome["num_parameters"]]
    # FSDP2 leaves the autoencoder whole, a sixth of this model.
    assert all(share < 0.6 if backend in ("fsdp2", "zero3") else share == 1.0 for share in shares)

    # The saved model is whole, and in the layout that one process loads.
    model, _ = load_model(two.path / "model")
    before, alone, together = load_file(base / "model.safetensors"), one.weights(), model.state_dict()
    assert set(together) == set(alone) == set(before)
    moved = [name for name, weight in before.items() if (alone[name] != weight).any()]
    assert len(moved) > 50
    # Images that rounding has moved by a grey level are context in self-reflection, and rewards see them.
    tolerance = 5e-3 if tasks == "reflection" else 1e-3
    for name in moved:
        error = (together[name] - alone[name]).norm() / (alone[name] - before[name]).norm()
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, settings",
    [
        ("ddp", {}),
        pytest.param("ddp", {"lora": True, "gradient_checkpointing": True}, marks=pytest.mark.low_priority),
        pytest.param("zero2", {}, marks=pytest.mark.low_priority),
        pytest.param("fsdp2", {}, marks=pytest.mark.low_priority),
    ],
    ids=["ddp", "ddp lora", "zero2", "fsdp2"],
)
def test_split_steps_train_as_one_forward(train: Callable[..., Run], backend: str, settings: dict[str, Any]) -> None:
    whole, parts = (train(backend, max_steps=2, image_steps_per_forward=steps, **settings) for steps in ("all", 1))
    if backend == "ddp":
        assert whole.outcome["exchanges"] == [True, True]
        # Two trained steps in two forwards. The first backward of an optimizer step keeps its gradients.
        assert parts.outcome["exchanges"] == [False, True, False, True]
    expected, actual = whole.weights(), parts.weights()
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, settings",
    [
        ("ddp", {}),
        pytest.param("ddp", {"lora": True, "image_beta": 0.1}, marks=pytest.mark.low_priority),
        pytest.param("zero2", {"image_beta": 0.1}, marks=pytest.mark.low_priority),
        pytest.param("fsdp2", {"image_beta": 0.1, "image_steps_per_forward": 1}, marks=pytest.mark.low_priority),
    ],
    ids=["ddp", "ddp lora", "zero2", "fsdp2"],
)
def test_processes_train_together_where_one_paints_nothing(
    train: Callable[..., Run], backend: str, settings: dict[str, Any]
) -> None:
    settings = {"task": "self_reflection", "stops": True, "max_steps": 2} | settings
    one, two = train(None, **settings), train(backend, **settings)
    painted = [start is not None for _, _, start, _ in two.outcome["rollouts"]]
    by_process = [sum(painted[i : i + 4]) for i in range(0, len(painted), 4)]
    assert len(by_process) == 4 and 0 in by_process and max(by_process) > 0, by_process
    assert [(start, text) for _, _, start, text in one.outcome["rollouts"]] == [
        (start, text) for _, _, start, text in two.outcome["rollouts"]
    ]
    together = two.weights()
    for name, weight in one.weights().items():
        torch.testing.assert_close(together[name], weight, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.low_priority
@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_rollout_gathers_parameters_once(train: Callable[..., Run], backend: str) -> None:
    short = train(backend, max_steps=2, max_completion_length=2, num_timesteps=4, sde_window_range=[0, 3])
    long = train(backend, max_steps=2, max_completion_length=40, num_timesteps=12)
    gathers = short.outcome["gathers"]
    assert len(gathers) == 2 and gathers == long.outcome["gathers"]
    # FSDP2 gathers a wrapped module at once, and DeepSpeed a parameter.
    most = short.outcome["num_wrapped"] if backend == "fsdp2" else len(short.weights())
    assert all(0 < count <= most for count in gathers)


@pytest.mark.slow
@pytest.mark.low_priority
@pytest.mark.parametrize(
    "backend, lora, tasks",
    [
        ("ddp", False, "t2i"),
        ("zero2", True, "t2i"),
        ("zero3", False, "t2i"),
        ("fsdp2", False, "t2i"),
        ("fsdp2", True, "t2i"),
        ("zero3", False, "following"),
        ("fsdp2", False, "following"),
        ("fsdp2", True, "following"),
    ],
)
def test_checkpoint_of_several_processes_resumes(
    train: Callable[..., Run], backend: str, lora: bool, tasks: str
) -> None:
    # With an optimizer that has a state, which is sharded too.
    settings = {"max_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-3, "lora": lora, **TASKS[tasks]}
    straight = train(backend, save_strategy="steps", save_steps=2, **settings)
    resumed = train(backend, resume=str(straight.path / "run" / "checkpoint-2"), **settings)
    assert len(resumed.outcome["rollouts"]) == 8
    assert resumed.outcome["rollouts"] == straight.outcome["rollouts"][-8:]
    expected, actual = straight.weights(), resumed.weights()
    assert set(actual) == set(expected)
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())


@pytest.mark.slow
@pytest.mark.low_priority
def test_recipe_evaluates_a_sharded_policy_as_a_whole_one(tmp_path: Path) -> None:
    def summary(backend: str | None, batch_size: int, *arguments: str) -> dict[str, Any]:
        output = tmp_path / (backend or "one")
        run(
            *(backend, ROOT / "recipes" / "reasoning_t2i.py", "--bf16", "false", "--learning_rate", "1e-3"),
            *("--max_steps", "1", "--warmup_steps", "0", "--per_device_train_batch_size", str(batch_size)),
            *("--num_train_prompts", "16", "--num_eval_prompts", "14", "--eval_seeds", "1", "--eval_questions", "70"),
            *("--max_completion_length", "20", "--output_dir", output, *arguments),
        )
        return json.loads((output / "summary.json").read_text())

    alone = summary(None, 16)
    for backend, arguments in (("zero3", ("--ddp_backend", "gloo")), ("fsdp2", ())):
        sharded = summary(backend, 8, *arguments)
        for moment in ("before", "after"):
            assert sharded[moment]["num_samples"] == alone[moment]["num_samples"] == 14
            assert sharded[moment]["reward"] == pytest.approx(alone[moment]["reward"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.low_priority
def test_group_of_two_processes_is_whole_in_the_report(train: Callable[..., Run]) -> None:
    """Each process has one half of the only group."""
    settings = {"num_generations": 8, "report": True}
    (expected,), (group,) = (
        ReportStore(train(backend, **settings).path / "run").groups() for backend in (None, "ddp")
    )
    assert len(group.trajectories) == 8
    assert [t.reward for t in group.trajectories] == pytest.approx([t.reward for t in expected.trajectories], abs=1e-4)
    assert (group.prompt, group.step) == (expected.prompt, expected.step)
    assert [t.turns[0].text for t in group.trajectories] == [t.turns[0].text for t in expected.trajectories]
