# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import ast
import json
import shlex
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import ModelConfig, TrlParser

from alphagrpo_ext.trainer import AlphaGRPOConfig
from recipe_tools.openrlhf.flags import (
    FIXED,
    JOINT,
    RENAMED,
    SWITCHES,
    WITHOUT_EFFECT,
    FlagParser,
    target_arguments,
    translate_flags,
)
from recipe_tools.openrlhf.joint_flags import FlagError, batch_arguments
from reward_models.arguments import PromptArguments


ROOT = Path(__file__).parents[2]

FLAGS = [*RENAMED, *SWITCHES, *JOINT, *FIXED, *WITHOUT_EFFECT]

# Arguments of the Ray job, which no recipe has.
RAY_ARGUMENTS = {"num_workers", "use_gpu", "environment"}


def translated(command: str) -> dict[str, list[str]]:
    """Values of the arguments of a translated command line, by name."""
    return by_name(translate_flags(shlex.split(command))[0])


def by_name(parts: list[str]) -> dict[str, list[str]]:
    arguments: dict[str, list[str]] = {}
    for part in parts:
        if part.startswith("--"):
            arguments[part[2:]] = []
        else:
            arguments[list(arguments)[-1]].append(part)
    return arguments


def refusal(command: str) -> str:
    with pytest.raises(FlagError) as error:
        translate_flags(shlex.split(command))
    return str(error.value)


def openrlhf_parser(path: Path) -> argparse.ArgumentParser:
    """OpenRLHF's parser, without the imports of its module, which need a GPU."""
    main = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)][-1]
    statements = []
    for node in main.body:
        if "parse_args" in ast.unparse(node):
            break
        statements.append(node)
    names = {"argparse": argparse, "datetime": datetime}
    exec(compile(ast.Module(statements, []), str(path), "exec"), names)
    return names["parser"]


def test_every_flag_stands_in_one_table() -> None:
    assert len(FLAGS) == len(set(FLAGS)) > 100


@pytest.mark.slow
def test_flags_are_those_of_the_installed_package() -> None:
    if find_spec("openrlhf") is None:
        pytest.skip("OpenRLHF is not installed")
    package = Path(find_spec("openrlhf").submodule_search_locations[0])
    parser = openrlhf_parser(package / "cli" / "train_ppo_ray.py")
    expected = {action.option_strings[0][2:]: action.nargs for action in parser._actions}
    actual = {action.dest: action.nargs for action in FlagParser()._actions}
    assert actual.keys() == set(FLAGS) <= expected.keys()
    for name in {*FLAGS} - {*WITHOUT_EFFECT, "ds.lora.target_modules"}:
        assert actual[name] == expected[name], name


def test_translated_arguments_exist() -> None:
    parser = TrlParser((PromptArguments, AlphaGRPOConfig, ModelConfig))
    known = {action.dest for action in parser._actions} | RAY_ARGUMENTS
    for name in FLAGS:
        assert set(target_arguments(name)) <= known, name


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("--actor.model_name_or_path m", "--model_name_or_path m"),
        ("--actor.adam.lr 1e-5", "--learning_rate 1e-5"),
        ("--actor.adam.lr=1e-5", "--learning_rate 1e-5"),
        ("--actor.adam.lr 1e-4 --actor.adam.lr 1e-5", "--learning_rate 1e-5"),
        ("--actor.adam.betas 0.9 0.95", "--adam_beta1 0.9 --adam_beta2 0.95"),
        ("--actor.adam.weight_decay 0.1 --actor.adam.eps 1e-6", "--weight_decay 0.1 --adam_epsilon 1e-6"),
        ("--actor.max_norm 0.5", "--max_grad_norm 0.5"),
        ("--actor.lr_warmup_ratio 0.03", "--warmup_steps 0.03"),
        ("--actor.lr_scheduler linear", "--lr_scheduler_type linear --lr_scheduler_kwargs {}"),
        (
            "--actor.lr_scheduler cosine_with_min_lr --actor.min_lr_ratio 0.2",
            "--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{\"min_lr_rate\": 0.2}'",
        ),
        ("--rollout.n_samples_per_prompt 14", "--num_generations 14"),
        ("--rollout.temperature 0.9 --rollout.top_p 0.8", "--temperature 0.9 --top_p 0.8"),
        ("--rollout.max_new_tokens 256", "--max_completion_length 256"),
        ("--train.micro_batch_size 2", "--per_device_train_batch_size 2"),
        ("--train.num_episodes 3", "--num_train_epochs 3 --max_steps -1"),
        ("--train.max_epochs 2 --train.seed 7", "--num_iterations 2 --seed 7"),
        ("--actor.eps_clip 0.1", "--epsilon 0.1 --epsilon_high 0.1"),
        ("--actor.eps_clip 0.1 --actor.eps_clip_low_high 0.2 0.28", "--epsilon 0.2 --epsilon_high 0.28"),
        ("--actor.dual_clip 3", "--delta 3"),
        ("--actor.gradient_checkpointing_enable", "--gradient_checkpointing true"),
        ("--actor.policy_loss_type gspo", "--importance_sampling_level sequence --loss_type grpo"),
        ("--actor.policy_loss_type ppo", "--importance_sampling_level token"),
        # OpenRLHF averages by sequence whenever the ratio is one of sequences.
        (
            "--actor.policy_loss_type gspo --actor.loss_agg_mode token-mean",
            "--loss_type grpo --importance_sampling_level sequence",
        ),
        ("--actor.loss_agg_mode token-mean", "--loss_type dapo"),
        ("--algo.advantage.estimator group_norm", "--scale_rewards group"),
        ("--algo.advantage.estimator group_norm --algo.advantage.no_std_norm", "--scale_rewards none"),
        ("--algo.advantage.estimator dr_grpo", "--scale_rewards none"),
        ("--algo.kl.init_coef 0", "--beta 0"),
        ("--algo.kl.init_coef 0.01 --algo.kl.use_loss --algo.kl.estimator k3", "--beta 0.01"),
        ("--algo.kl.unbiased_gradient", "--use_bias_correction_kl true"),
        ("--ds.lora.rank 32 --ds.lora.alpha 64", "--use_peft true --lora_r 32 --lora_alpha 64"),
        ("--ds.lora.rank 0", "--use_peft false"),
        (
            "--ds.lora.target_modules q_proj v_proj --ds.lora.dropout 0",
            "--lora_target_modules q_proj v_proj --lora_dropout 0",
        ),
        ("--ds.param_dtype bf16", "--bf16 true --dtype float32"),
        ("--ds.param_dtype bf16 --ds.lora.rank 8", "--use_peft true --lora_r 8 --bf16 true --dtype bfloat16"),
        ("--ds.param_dtype bf16 --use_peft true", "--use_peft true --bf16 true --dtype bfloat16"),
        ("--ds.attn_implementation sdpa", "--attn_implementation sdpa"),
        ("--ds.zero_stage 0", ""),
        ("--data.prompt_dataset p.jsonl", "--train_file p.jsonl"),
        ("--data.max_samples 64", "--num_train_prompts 64"),
        ("--eval.dataset e.jsonl --eval.n_samples_per_prompt 4", "--eval_file e.jsonl --eval_seeds 4"),
        ("--ckpt.output_dir out --ckpt.save_steps 5", "--output_dir out --save_strategy steps --save_steps 5"),
        ("--ckpt.save_steps -1", "--save_strategy no"),
        ("--ckpt.load_enable --ckpt.max_num 2", "--resume_from_checkpoint last --save_total_limit 2"),
        ("--logger.logging_steps 10", "--logging_steps 10"),
        (
            "--logger.wandb.project p --logger.wandb.org o --logger.wandb.group g --logger.wandb.run_name r",
            "--run_name r --environment WANDB_PROJECT=p WANDB_ENTITY=o WANDB_RUN_GROUP=g --report_to wandb",
        ),
        ("--logger.tensorboard_dir t", "--environment TENSORBOARD_LOGGING_DIR=t --report_to tensorboard"),
        ("--reward.remote_url http://judge:8001", "--judge server --judge_base_url http://judge:8001"),
        ("--reward.remote_url http://judge:8001/get_reward", "--judge server --judge_base_url http://judge:8001"),
        ("--reward.remote_url judge:8001/proxy/score/", "--judge server --judge_base_url http://judge:8001/proxy"),
        ("--actor.num_nodes 2 --actor.num_gpus_per_node 4", "--num_workers 8 --use_gpu true"),
        ("--actor.num_nodes 2", "--num_workers 16 --use_gpu true"),
        ("--ref.offload", "--offload_ref_model true"),
        # What asks for nothing but what happens anyway is not refused.
        ("--ds.ring_attn_size 1 --data.input_key prompt --actor.optim adam --eval.steps -1", ""),
        # Arguments of recipes stand beside flags, in any spelling, and keep their order.
        ("--max_steps 5 --actor.adam.lr 1 --report_to none", "--max_steps 5 --report_to none --learning_rate 1"),
        ("--ckpt.output_dir runs/a.b --config c.yaml", "--config c.yaml --output_dir runs/a.b"),
    ],
)
def test_translates(command: str, expected: str) -> None:
    assert translated(command) == by_name(shlex.split(expected))


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        # Flags that are not translated, by the one rule.
        ("--actor.adm.lr 1", "does not translate OpenRLHF's flag --actor.adm.lr: did you mean --actor.adam.lr?"),
        ("--a.b.c 1", "--help lists"),
        ("--rollout.batch-size 1", "did you mean --rollout.batch_size?"),
        ("--train.max_norm 1", "did you mean --actor.max_norm?"),
        ("--critic.adam.lr 1", "did you mean --actor.adam.lr?"),
        ("--ckpt.path checkpoints", "--ckpt.output_dir"),
        ("--data.label_key label", "'semantic_questions'"),
        ("--reward.model_name_or_path rm", "choose a judge"),
        ("--train.agent_func_path a.py", "--recipe self_reflection"),
        # Flags that may only ask for what happens anyway.
        ("--ds.ring_attn_size 2", "--ds.ring_attn_size: invalid choice: '2'"),
        ("--eval.steps 10", "--eval.steps: invalid choice: '10'"),
        # Values.
        ("--actor.adam.lr fast", "--actor.adam.lr: takes a number, but got 'fast'"),
        ("--actor.adam.lr nan --train.seed 1", "--actor.adam.lr: takes a number, but got 'nan'"),
        ("--actor.adam.lr", "--actor.adam.lr: expected one argument"),
        ("--actor.adam.lr --train.seed 1", "--actor.adam.lr: expected one argument"),
        ("--actor.adam.betas 0.9 --train.seed 1", "--actor.adam.betas: expected 2 arguments"),
        (
            "--actor.gradient_checkpointing_enable=true",
            "--actor.gradient_checkpointing_enable: ignored explicit argument",
        ),
        ("--train.seed 1.5", "takes a whole number of at least 0, but got '1.5'"),
        ("--train.num_episodes 0", "at least 1"),
        ("--ckpt.save_steps 0", "at least 1"),
        ("--rollout.n_samples_per_prompt 1", "at least 2"),
        ("--actor.lr_warmup_ratio 1", "below 1"),
        ("--algo.advantage.estimator gae", "'group_norm', 'dr_grpo'"),
        ("--actor.policy_loss_type reinforce", "'ppo', 'gspo'"),
        ("--ds.zero_stage 4", "invalid choice: '4'"),
        ("--ds.param_dtype fp16", "'bf16'"),
        ("--ds.attn_implementation flash_attention_2", "'flex_attention', 'sdpa', 'eager'"),
        ("--ds.lora.target_modules all-linear", "vision tower"),
        ("--reward.remote_url reward_file.py", "--judge"),
        ("--reward.remote_url http://a,http://b", "one reward server"),
        ("--reward.remote_url http://vllm:8000/v1", "--judge openai --judge_base_url"),
        ("--reward.remote_url ftp://judge", "URL of one reward server"),
        # Flags and arguments together.
        ("--actor.adam.lr 1 --learning_rate 2", "--actor.adam.lr and --learning_rate set the same thing"),
        ("--actor.adam.lr 1 --learning-rate=2", "--actor.adam.lr and --learning_rate set the same thing"),
        ("--train.num_episodes 2 --max_steps 9", "--max_steps"),
        ("--actor.num_nodes 1 --num_workers 2", "--num_workers"),
        ("--algo.kl.init_coef 0.01", "--algo.kl.use_loss --algo.kl.estimator k3"),
        ("--algo.kl.init_coef 0.01 --algo.kl.use_loss --algo.kl.estimator k1", "k3"),
        ("--actor.min_lr_ratio 0.1", "cosine_with_min_lr"),
        ("--ds.adam_offload", "--ds.zero_stage"),
        ("--ds.zpg 8 --ds.zero_stage 2", "--ds.zero_stage 3"),
        ("--data.max_samples 8 --data.prompt_dataset p.jsonl", "shorten the file"),
    ],
)
def test_refuses(command: str, reason: str) -> None:
    assert reason in refusal(command)


def test_a_key_on_the_command_line_is_refused_and_not_repeated() -> None:
    message = refusal("--logger.wandb.key 0123secret")
    assert "WANDB_API_KEY" in message and "0123secret" not in message


def test_flags_without_effect_are_noted() -> None:
    command = "--max_steps 5 --vllm.num_engines 8 --train.colocate_all --report_to none wandb --train.seed 1"
    arguments, notes = translate_flags(command.split())
    assert arguments == ["--max_steps", "5", "--report_to", "none", "wandb", "--seed", "1"]
    assert len(notes) == 2
    assert notes[0].startswith("--vllm.num_engines has no effect: the workers that train also roll out")


def test_batch_sizes_become_trl_arguments() -> None:
    arguments = translated(
        "--rollout.batch_size 32 --rollout.n_samples_per_prompt 14 --train.batch_size 224 --train.micro_batch_size 7 "
        "--actor.num_nodes 2 --actor.num_gpus_per_node 8"
    )
    assert arguments["num_generations"] == ["14"]
    assert arguments["per_device_train_batch_size"] == ["7"]
    # 448 samples a rollout and 224 an update, 16 workers times 7 at once.
    assert arguments["steps_per_generation"] == ["4"]
    assert arguments["gradient_accumulation_steps"] == ["2"]


def test_batch_sizes_take_workers_and_group_from_arguments() -> None:
    arguments, notes = translate_flags(
        shlex.split("--rollout.batch_size 4 --train.batch_size 16 --num_generations 8 --num_workers=2")
    )
    assert arguments[-2:] == ["--steps_per_generation", "16"]
    assert notes == ["--train.micro_batch_size is not given and taken as 1, OpenRLHF's default"]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("--rollout.batch_size 4 --rollout.n_samples_per_prompt 8", "--rollout.batch_size needs --train.batch_size"),
        ("--train.batch_size 4 --rollout.n_samples_per_prompt 8", "--train.batch_size needs --rollout.batch_size"),
        ("--rollout.batch_size 4 --train.batch_size 8", "--rollout.n_samples_per_prompt"),
        (
            "--rollout.batch_size 4 --rollout.n_samples_per_prompt 8 --train.batch_size 12",
            "4 x 8 = 32 samples, which is not a multiple of train.batch_size = 12",
        ),
        (
            "--rollout.batch_size 4 --rollout.n_samples_per_prompt 8 --train.batch_size 64",
            "--train.batch_size 32 makes one update per rollout",
        ),
        (
            "--rollout.batch_size 4 --rollout.n_samples_per_prompt 8 --train.batch_size 16 --train.micro_batch_size 4 "
            "--num_workers 3",
            "train.batch_size = 16 samples is not a multiple of train.micro_batch_size x workers = 4 x 3 = 12",
        ),
        (
            "--rollout.batch_size 4 --rollout.n_samples_per_prompt 8 --train.batch_size 32 --steps_per_generation 4",
            "--steps_per_generation follows from --rollout.batch_size and --train.batch_size",
        ),
        (
            "--rollout.batch_size 4 --rollout.n_samples_per_prompt 8 --train.batch_size 32 --per_device_train_batch_size 4",
            "--per_device_train_batch_size",
        ),
        (
            "--rollout.batch_size 4 --rollout.n_samples_per_prompt 8 --train.batch_size 32 --generation_batch_size 4",
            "--generation_batch_size",
        ),
    ],
)
def test_batch_sizes_that_do_not_fit_are_refused(command: str, reason: str) -> None:
    assert reason in refusal(command)


@settings(deadline=None, max_examples=200)
@given(*(st.integers(1, 12) for _ in range(2)), *(st.integers(1, 24) for _ in range(3)))
def test_batch_sizes_are_exact_or_refused(group: int, workers: int, prompts: int, update: int, micro: int) -> None:
    try:
        per_device, accumulation, steps = batch_arguments(prompts, group, update, micro, workers)
    except FlagError:
        assert (prompts * group) % update or update % (micro * workers)
        return
    assert per_device * workers * steps == prompts * group
    assert per_device * workers * accumulation == update


def test_deepspeed_configuration_is_read_by_transformers() -> None:
    pytest.importorskip("deepspeed")
    (value,) = translated(
        "--ds.zero_stage 3 --ds.zpg 8 --ds.adam_offload --ds.overlap_comm --ds.grad_accum_dtype fp32"
    )["deepspeed"]
    config = json.loads(value)
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["zero_hpz_partition_size"] == 8
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    assert HfDeepSpeedConfig(config).is_zero3()


def test_example_of_the_recipe_translates() -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / "recipes" / "ray_train.py").read_text()))
    commands = [block.replace("\\\n", " ") for block in docstring.split("```bash\n")[1:]]
    (command,) = [block.partition("```")[0] for block in commands if "--actor.model_name_or_path" in block]
    arguments = translated(" ".join(shlex.split(command)[2:]))
    assert arguments["num_workers"] == ["16"]
    assert arguments["judge"] == ["server"]
    assert command.count("--") > 20 and arguments["recipe"] == ["reasoning_t2i"]


def test_help_lists_every_flag() -> None:
    assert {f"--{name}" for name in FLAGS} <= set(FlagParser().format_help().split())
