# SPDX-License-Identifier: Apache-2.0

import json
import pickle
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from trl import GRPOConfig, TrlParser

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.flow.timesteps import flow_timesteps
from alphagrpo_ext.rollout import TASKS, TaskSettings
from alphagrpo_ext.rollout.tasks.reasoning_t2i import ReasoningT2I
from alphagrpo_ext.trainer import AlphaGRPOConfig


CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., AlphaGRPOConfig]:
    def make(**kwargs: Any) -> AlphaGRPOConfig:
        return AlphaGRPOConfig(**{"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, **kwargs})

    return make


def test_defaults_are_the_paper_s(make_config: Callable[..., AlphaGRPOConfig]) -> None:
    config = make_config()
    expected = {
        "num_timesteps": 16,
        "sde_window_size": 10,
        "sde_window_range": [0, 11],
        "num_generations": 14,
        "cfg_text_scale": 4.0,
        "cfg_img_scale": 1.0,
        "cfg_interval": [0.4, 1.0],
        "cfg_renorm_type": "global",
        "noise_level": 0.7,
        "timestep_shift": 3.0,
        "image_height": 512,
        "image_width": 512,
        "temperature": 1.0,
        "top_p": 0.8,
        "eval_temperature": 0.3,
        "eval_top_p": 1.0,
        "image_epsilon": 1e-5,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "image_advantage_clip": 5.0,
        "importance_sampling_level": "sequence",
        "scale_rewards": "batch",
        "text_loss_weight": 1.0,
        "learning_rate": 5e-5,
        "weight_decay": 1e-4,
        "image_beta": 0.0,
        "beta": 0.0,
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_every_field_has_help() -> None:
    inherited = {field.name: field for field in fields(GRPOConfig)}
    for field in fields(AlphaGRPOConfig):
        if field.name in inherited and inherited[field.name].default == field.default:
            continue
        assert len(field.metadata.get("help", "")) > 10, field.name
        if field.name not in inherited:
            assert field.default is not MISSING or field.default_factory is not MISSING


def test_mutable_defaults_are_not_shared(make_config: Callable[..., AlphaGRPOConfig]) -> None:
    first = make_config()
    first.sde_window_range.append(1)
    assert make_config().sde_window_range == [0, 11]


@pytest.mark.parametrize("source", ["command line", "file"])
def test_unknown_key_stops_and_is_named(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    if source == "file":
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"noise_levle": 0.5}))
        arguments += ["--config", str(tmp_path / "config.yaml")]
    else:
        arguments += ["--noise_levle", "0.5"]
    with pytest.raises((SystemExit, ValueError)) as error:
        TrlParser((AlphaGRPOConfig,)).parse_args_and_config(arguments)
    assert "noise_levle" in f"{error.value}{capsys.readouterr().err}"


def test_parser_reads_lists(tmp_path: Path) -> None:
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    arguments += ["--sde_window_range", "2", "9", "--sde_window_size", "3", "--cfg_interval", "0.1", "0.9"]
    (config,) = TrlParser((AlphaGRPOConfig,)).parse_args_and_config(arguments)
    assert config.sde_window_range == [2, 9]
    assert config.guidance.interval == (0.1, 0.9)


@pytest.mark.parametrize("source", ["command line", "file"])
@pytest.mark.parametrize(("given", "expected"), [("auto", "auto"), ("all", "all"), ("2", 2)])
def test_parser_reads_a_number_or_a_word(tmp_path: Path, source: str, given: str, expected: int | str) -> None:
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    if source == "file":
        (tmp_path / "config.yaml").write_text(f"image_steps_per_forward: {given}\n")
        arguments += ["--config", str(tmp_path / "config.yaml")]
    else:
        arguments += ["--image_steps_per_forward", given]
    (config,) = TrlParser((AlphaGRPOConfig,)).parse_args_and_config(arguments)
    assert config.image_steps_per_forward == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_timesteps": 10}, r"window_size 10 .*num_timesteps=10"),
        ({"sde_window_size": 12}, r"window_size 12 is larger than window_range \(0, 11\)"),
        ({"sde_window_range": [5, 3]}, r"sde_window_range=\[5, 3\]"),
        ({"sde_window_size": 0}, "sde_window_size must be at least 1"),
        ({"sde_window_range": [1, 2, 3]}, r"sde_window_range takes two numbers, but is \[1, 2, 3\]"),
        ({"cfg_interval": [0.4]}, r"cfg_interval takes two numbers, but is \[0.4\]"),
        ({"cfg_interval": [1.0, 0.4]}, r"\(1.0, 0.4\)"),
        ({"eval_cfg_interval": [0.4]}, r"eval_cfg_interval takes two numbers, but is \[0.4\]"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        (
            {"per_device_train_batch_size": 13},
            r"=13: .* steps_per_generation 1 x 1 processes\), and num_generations=14 .*batch_size to 14$",
        ),
        ({"per_device_train_batch_size": 60, "num_generations": 8}, "per_device_train_batch_size to 56 or 64$"),
        (
            {"per_device_train_batch_size": 3, "num_generations": 8, "gradient_accumulation_steps": 4},
            "12 samples .* per_device_train_batch_size to 2 or 4$",
        ),
        ({"generation_batch_size": 28, "per_device_train_batch_size": 7, "num_generations": 8}, r"\(28\) must be div"),
        ({"sde_window_range": [0, 50]}, r"\[0, 50\] ends after the last of the 15 steps .* set it to \[0, 15\]"),
        ({"task": "reasoning_t2j"}, "unknown task 'reasoning_t2j'. Did you mean 'reasoning_t2i'"),
        ({"image_objective": "flow_gpro"}, "unknown image objective 'flow_gpro'. Did you mean 'flow_grpo'"),
        ({"sde_type": "cps"}, "unknown sde_type 'cps', available: flow_sde, flow_cps"),
        ({"cfg_renorm_type": "row"}, "unknown renorm_type 'row'"),
        ({"use_vllm": True}, "does not take use_vllm=True: thoughts and images are sampled"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True: it replaces TRL's loss of text"),
        ({"noise_level": 0.0}, "noise_level must be positive, but is 0.0"),
        ({"image_epsilon": -1e-5}, "image_epsilon must be positive"),
        ({"image_advantage_clip": 0.0}, "image_advantage_clip must be positive"),
        ({"text_loss_weight": -1.0}, "text_loss_weight must not be negative, but is -1.0"),
        ({"image_beta": -0.1}, "image_beta must not be negative"),
        ({"image_kl_type": "forward"}, "unknown image_kl_type 'forward'"),
        ({"image_objective": "awm", "image_beta": 0.1}, "'awm' does not sample: set image_kl_type='velocity'"),
        ({"image_objective": "diffusion_nft", "nft_beta": 0.0}, "nft_beta must be positive, but is 0.0"),
        ({"image_objective": "awm", "awm_power": 0.0}, r"awm_power must be in \(0, 1\], but is 0.0"),
        ({"image_objective": "awm", "awm_power": float("nan")}, "awm_power must be in .*, but is nan"),
        ({"image_objective": "awm", "awm_time_power": -1.0}, "awm_time_power must not be negative, but is -1.0"),
        ({"image_objective": "awm", "awm_time_power": float("nan")}, "awm_time_power must not be .*, but is nan"),
        ({"forward_time_interval": [0.5]}, r"forward_time_interval takes two numbers, but is \[0.5\]"),
        (
            {"image_objective": "awm", "forward_time_interval": [0.5, 0.1]},
            r"low < high <= 1, .*forward_time_interval=\[0.5, 0.1\]",
        ),
        ({"eval_num_timesteps": 1}, "num_timesteps must be at least 2, but is 1"),
        (
            {"image_steps_per_forward": 0},
            "image_steps_per_forward must be 'auto', 'all' or a whole .* at least 1, but is 0",
        ),
        ({"image_steps_per_forward": 1.5}, "image_steps_per_forward must be .*, but is 1.5"),
        ({"image_steps_per_forward": "some"}, "image_steps_per_forward must be .*, but is 'some'"),
        ({"image_steps_per_forward": float("nan")}, "image_steps_per_forward must be .*, but is nan"),
        ({"max_completion_length": 0}, "max_completion_length, the longest thought, must be positive, but is 0"),
        ({"loss_type": "grop"}, "loss_type must be one of grpo, .*, but is 'grop'"),
        (
            {"importance_sampling_level": "word"},
            "importance_sampling_level must be one of token, sequence, but is 'word'",
        ),
        ({"scale_rewards": "std"}, "scale_rewards must be one of group, batch, none, but is 'std'"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation must be one of .*, but is 'sum'"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be at least 1, but is 0"),
        ({"pad_to_multiple_of": -8}, "pad_to_multiple_of must be at least 1, but is -8"),
        ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos must be positive, but is 0.0"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg must be positive, but is 0.0"),
        ({"optim_args": "eps=nan"}, "eps in optim_args must be a finite number, but is nan"),
        ({"optim_args": "rank=8, update_proj_gap=1e999"}, "update_proj_gap in optim_args must be .*, but is inf"),
        ({"optim_args": "betas=(0.9,nan)"}, r"optim_args must be .*name=value.*, but has 'nan\)'"),
        ({"optim_args": "0.9"}, "optim_args must be .*name=value.*, but has '0.9'"),
        ({"optim_args": "a=1=2"}, "optim_args must be .*name=value.*, but has 'a=1=2'"),
    ],
)
def test_bad_values_raise(make_config: Callable[..., AlphaGRPOConfig], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**settings)


def test_words_and_finite_numbers_are_arguments_of_an_optimizer(make_config: Callable[..., AlphaGRPOConfig]) -> None:
    arguments = "momentum=0.9, nesterov=true,proj_type=std"
    assert make_config(optim="sgd", optim_args=arguments).optim_args == arguments


@pytest.mark.invariant
def test_window_follows_seed_and_step(make_config: Callable[..., AlphaGRPOConfig]) -> None:
    settings = {"sde_window_size": 3, "sde_window_range": [1, 11], "num_timesteps": 12}

    def starts(seed: int) -> list[int]:
        config = make_config(**settings, seed=seed)
        return [config.train_rollout(step).denoising.window_start for step in range(64)]

    assert starts(0) == starts(0)
    assert starts(0) != starts(1)
    assert set(starts(0)) == set(range(1, 9))


def test_training_rollout_has_the_training_settings(make_config: Callable[..., AlphaGRPOConfig]) -> None:
    config = make_config(
        image_height=24, image_width=32, temperature=0.9, top_k=7, max_completion_length=20, rollout_batch_size=5
    )
    rollout = config.train_rollout(3)
    assert (rollout.height, rollout.width) == (24, 32)
    assert (rollout.temperature, rollout.top_k, rollout.top_p) == (0.9, 7, 0.8)
    assert (rollout.max_new_tokens, rollout.batch_size) == (20, 5)
    assert rollout.denoising.guidance == config.guidance == GuidanceConfig()
    assert rollout.denoising.window_size == 10


def test_evaluation_is_deterministic_and_has_settings_of_its_own(make_config: Callable[..., AlphaGRPOConfig]) -> None:
    rollout = make_config(
        eval_num_timesteps=30,
        eval_cfg_text_scale=1.0,
        eval_cfg_img_scale=1.5,
        eval_cfg_interval=[0.2, 0.7],
        eval_temperature=0.0,
        eval_top_p=0.5,
    ).eval_rollout()
    assert rollout.denoising.window_start is None
    assert rollout.denoising.num_timesteps == 30
    assert rollout.denoising.guidance == GuidanceConfig(1.0, 1.5, (0.2, 0.7))
    assert (rollout.temperature, rollout.top_p) == (0.0, 0.5)


def test_evaluation_guidance_defaults_to_that_of_training(make_config: Callable[..., AlphaGRPOConfig]) -> None:
    config = make_config(cfg_text_scale=2.0, cfg_img_scale=1.2, cfg_interval=[0.0, 0.9], cfg_renorm_type="channel")
    guidance = config.eval_rollout().denoising.guidance
    assert guidance == config.guidance
    assert replace(guidance, text_scale=3.0) != config.guidance


def test_evaluation_has_the_schedule_of_training_unless_it_is_given(
    make_config: Callable[..., AlphaGRPOConfig],
) -> None:
    def steps(config: AlphaGRPOConfig) -> int:
        return config.eval_rollout().denoising.num_timesteps

    assert steps(make_config()) == 16 and steps(make_config(num_timesteps=20)) == 20
    assert steps(make_config(num_timesteps=20, eval_num_timesteps=7)) == 7
    config = make_config(task="self_reflection", task_settings={"reasoning_t2i": {"num_timesteps": 30}})
    assert (steps(config), steps(config.for_task("reasoning_t2i"))) == (16, 30)


@pytest.mark.parametrize(("world", "expected"), [("bagel", 40), ("shapes", 11)])
@pytest.mark.parametrize("name", ["reasoning_t2i", "self_reflection"])
def test_configurations_of_recipes_name_the_steps_of_evaluations(
    make_config: Callable[..., AlphaGRPOConfig], name: str, world: str, expected: int
) -> None:
    values = yaml.safe_load((CONFIGS / f"{name}_{world}.yaml").read_text())
    own = {field.name for field in fields(AlphaGRPOConfig)} - {"output_dir", "bf16"}
    config = make_config(**{name: value for name, value in values.items() if name in own})
    for task in (name, "reasoning_t2i"):
        assert config.for_task(task).eval_rollout().denoising.num_timesteps == expected


def test_objective_gets_the_image_settings(make_config: Callable[..., AlphaGRPOConfig]) -> None:
    objective = make_config(
        image_epsilon=0.1, image_beta=0.2, image_kl_type="velocity", image_advantage_clip=3.0, sde_type="flow_cps"
    ).objective
    assert (objective.epsilon, objective.beta, objective.kl_type) == (0.1, 0.2, "velocity")
    assert (objective.advantage_clip, objective.sde_type, objective.noise_level) == (3.0, "flow_cps", 0.7)


@pytest.mark.parametrize(
    ("objective", "epsilon", "interval"),
    [("flow_grpo", 1e-5, [0.0, 1.0]), ("diffusion_nft", 1e-5, [0.0, 1.0]), ("awm", 1.0, [0.128, 1.0])],
)
def test_objective_declares_its_clip_range_and_times(
    make_config: Callable[..., AlphaGRPOConfig], objective: str, epsilon: float, interval: list[float]
) -> None:
    config = make_config(image_objective=objective)
    assert (config.objective.epsilon, config.forward_time_interval) == (epsilon, interval)
    assert not config.changed_arguments & {"image_epsilon", "forward_time_interval"}
    config = make_config(image_objective=objective, image_epsilon=0.1, forward_time_interval=[0.5, 0.9])
    assert (config.objective.epsilon, config.forward_time_interval) == (0.1, [0.5, 0.9])


def test_times_of_awm_are_those_of_35_of_40_points(make_config: Callable[..., AlphaGRPOConfig]) -> None:
    config = make_config(image_objective="awm", num_timesteps=40, sde_window_size=35)
    schedule = flow_timesteps(40, config.timestep_shift)
    times = torch.tensor(config.train_rollout(0).denoising.forward_times)
    assert times.shape == (35,)
    assert schedule[35] < times.min() < schedule[33] and schedule[1] < times.max() <= 1


PAINTING = GuidanceConfig(4.0, 1.0, (0.4, 1.0), "global")
REFINING = GuidanceConfig(4.0, 2.0, (0.0, 1.0), "text_channel")


@pytest.mark.parametrize("task", ["reasoning_t2i", "self_reflection", "image_editing"])
def test_every_task_has_the_guidance_that_it_declares(make_config: Callable[..., AlphaGRPOConfig], task: str) -> None:
    config = make_config(task=task)
    expected = {"reasoning_t2i": PAINTING, "self_reflection": REFINING, "image_editing": REFINING}
    assert config.guidance == expected[task]
    for name, guidance in expected.items():
        for rollout in (config.for_task(name).train_rollout(0), config.for_task(name).eval_rollout()):
            assert rollout.denoising.guidance == guidance


def test_released_guidance_of_refinement_does_not_reach_painting(make_config: Callable[..., AlphaGRPOConfig]) -> None:
    """The arguments of the run are about its own task, also where they are given."""
    path = Path(__file__).parents[2] / "recipes" / "configs" / "self_reflection_bagel.yaml"
    names = ("cfg_text_scale", "cfg_img_scale", "cfg_interval", "cfg_renorm_type")
    given = {name: value for name, value in yaml.safe_load(path.read_text()).items() if name in names}
    assert len(given) == 4
    config = make_config(task="self_reflection", **given)
    assert config.guidance == REFINING
    assert config.for_task("reasoning_t2i").guidance == PAINTING
    other = make_config(task="self_reflection", cfg_text_scale=3.0, cfg_img_scale=1.5, cfg_interval=[0.1, 0.9])
    assert other.guidance == GuidanceConfig(3.0, 1.5, (0.1, 0.9), "text_channel")
    # Text-to-image declares no text scale, so it takes that of the run.
    assert other.for_task("reasoning_t2i").guidance == replace(PAINTING, text_scale=3.0)


def test_task_can_declare_any_of_its_settings(
    make_config: Callable[..., AlphaGRPOConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sketching(ReasoningT2I):
        settings = TaskSettings(num_timesteps=30, image_height=256, temperature=0.7, max_completion_length=64)

    monkeypatch.setitem(TASKS._objects, "sketching", Sketching)
    for config in (make_config(task="sketching"), make_config().for_task("sketching")):
        rollout = config.train_rollout(0)
        assert (rollout.size, rollout.denoising.num_timesteps) == ((256, 512), 30)
        assert (rollout.temperature, rollout.max_new_tokens, rollout.top_p) == (0.7, 64, 0.8)
    given = make_config(task="sketching", num_timesteps=16, temperature=1.0)
    assert (given.num_timesteps, given.temperature, given.image_height) == (16, 1.0, 256)
    assert given.for_task("reasoning_t2i").image_height == 512
    assert make_config(num_timesteps=20).for_task("sketching").num_timesteps == 30


def test_given_default_is_not_taken_for_one_that_was_not_given(make_config: Callable[..., AlphaGRPOConfig]) -> None:
    config = make_config(task="self_reflection", cfg_img_scale=1.0, cfg_renorm_type="global")
    assert config.guidance == GuidanceConfig(4.0, 1.0, (0.0, 1.0), "global")


@pytest.mark.parametrize("source", ["command line", "file"])
def test_task_settings_are_read_from_both(source: str, tmp_path: Path) -> None:
    own = {"reasoning_t2i": {"cfg_text_scale": 3, "image_height": 256, "eval_num_timesteps": 9, "top_p": 1.0}}
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--task", "self_reflection"]
    if source == "file":
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"task_settings": own}))
        arguments += ["--config", str(tmp_path / "config.yaml")]
    else:
        arguments += ["--task_settings", json.dumps(own)]
    (config,) = TrlParser((AlphaGRPOConfig,)).parse_args_and_config(arguments)
    painting = config.for_task("reasoning_t2i")
    assert painting.guidance == replace(PAINTING, text_scale=3.0)
    assert painting.train_rollout(0).size == (256, 512) and config.train_rollout(0).size == (512, 512)
    assert painting.eval_rollout().denoising.num_timesteps == 9 and config.eval_rollout().denoising.num_timesteps == 16
    assert (painting.top_p, config.top_p) == (1.0, 0.8)


def test_task_settings_win_over_what_was_given_for_the_run(make_config: Callable[..., AlphaGRPOConfig]) -> None:
    own = {"cfg_text_scale": 2.0, "temperature": 0.7, "max_completion_length": 9, "eval_temperature": 0.1}
    for task in ("reasoning_t2i", "self_reflection"):
        settings = {"cfg_text_scale": 3.0, "temperature": 0.9, "max_completion_length": 20, "eval_temperature": 0.5}
        config = make_config(task=task, **settings, task_settings={"reasoning_t2i": own})
        training = config.for_task("reasoning_t2i").train_rollout(0)
        assert training.denoising.guidance.text_scale == 2.0
        assert (training.temperature, training.max_new_tokens) == (0.7, 9)
        assert config.for_task("reasoning_t2i").eval_rollout().temperature == 0.1
        assert config.for_task("image_editing").temperature == 0.9


def test_evaluation_of_a_task_follows_its_training(make_config: Callable[..., AlphaGRPOConfig]) -> None:
    own = {
        "reasoning_t2i": {"cfg_text_scale": 2.0, "timestep_shift": 1.5},
        "image_editing": {"eval_cfg_img_scale": 1.3},
    }
    config = make_config(task="self_reflection", eval_cfg_img_scale=1.7, task_settings=own)

    def guidance(task: str) -> GuidanceConfig:
        return config.for_task(task).eval_rollout().denoising.guidance

    assert guidance("reasoning_t2i") == replace(PAINTING, text_scale=2.0)
    assert guidance("image_editing") == replace(REFINING, image_scale=1.3)
    assert guidance("self_reflection") == replace(REFINING, image_scale=1.7)
    assert config.for_task("reasoning_t2i").eval_rollout().denoising.timestep_shift == 1.5


def test_copies_know_what_was_given(make_config: Callable[..., AlphaGRPOConfig]) -> None:
    config = make_config(task="self_reflection", cfg_text_scale=3.0)
    for same in (config.copy(), pickle.loads(pickle.dumps(config)), config.for_task("image_editing")):
        assert same.for_task("reasoning_t2i").guidance == replace(PAINTING, text_scale=3.0)
    assert config.for_task("self_reflection") is config.for_task(None) is config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"self_reflection": {"num_timesteps": 8}}, "task 'self_reflection': .*window"),
        ({"self_reflection": {"cfg_renorm_type": "row"}}, "task 'self_reflection': unknown renorm_type 'row'"),
        ({"self_reflection": {"cfg_interval": [0.9, 0.1]}}, r"task 'self_reflection': interval must be \(low, high\)"),
        (
            {"self_reflection": {"max_completion_length": 0}},
            "task 'self_reflection': max_completion_length.*be positive",
        ),
        ({"self_reflection": {"top_p": 1.5}}, "task 'self_reflection': top_p must be in"),
        ({"self_reflection": {"eval_num_timesteps": 1}}, "task 'self_reflection': eval_num_timesteps must"),
        ({"self_reflection": {"eval_ode_solver": "rk4"}}, "task 'self_reflection': in evaluation: unknown"),
        (
            {"reasoning_t2i": {"cfg_text_scale": float("nan")}},
            "'cfg_text_scale'.* must be a finite number, but is nan",
        ),
        ({"reasoning_t2i": {"eval_cfg_interval": [0.4]}}, "'eval_cfg_interval' takes two numbers"),
        ({"reasoning_t2j": {}}, "task_settings: unknown task 'reasoning_t2j'. Did you mean 'reasoning_t2i'"),
        ({"reasoning_t2i": {"cfg_txt_scale": 1}}, "unknown setting 'cfg_txt_scale'. Did you mean 'cfg_text_scale'"),
        ({"reasoning_t2i": {"sde_window_size": 3}}, "'sde_window_size' is a setting of the run, which all its tasks"),
        ({"reasoning_t2i": {"num_generations": 3}}, "'num_generations' is a setting of the run"),
        ({"reasoning_t2i": {"image_objective": "awm"}}, "'image_objective' is a setting of the run"),
        ("{reasoning_t2i: 3}", "task_settings is no JSON"),
    ],
)
def test_bad_task_settings_raise(
    make_config: Callable[..., AlphaGRPOConfig], settings: dict[str, Any] | str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(task_settings=settings)


def test_windows_must_lie_after_the_start_of_a_repaint(make_config: Callable[..., AlphaGRPOConfig]) -> None:
    """Steps 3 and 4 begin at times .923 and .892."""
    window = {"sde_window_size": 4, "num_timesteps": 16}
    message = r"from step 3 .* refine_strength=0.92: let windows begin at step 4 .*sde_window_range=\[3, 11\]"
    for settings in (
        {"task": "self_reflection", "refine_strength": 0.92},
        {"task_settings": {"self_reflection": {"refine_strength": 0.92}}},
    ):
        make_config(**settings, **window, sde_window_range=[4, 11])
        with pytest.raises(ValueError, match=message):
            make_config(**settings, **window, sde_window_range=[3, 11])


def test_only_tasks_that_look_at_an_image_start_from_it(make_config: Callable[..., AlphaGRPOConfig]) -> None:
    def strengths(config: AlphaGRPOConfig) -> list[float]:
        tasks = ("reasoning_t2i", "self_reflection", "image_editing")
        return [config.for_task(task).train_rollout(0).denoising.refine_strength for task in tasks]

    window = {"sde_window_size": 4, "sde_window_range": [6, 11]}
    assert strengths(make_config(task="self_reflection")) == [1.0, 1.0, 1.0]
    assert strengths(make_config(task="self_reflection", refine_strength=0.9, **window)) == [1.0, 0.9, 0.9]
    assert strengths(make_config(refine_strength=0.9, **window)) == [1.0, 0.9, 0.9]
    config = make_config(task="self_reflection", eval_refine_strength=0.6)
    assert config.train_rollout(0).denoising.refine_strength == 1.0
    assert config.eval_rollout().denoising.refine_strength == 0.6
    assert config.eval_rollout().to_settings()["refine_strength"] == 0.6
    config = make_config(task="self_reflection", refine_strength=0.9, **window)
    assert config.eval_rollout().denoising.refine_strength == 0.9


def test_settings_of_the_task_that_paints_first_are_checked(make_config: Callable[..., AlphaGRPOConfig]) -> None:
    with pytest.raises(ValueError, match="task 'reasoning_t2i': .*num_timesteps"):
        make_config(task="self_reflection", task_settings={"reasoning_t2i": {"num_timesteps": 5}})


def test_changed_arguments_are_those_that_were_given(
    make_config: Callable[..., AlphaGRPOConfig], tmp_path: Path
) -> None:
    # What follows from an argument, and an argument that is given its default, are not changed.
    config = make_config(
        per_device_train_batch_size=28, num_generations=14, eval_temperature=0.0, sde_window_range=[0, 11]
    )
    own = {"output_dir", "use_cpu", "bf16"}
    assert config.changed_arguments == own | {"per_device_train_batch_size", "eval_temperature"}
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False", "--num_timesteps", "12"]
    (parsed,) = TrlParser([AlphaGRPOConfig]).parse_args_and_config(arguments)
    assert parsed.changed_arguments == own | {"num_timesteps"}
