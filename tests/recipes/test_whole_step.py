# SPDX-License-Identifier: Apache-2.0

"""Whole steps of the benchmark: what is compared, and that no row is lost. Nothing here is timed."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from alphagrpo_ext.trainer import AlphaGRPOTrainer
from benchmark_parts import measurements
from benchmark_parts.sizes import SIZES
from benchmark_parts.tables import ResultTable
from benchmark_parts.whole_step import comparison
from benchmark_parts.whole_step.comparison import STEP_COLUMNS, algorithms, brightness, compared_steps, whole_steps
from benchmark_parts.whole_step.trainers import WholeStep, make_step_trainer
from table_parts.time_to_quality.table import ALGORITHMS


SMALLEST = replace(SIZES["bagel-shapes"], num_trajectories=2)


def test_both_tasks_are_measured_with_one_prompt_and_with_several() -> None:
    steps = whole_steps(SIZES["bagel-shapes"])
    cases = {(step.task, step.lora_rank, step.num_samples // step.group_size) for step in steps}
    assert len(steps) == len(cases) == 8
    assert {case[2] for case in cases} == {1, 4}
    # Two samples are one group, and a group has at least two.
    for num_trajectories in (1, 2):
        steps = whole_steps(replace(SMALLEST, num_trajectories=num_trajectories))
        assert [(step.num_samples, step.group_size, step.lora_rank) for step in steps] == [(2, 2, 0), (2, 2, 32)] * 2


def test_the_released_algorithm_is_that_of_the_learning_curves() -> None:
    settings = algorithms(WholeStep("reasoning_t2i", num_samples=64, group_size=8))["released"]
    _, words = ALGORITHMS["released_2"]
    assert dict(zip(words[::2], words[1::2], strict=True)) == {f"--{name}": str(v) for name, v in settings.items()}
    assert settings == {
        **{"preset": "paper", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 32},
        **{"image_steps_per_forward": "1", "context_gradient": "detached", "rollout_batch_size": 8},
    }


@pytest.fixture(scope="module", params=["reasoning_t2i", "self_reflection"])
def trainers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, AlphaGRPOTrainer]:
    step = WholeStep(request.param, num_samples=4, group_size=2, lora_rank=4)
    folder = str(tmp_path_factory.mktemp("output"))
    return {n: make_step_trainer(step, SMALLEST, brightness, folder, False, a) for n, a in algorithms(step).items()}


def test_both_algorithms_train_on_the_same_samples(trainers: dict[str, AlphaGRPOTrainer]) -> None:
    ours, released = (trainers[name].args for name in ("auto", "released"))
    assert ours.generation_batch_size == released.generation_batch_size == 4
    assert ours.train_rollout(0).denoising == released.train_rollout(0).denoising
    assert (ours.per_device_train_batch_size, released.per_device_train_batch_size) == (4, 2)
    assert (released.image_steps_per_forward, released.context_gradient) == (1, "detached")
    assert (ours.image_steps_per_forward, trainers["1"].args.image_steps_per_forward) == ("auto", 1)
    is_reflection = ours.task == "self_reflection"
    assert (ours.num_timesteps, ours.sde_window_size) == ((40, 5) if is_reflection else (16, 10))
    assert tuple(ours.guidance.interval) == ((0.0, 1.0) if is_reflection else (0.4, 1.0))
    assert all("lora_" in name for name, p in trainers["auto"].model.named_parameters() if p.requires_grad)


def test_rows_are_written_as_soon_as_they_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes import benchmark

    def interrupted(name: str, args: benchmark.BenchmarkArguments) -> Iterator[ResultTable]:
        yield ResultTable("Whole step", ["task"], [["first"]])
        yield ResultTable("Whole step", ["task"], [["first"], ["second"]])
        raise KeyboardInterrupt

    monkeypatch.setitem(measurements.MEASUREMENTS, "whole_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(benchmark.BenchmarkArguments(parts=["whole_step"], output_dir=str(tmp_path)))
    (table,) = json.loads((tmp_path / "benchmark.json").read_text())["tables"]
    assert table["rows"] == [["first"], ["second"]]


@pytest.mark.slow
@pytest.mark.low_priority
def test_a_step_is_timed_and_its_peak_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = WholeStep("reasoning_t2i", num_samples=2, group_size=2, lora_rank=4)
    monkeypatch.setattr(comparison, "whole_steps", lambda size: [step])
    size = replace(SMALLEST, thought_tokens=4)
    (table,) = compared_steps("Whole step: smallest", size, str(tmp_path), "bfloat16", repetitions=1)
    assert [row[:4] for row in table.rows] == [["reasoning_t2i", "LoRA 4", 1, steps] for steps in ("auto", "1")]
    for row in table.rows:
        cells = dict(zip(STEP_COLUMNS, row, strict=True))
        assert cells["CPU seconds, ours"].median > 0
        assert 0 < cells["peak MiB above imports, ours"] < cells["peak RSS MiB, ours"]
        assert 0 < cells["peak of released"] < cells["peak RSS of released"]
        assert cells["peak, ours over released"] == pytest.approx(
            cells["peak MiB above imports, ours"] / cells["peak of released"], rel=0.02
        )
    json.dumps(table.to_json())
