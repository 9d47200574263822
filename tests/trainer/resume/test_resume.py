# SPDX-License-Identifier: Apache-2.0

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.shapes.prompts import build_dataset
from alphagrpo_ext.trainer import AlphaGRPOTrainer
from alphagrpo_ext.trainer.callbacks.json_lines import JsonLinesCallback
from alphagrpo_ext.trainer.resume.checkpoint_folder import (
    DamagedCheckpointError,
    last_checkpoint,
    read_manifest,
    resolve_checkpoint,
)
from alphagrpo_ext.trainer.resume.rollout_buffer import load_rollouts, save_rollouts
from alphagrpo_ext.trajectory import ImageSegment, TextSegment, Trajectory
from support.run_comparison import without_timings
from support.trainers import brightness


# CI runs one of each kind.
LOW_PRIORITY = (pytest.mark.slow, pytest.mark.low_priority)

MakeTrainer = Callable[..., AlphaGRPOTrainer]


def weights(trainer: AlphaGRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def assert_same_run(actual: AlphaGRPOTrainer, expected: AlphaGRPOTrainer) -> None:
    for name, value in weights(expected).items():
        assert torch.equal(weights(actual)[name], value), name
    assert without_timings(actual.state.log_history) == without_timings(expected.state.log_history)


@pytest.mark.invariant
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            id="accumulation",
            marks=pytest.mark.slow,
        ),
        pytest.param({"num_iterations": 2, "steps_per_generation": 2}, id="buffered"),
        pytest.param(
            {"gradient_accumulation_steps": 2, "steps_per_generation": 1}, id="two rollouts a step", marks=LOW_PRIORITY
        ),
        pytest.param({"logging_steps": 3, "num_iterations": 3}, id="between logs", marks=LOW_PRIORITY),
        pytest.param({"lora": True, "image_beta": 0.1, "max_grad_norm": 0.5}, id="LoRA", marks=LOW_PRIORITY),
        pytest.param({"bf16": True}, id="bf16 autocast", marks=LOW_PRIORITY),
        pytest.param(
            {"image_objective": "diffusion_nft", "think": False, "num_iterations": 2, "steps_per_generation": 2},
            id="noised copies, buffered",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "lora": True,
                "image_beta": 0.1,
                "sync_ref_model": True,
                "ref_model_sync_steps": 1,
                "ref_model_mixup_alpha": 0.5,
                "rollout_policy": "reference",
                "image_base_beta": 0.1,
            },
            id="reference adapter that follows and samples",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"task": "self_reflection", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            id="self-reflection, accumulation",
            marks=LOW_PRIORITY,
        ),
        pytest.param(
            {"task": "self_reflection", "num_iterations": 2, "steps_per_generation": 2},
            id="self-reflection, buffered",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_resumed_run_equals_one_that_was_not_stopped(make: MakeTrainer, settings: dict[str, Any]) -> None:
    whole = make("whole", **settings)
    whole.train()
    folder = Path(whole.args.output_dir)
    # Each checkpoint in turn: one of them lies in the middle of a buffered rollout.
    for step in (1, 2):
        resumed = make("resumed", **settings)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert_same_run(resumed, whole)


@pytest.mark.parametrize(
    ("settings", "streaming"),
    [
        pytest.param({}, False, id="whole steps"),
        pytest.param(
            {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
            False,
            id="short last step",
            marks=LOW_PRIORITY,
        ),
        pytest.param({"shuffle_dataset": False}, False, id="in order", marks=LOW_PRIORITY),
        pytest.param({}, True, id="stream", marks=LOW_PRIORITY),
    ],
)
def test_prompts_go_on_in_their_order(make: MakeTrainer, settings: dict[str, Any], streaming: bool) -> None:
    """Each epoch has an order of its own; a resumed run goes on with that of its epoch, not with the first one's."""
    rows = build_dataset("train", 3, seed=0)

    def run(name: str, checkpoint: Path | None = None) -> tuple[AlphaGRPOTrainer, list[str]]:
        seen = []

        def reward(images: list[Image.Image], prompts: list[str], **kwargs: Any) -> list[float]:
            seen.append(prompts[0])
            return brightness(images)

        datasets = {"train_dataset": rows.to_iterable_dataset() if streaming else rows}
        trainer = make(
            name, datasets=datasets, reward_funcs=reward, max_steps=5, save_steps=2, think=False, **settings
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, seen

    whole, expected = run("whole")
    for step in (2, 4):
        resumed, seen = run("resumed", Path(whole.args.output_dir) / f"checkpoint-{step}")
        assert seen == expected[-len(seen) :]
        assert_same_run(resumed, whole)


def test_finished_run_has_nothing_left_to_do(make: MakeTrainer) -> None:
    whole = make("run")
    whole.train()
    expected = without_timings(whole.state.log_history)
    again = make("run")
    again.train(resume_from_checkpoint="last")
    assert again.state.global_step == 3
    assert not again.recorder.updates
    assert_same_run(again, whole)
    assert without_timings(again.state.log_history) == expected


@pytest.mark.slow
@pytest.mark.low_priority
def test_longer_run_goes_on(make: MakeTrainer) -> None:
    """More steps than were planned: the rollouts that were left over are trained on first."""
    settings = {"num_iterations": 2, "steps_per_generation": 2, "lr_scheduler_type": "constant"}
    whole = make("whole", max_steps=5, **settings)
    whole.train()
    make("parts", max_steps=3, **settings).train()
    longer = make("parts", max_steps=5, **settings)
    longer.train(resume_from_checkpoint=True)
    for name, value in weights(whole).items():
        assert torch.equal(weights(longer)[name], value), name


@pytest.mark.slow
@pytest.mark.low_priority
def test_evaluation_at_the_start_is_not_repeated(make: MakeTrainer) -> None:
    settings = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1}
    whole = make("whole", **settings)
    whole.train()
    resumed = make("resumed", **settings)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-1"))
    assert_same_run(resumed, whole)
    assert [entry["step"] for entry in resumed.state.log_history if "eval_reward" in entry] == [0, 1, 2, 3]
    assert resumed.args.eval_on_start


@pytest.mark.slow
def test_metrics_file_has_each_line_once(make: MakeTrainer) -> None:
    def run(name: str, **arguments: Any) -> list[dict[str, Any]]:
        trainer = make(name)
        path = Path(trainer.args.output_dir) / "metrics.jsonl"
        trainer.add_callback(JsonLinesCallback(path))
        trainer.train(**arguments)
        return [json.loads(line) for line in path.read_text().splitlines()]

    expected = run("run")
    assert [entry["step"] for entry in expected] == [1, 2, 3, 3]
    folder = Path(make("run").args.output_dir)
    # As a kill in the middle of the next line leaves it.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    checkpoint = str(folder / "checkpoint-1")
    assert without_timings(run("run", resume_from_checkpoint=checkpoint)) == without_timings(expected)
    assert without_timings(run("run")) == without_timings(expected)


@pytest.mark.slow
@pytest.mark.low_priority
@pytest.mark.parametrize("rollout_policy", ["policy", "reference"])
def test_reference_model_that_follows_the_policy_is_restored(
    rollout_policy: str,
    make: MakeTrainer,
    make_shapes_bagel: Callable[[], BagelModel],
    shapes_processor: BagelProcessor,
    tmp_path: Path,
) -> None:
    make_shapes_bagel().save_pretrained(tmp_path / "base")
    shapes_processor.save_pretrained(tmp_path / "base")
    settings = {"model": str(tmp_path / "base"), "beta": 0.1, "image_beta": 0.1, "rollout_policy": rollout_policy}
    settings |= {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    settings |= {"image_base_beta": 0.1}
    whole = make("whole", **settings)
    whole.train()
    resumed = make("resumed", **settings)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert_same_run(resumed, whole)
    assert any(entry.get("kl", 0) > 1e-6 for entry in whole.state.log_history)


def test_failure_while_saving_leaves_the_previous_checkpoint(
    make: MakeTrainer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make("whole")
    whole.train()

    save = torch.save

    def full_disk(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if str(path).endswith("checkpoint-2/optimizer.pt"):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full_disk)
    stopped = make("stopped")
    with pytest.raises(OSError, match="No space left"):
        stopped.train()
    monkeypatch.undo()
    folder = Path(stopped.args.output_dir)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    assert last_checkpoint(folder) == folder / "checkpoint-1"
    assert "incomplete/checkpoint-2 was not completed" in caplog.text

    resumed = make("stopped")
    resumed.train(resume_from_checkpoint="true")
    assert_same_run(resumed, whole)
    assert not (folder / "incomplete").exists()
    assert last_checkpoint(folder) == folder / "checkpoint-3"


@pytest.mark.slow
@pytest.mark.low_priority
def test_only_as_many_checkpoints_are_kept_as_asked_for(make: MakeTrainer) -> None:
    trainer = make("run", save_total_limit=1, max_steps=2)
    trainer.train()
    assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.slow
@pytest.mark.low_priority
def test_best_checkpoint_is_found_at_its_place(make: MakeTrainer) -> None:
    trainer = make(
        "run",
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        save_total_limit=1,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == Path(trainer.args.output_dir)
    assert read_manifest(best).step == trainer.state.best_global_step
    state = json.loads((last_checkpoint(best.parent) / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).parent == best.parent
    expected = load_file(best / "model.safetensors")
    assert all(torch.equal(weights(trainer)[name], value) for name, value in expected.items())


def test_last_checkpoint_is_the_one_that_was_written_last(
    make: MakeTrainer, run_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert resolve_checkpoint("last", run_folder) == run_folder / "checkpoint-2"
    # A run that starts anew in the same folder is not continued from the end of the earlier one.
    make("run", max_steps=1).train()
    assert resolve_checkpoint(True, run_folder) == run_folder / "checkpoint-1"
    (run_folder / "checkpoint-1" / "optimizer.pt").unlink()
    assert resolve_checkpoint("True", run_folder) == run_folder / "checkpoint-2"
    assert "checkpoint-1 is not used" in caplog.text
    assert "optimizer.pt is missing" in caplog.text


def test_run_without_checkpoint_starts_from_the_beginning(make: MakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make("run", max_steps=1)
    trainer.train(resume_from_checkpoint="last")
    assert trainer.state.global_step == 1
    assert "starts from the beginning" in caplog.text
    for none in (None, False, "false", ""):
        assert resolve_checkpoint(none, trainer.args.output_dir) is None


def test_checkpoint_that_cannot_be_resumed_says_why(make: MakeTrainer, run_folder: Path) -> None:
    with pytest.raises(DamagedCheckpointError, match="there is no checkpoint folder"):
        resolve_checkpoint(str(run_folder / "checkpoint-9"), run_folder)
    manifest = run_folder / "checkpoint-2" / "checkpoint.json"
    manifest.unlink()
    with pytest.raises(DamagedCheckpointError, match="has no checkpoint.json"):
        resolve_checkpoint(str(manifest.parent), run_folder)
    model_only = make("model", max_steps=1, save_only_model=True)
    model_only.train()
    with pytest.raises(ValueError, match="save_only_model"):
        make("model").train(resume_from_checkpoint="last")


def test_rollouts_are_read_as_they_were_written(tmp_path: Path) -> None:
    shared = TextSegment([1, 2], ended=False, log_probs=[-0.1, math.pi])
    latents = torch.randn(6, 4)
    image = ImageSegment(
        latents[2:],
        (2, 2),
        image=Image.effect_noise((5, 3), 50).convert("RGB"),
        sampled=True,
        guidance_contexts={"text_dropped": [shared]},
    )
    batch = {
        # The second one ended without painting.
        "trajectories": [Trajectory([shared, image]), Trajectory([shared], num_trained_steps=2)],
        "mask": torch.tensor([[True, False]]),
        "velocities": [latents[:2].bfloat16(), latents[:0]],
        "count": torch.tensor(3),
        "nothing": None,
    }
    save_rollouts([batch], tmp_path / "rollouts.pt")
    (loaded,) = load_rollouts(tmp_path / "rollouts.pt", torch.device("cpu"))
    first, second = loaded["trajectories"]
    assert first.segments[0] == shared and second.num_trained_steps == 2
    assert first.segments[0] is second.segments[0] is first.segments[1].guidance_contexts["text_dropped"][0]
    assert torch.equal(first.segments[1].latents, latents[2:])
    assert first.segments[1].grid == (2, 2)
    assert first.segments[1].image.tobytes() == image.image.tobytes()
    assert first.segments[1].image.size == (5, 3)
    for actual, expected in zip(loaded["velocities"], batch["velocities"], strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    assert loaded["mask"].dtype == torch.bool
    assert loaded["count"].item() == 3
    assert loaded["nothing"] is None


def test_rollouts_of_unknown_things_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="holds pathlib.PosixPath"):
        save_rollouts([{"what": [tmp_path]}], tmp_path / "rollouts.pt")
    assert not list(tmp_path.iterdir())
