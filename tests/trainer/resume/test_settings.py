# SPDX-License-Identifier: Apache-2.0

"""A run resumes with the settings that it had; what may change is applied and said, what may not is refused."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.shapes.prompts import build_dataset
from alphagrpo_ext.trainer import AlphaGRPOConfig, AlphaGRPOTrainer
from alphagrpo_ext.trainer.resume.checkpoint_folder import write_manifest
from alphagrpo_ext.trainer.resume.setting_kinds import SETTING_KINDS, SettingKind
from alphagrpo_ext.trainer.resume.settings import (
    Change,
    ChangedSettingsError,
    changes,
    check_changes,
    config_settings,
    dataset_identity,
    plain,
)
from reward_models import DVReward
from support.trainers import brightness


# CI runs one of each kind.
LOW_PRIORITY = (pytest.mark.slow, pytest.mark.low_priority)

MakeTrainer = Callable[..., AlphaGRPOTrainer]


def test_every_field_has_a_kind() -> None:
    """A new field belongs in the table of `setting_kinds.py`."""
    assert {f.name for f in fields(AlphaGRPOConfig)} - SETTING_KINDS.keys() == set()


def test_no_setting_has_two_kinds() -> None:
    from alphagrpo_ext.trainer.resume import setting_kinds

    words = [
        word
        for name, value in vars(setting_kinds).items()
        if name.startswith("_") and not name.startswith("__") and isinstance(value, str)
        for word in value.split()
    ]
    assert len(words) == len(set(words)) == len(SETTING_KINDS)


def test_no_secret_is_kept(tmp_path: Path) -> None:
    kept = config_settings(AlphaGRPOConfig(str(tmp_path), hub_token="hf_secret", use_cpu=True))
    assert "hf_secret" not in str(kept)
    assert str(tmp_path) not in str(kept)


FIXED = {
    "seed": 7,
    "data_seed": 3,
    "num_generations": 2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "task": "self_reflection",
    "think": False,
    "image_objective": "diffusion_nft",
    "sde_window_size": 2,
    "sde_window_range": [0, 3],
    "noise_level": 0.5,
    "num_timesteps": 7,
    "image_height": 16,
    "temperature": 0.9,
    "top_p": 0.5,
    "max_completion_length": 11,
    "cfg_text_scale": 2.0,
    "image_epsilon": 1e-4,
    "epsilon": 0.1,
    "text_loss_weight": 0.5,
    "scale_rewards": "group",
    "rectification": "off",
    "num_iterations": 2,
    "freeze_vision_tower": False,
    "beta": 0.1,
    "image_beta": 0.1,
    "bf16": True,
    "optim": "sgd",
    "weight_decay": 0.1,
    "adam_beta2": 0.9,
    "shuffle_dataset": False,
}


def test_what_cannot_change_is_refused_with_both_values(make: MakeTrainer, run_folder: Path) -> None:
    checkpoint = str(run_folder / "checkpoint-1")
    before = make("again")
    for name, value in FIXED.items():
        with pytest.raises(ChangedSettingsError) as error:
            make("again", **{name: value}).train(resume_from_checkpoint=checkpoint)
        assert f"{name} was {plain(getattr(before.args, name))!r} and is {value!r}" in str(error.value)
        assert str(run_folder) in str(error.value)


def test_all_that_cannot_change_is_named_at_once(make: MakeTrainer, run_folder: Path) -> None:
    trainer = make("run", seed=7, num_generations=2, learning_rate=1.0)
    files = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    with pytest.raises(ChangedSettingsError, match="seed was 42 and is 7; num_generations was 4 and is 2") as error:
        trainer.train(resume_from_checkpoint="last")
    assert "learning_rate" not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")} == files


@dataclass(frozen=True)
class Bright:
    """A reward of another name than [`brightness`], or with settings of its own."""

    run_settings: dict[str, Any]
    __name__ = "brightness"

    def __call__(self, images: Any, **kwargs: Any) -> list[float]:
        return brightness(images)


def test_what_the_trainer_is_given_cannot_change(
    make: MakeTrainer, run_folder: Path, make_shapes_bagel: Callable[[], BagelModel]
) -> None:
    def darkness(images: Any, **kwargs: Any) -> list[float]:
        return [1 - value for value in brightness(images)]

    other = make_shapes_bagel()
    with torch.no_grad():
        next(parameter for name, parameter in other.named_parameters() if "vit" in name).add_(1e-3)
    rows = build_dataset("train", 8, seed=0)
    for name, arguments in {
        "model.frozen_weights": {"model": other},
        "model.dtype": {"model": make_shapes_bagel().double()},
        "peft_config": {"lora": True},
        "reward_funcs": {"reward_funcs": darkness},
        "reward_funcs was": {"reward_funcs": [brightness, brightness]},
        "'scale': 2": {"reward_funcs": Bright({"scale": 2})},
        "'scale': 3": {"reward_funcs": partial(Bright({"scale": 3}))},
        "train_dataset was '8 rows .*and is '7 rows": {"datasets": {"train_dataset": rows.select(range(7))}},
        "train_dataset was '8 rows .*and is '8 rows": {"datasets": {"train_dataset": rows.select(range(7, -1, -1))}},
        "train_dataset was '8 rows .*and is 'a stream": {"datasets": {"train_dataset": rows.to_iterable_dataset()}},
    }.items():
        with pytest.raises(ChangedSettingsError, match=name):
            make("again", **arguments).train(resume_from_checkpoint=str(run_folder / "checkpoint-1"))
    # The same things, made anew.
    same = make("again", max_steps=2, model=make_shapes_bagel(), datasets={"train_dataset": rows})
    same.train(resume_from_checkpoint=str(run_folder / "checkpoint-1"))


def test_another_model_behind_a_reward_is_refused(make: MakeTrainer) -> None:
    trainer = make(
        "judged", max_steps=1, reward_funcs=Bright({"scale": 2, "reward_model": {"model": "a", "mass": 0.5}})
    )
    trainer.train()
    checkpoint = str(Path(trainer.args.output_dir) / "checkpoint-1")
    other = Bright({"scale": 2, "reward_model": {"model": "b", "mass": 0.5}})
    message = "reward_model was {'brightness': {'model': 'a'}} and is {'brightness': {'model': 'b'}}. Resume"
    with pytest.raises(ChangedSettingsError, match=f"cannot change: {message}"):
        make("again", max_steps=2, reward_funcs=other).train(resume_from_checkpoint=checkpoint)
    make("again", max_steps=2, reward_funcs=trainer.reward_funcs).train(resume_from_checkpoint=checkpoint)


def test_other_texts_of_a_processor_are_refused(
    make: MakeTrainer, run_folder: Path, shapes_processor: BagelProcessor
) -> None:
    checkpoint = str(run_folder / "checkpoint-1")
    changed = copy.deepcopy(shapes_processor)
    changed.reflection_prompt = "repaint {prompt}"
    changed.tokenizer.add_tokens(["purple"])
    message = "processing_class was {'reflection_prompt': .*'vocabulary': .*} and is {'reflection_prompt': 'repaint {prompt}'"
    with pytest.raises(ChangedSettingsError, match=message):
        make("again", processing_class=changed).train(resume_from_checkpoint=checkpoint)
    # As the checkpoint holds it.
    kept = BagelProcessor.from_pretrained(checkpoint)
    make("again", max_steps=2, processing_class=kept).train(resume_from_checkpoint=checkpoint)


def test_a_checkpoint_of_an_earlier_version_is_compared_by_what_it_holds(make: MakeTrainer) -> None:
    judged = Bright({"scale": 2, "reward_model": {"model": "a"}})
    trainer = make("judged", max_steps=1, reward_funcs=judged)
    trainer.train()
    folder = Path(trainer.args.output_dir) / "checkpoint-1"
    settings = json.loads((folder / "settings.json").read_text())
    del settings["reward_model"], settings["processing_class"]
    (folder / "settings.json").write_text(json.dumps(settings))
    write_manifest(folder, step=1, num_processes=1)
    make("again", max_steps=2, reward_funcs=judged).train(resume_from_checkpoint=str(folder))
    with pytest.raises(ChangedSettingsError, match="reward_funcs was"):
        make("again", reward_funcs=Bright({"scale": 3})).train(resume_from_checkpoint=str(folder))


def test_another_adapter_is_refused(make: MakeTrainer) -> None:
    trainer = make("adapted", max_steps=1, lora=True)
    trainer.train()
    checkpoint = str(Path(trainer.args.output_dir) / "checkpoint-1")
    with pytest.raises(ChangedSettingsError, match="peft_config was .*and is None"):
        make("again").train(resume_from_checkpoint=checkpoint)
    wide = LoraConfig(r=8, lora_alpha=8, target_modules=trainer.model.peft_config["default"].target_modules)
    other = make("again", max_steps=2, arguments={}, lora=True)
    other.model.peft_config["default"].r = wide.r
    with pytest.raises(
        ChangedSettingsError, match="peft_config was {'default': {'r': 4}} and is {'default': {'r': 8}}. Resume"
    ):
        other.train(resume_from_checkpoint=checkpoint)
    make("again", max_steps=2, lora=True).train(resume_from_checkpoint=checkpoint)


def rates(trainer: AlphaGRPOTrainer) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        # The linear schedule of four steps, from the new rate.
        pytest.param({"learning_rate": 1e-2}, [1e-3, 0.75e-2, 0.5e-2, 0.25e-2], id="rate"),
        pytest.param({"max_steps": 3}, [1e-3, 1e-3 * 2 / 3, 1e-3 / 3], id="shorter", marks=LOW_PRIORITY),
        pytest.param({"lr_scheduler_type": "constant"}, [1e-3] * 4, id="schedule", marks=pytest.mark.slow),
        pytest.param({"warmup_steps": 2}, [1e-3, 0.5e-3, 1e-3, 0.5e-3], id="warmup", marks=LOW_PRIORITY),
        pytest.param({}, [1e-3, 0.75e-3, 0.5e-3, 0.25e-3], id="unchanged", marks=pytest.mark.slow),
    ],
)
def test_a_new_learning_rate_is_applied_and_said(
    make: MakeTrainer, changed: dict[str, Any], expected: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    whole = make("run", max_steps=4, save_steps=1)
    whole.train()
    caplog.clear()
    resumed = make("again", **{"max_steps": 4, "save_strategy": "no", **changed})
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-1"))
    assert rates(resumed) == pytest.approx(expected, rel=1e-12)
    assert resumed.optimizer.param_groups[0]["initial_lr"] == resumed.args.learning_rate
    said = [record.getMessage() for record in caplog.records if "with other settings" in record.getMessage()]
    assert len(said) == 1
    for name in ("save_strategy", *changed):
        assert f"{name} was " in said[0]
    moved = {n: v for n, v in resumed.model.state_dict().items() if not torch.equal(v, whole.model.state_dict()[n])}
    assert bool(moved) == bool(changed)


@pytest.mark.slow
def test_rates_of_both_experts_are_applied(make: MakeTrainer) -> None:
    # They are equal in the checkpoint, so that only the order of the groups tells the experts apart.
    settings = {"max_steps": 3, "generation_learning_rate": 1e-3, "lr_scheduler_type": "linear"}
    whole = make("run", **settings)
    whole.train()
    checkpoint = str(Path(whole.args.output_dir) / "checkpoint-1")
    resumed = make("again", **(settings | {"generation_learning_rate": 3e-2, "max_steps": 2}))
    resumed.train(resume_from_checkpoint=checkpoint)
    assert [group["initial_lr"] for group in resumed.optimizer.param_groups] == [1e-3, 3e-2, 1e-3, 3e-2]
    for rate in (None, 1e-4):
        started = make("other", max_steps=1, generation_learning_rate=rate)
        started.train()
        with pytest.raises(ChangedSettingsError, match="generation_learning_rate was"):
            make("again", generation_learning_rate=None if rate else 1e-4).train(
                resume_from_checkpoint=str(Path(started.args.output_dir) / "checkpoint-1")
            )


def test_the_rate_of_an_optimizer_that_is_passed_is_applied(
    make: MakeTrainer, make_shapes_bagel: Callable[[], BagelModel]
) -> None:
    def passed(name: str, rate: float) -> AlphaGRPOTrainer:
        model = make_shapes_bagel()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        return make(
            name, max_steps=2, model=model, arguments={"optimizers": (optimizer, None)}, freeze_vision_tower=False
        )

    whole = passed("run", 1e-3)
    whole.train()
    resumed = passed("again", 1e-2)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-1"))
    assert rates(resumed) == [1e-3, 0.5e-2]


def test_a_schedule_with_a_state_of_its_own_cannot_change(make: MakeTrainer, run_folder: Path) -> None:
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ChangedSettingsError, match="lr_scheduler_type was 'linear' and is 'reduce_lr_on_plateau'"):
        make("again", **plateau).train(resume_from_checkpoint=str(run_folder / "checkpoint-1"))


def test_saving_logging_and_evaluation_follow_the_new_settings(make: MakeTrainer, run_folder: Path) -> None:
    settings = {"max_steps": 6, "save_steps": 3, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 5}
    resumed = make("run", **settings)
    resumed.train(resume_from_checkpoint=str(run_folder / "checkpoint-1"))
    steps = [entry["step"] for entry in resumed.state.log_history if "loss" in entry]
    assert steps == [1, 2, 4, 6]
    # Transformers evaluates at the end, too.
    assert [entry["step"] for entry in resumed.state.log_history if "eval_reward" in entry] == [5, 6]
    assert {path.name for path in run_folder.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (1, 2, 3, 6)}


def test_another_number_of_processes_is_named(make: MakeTrainer, run_folder: Path) -> None:
    folder = run_folder / "checkpoint-2"
    write_manifest(folder, step=2, num_processes=2)
    with pytest.raises(ValueError, match="was saved with num_processes=2, but num_processes is 1 now"):
        make("again").train(resume_from_checkpoint=str(folder))


def test_settings_are_compared_as_json_keeps_them() -> None:
    before = {"a": [1, 2], "b": 1.0, "c": float("nan"), "d": 0, "old": 1, "e": {"x": 1, "y": 2}}
    now = {"a": plain((1, 2)), "b": 1.5, "c": float("nan"), "d": plain(np.float32(0)), "new": 1, "e": {"y": 2, "x": 3}}
    assert changes(before, now) == [Change("b", 1.0, 1.5), Change("e", {"x": 1, "y": 2}, {"y": 2, "x": 3})]
    assert str(changes(before, now)[1]) == "e was {'x': 1} and is {'x': 3}"
    # A field of another version of TRL or Transformers.
    assert Change("b", 1, 2).kind is SettingKind.FREE
    check_changes(Path("checkpoint-1"), changes(before, now))
    moved = Change("model.name", "a/base", "b/base")
    check_changes(Path("checkpoint-1"), [moved])
    with pytest.raises(ChangedSettingsError, match="model.frozen_weights was '1' and is '2'; model.name was 'a/base'"):
        check_changes(Path("checkpoint-1"), [moved, Change("model.frozen_weights", "1", "2")])
    assert plain({"b": {3, 1}, "c": torch.float32, "d": brightness, "e": SettingKind.FREE}) == {
        "b": [1, 3],
        "c": "torch.float32",
        "d": plain(brightness),
        "e": "free",
    }


def test_identity_of_rows_does_not_depend_on_how_they_are_held(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{index}", "n": index, "more": ["x"] * index} for index in range(7)]
    expected = dataset_identity(datasets.Dataset.from_list(rows))
    assert expected.startswith("7 rows")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    assert dataset_identity(datasets.load_from_disk(str(tmp_path / "rows"))) == expected
    halves = datasets.concatenate_datasets([datasets.Dataset.from_list(part) for part in (rows[:3], rows[3:])])
    assert dataset_identity(halves) == expected
    assert dataset_identity(datasets.Dataset.from_list(rows * 2).select(range(7))) == expected
    # Images are not read.
    seen = [row | {"image": Image.new("RGB", (2, 2), (index, 0, 0))} for index, row in enumerate(rows)]
    alike = [row | {"image": seen[0]["image"]} for row in rows]
    identities = {dataset_identity(datasets.Dataset.from_list(some)) for some in (seen, alike)}
    assert len(identities) == 1
    assert identities != {expected}
    rows[5]["prompt"] += " "
    assert dataset_identity(datasets.Dataset.from_list(rows)) != expected


def test_a_reward_says_what_it_depends_on() -> None:
    assert DVReward("shapes").run_settings == {"judge": "ShapesJudge", "aggregation": "geometric", "reward_model": {}}
    asked = DVReward("openai", base_url="http://localhost:8000/v1", model="judge").run_settings["reward_model"]
    assert (asked["model"], asked["min_answer_mass"]) == ("judge", 0.5)
    assert DVReward("shapes", aggregation="mean").run_settings["aggregation"] == "mean"
