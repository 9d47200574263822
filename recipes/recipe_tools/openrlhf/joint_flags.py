# SPDX-License-Identifier: Apache-2.0

"""
Translation of those flags of OpenRLHF whose meaning depends on other flags or on their values.

Each conversion takes the values of OpenRLHF's flags, the first value of each argument of the recipe that is given beside them,
and a list to which it may add notes for the user.
"""

from __future__ import annotations

import json
from typing import Any


Given = dict[str, Any]
Named = dict[str, str]
Arguments = dict[str, list[str]]


class FlagError(ValueError):
    """A flag that cannot be translated. The message says why and what to do."""


def convert_workers(given: Given, named: Named, notes: list[str]) -> Arguments:
    if given.keys().isdisjoint(("actor.num_nodes", "actor.num_gpus_per_node")):
        return {}
    # OpenRLHF's defaults.
    num_nodes, num_gpus = given.get("actor.num_nodes", 1), given.get("actor.num_gpus_per_node", 8)
    return {"num_workers": [str(int(num_nodes) * int(num_gpus))], "use_gpu": ["true"]}


def convert_batches(given: Given, named: Named, notes: list[str]) -> Arguments:
    group_size, micro_batch_size = given.get("rollout.n_samples_per_prompt"), given.get("train.micro_batch_size")
    arguments = {"num_generations": [group_size]} if group_size else {}
    batch_flags = ("rollout.batch_size", "train.batch_size")
    if given.keys().isdisjoint(batch_flags):
        return arguments | ({"per_device_train_batch_size": [micro_batch_size]} if micro_batch_size else {})
    for name, other in (batch_flags, batch_flags[::-1]):
        if name not in given:
            raise FlagError(f"--{other} needs --{name} beside it, to know the number of updates per rollout")
    group_size = group_size or named.get("num_generations")
    if group_size is None:
        raise FlagError(
            "--rollout.batch_size needs --rollout.n_samples_per_prompt beside it, to know the number of samples"
        )
    if micro_batch_size is None:
        micro_batch_size = "1"
        notes.append("--train.micro_batch_size is not given and taken as 1, OpenRLHF's default")
    (num_workers,) = convert_workers(given, named, []).get("num_workers", [named.get("num_workers", "1")])
    for argument in (*BATCH_ARGUMENTS, "generation_batch_size"):
        if argument in named:
            raise FlagError(f"--{argument} follows from --rollout.batch_size and --train.batch_size: leave it out")
    sizes = (given["rollout.batch_size"], group_size, given["train.batch_size"], micro_batch_size, num_workers)
    numbers = batch_arguments(*map(int, sizes))
    return arguments | {name: [str(value)] for name, value in zip(BATCH_ARGUMENTS, numbers, strict=True)}


BATCH_ARGUMENTS = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")


def batch_arguments(
    num_prompts: int, group_size: int, update_size: int, micro_batch_size: int, num_workers: int
) -> tuple[int, int, int]:
    """
    Values of `BATCH_ARGUMENTS` for OpenRLHF's batch sizes.

    Args:
        num_prompts (`int`): Prompts per rollout.
        group_size (`int`): Samples per prompt.
        update_size (`int`): Samples per update, over all workers.
        micro_batch_size (`int`): Samples that a worker trains on at once.
        num_workers (`int`): Number of workers.

    Raises:
        [`FlagError`]: If they do not divide each other; the message has the numbers.
    """
    num_samples, samples_at_once = num_prompts * group_size, micro_batch_size * num_workers
    if num_samples % update_size:
        raise FlagError(
            f"a rollout has rollout.batch_size x rollout.n_samples_per_prompt = {num_prompts} x {group_size} = {num_samples} "
            f"samples, which is not a multiple of train.batch_size = {update_size}: --train.batch_size {num_samples} makes one "
            "update per rollout"
        )
    if update_size % samples_at_once:
        raise FlagError(
            f"train.batch_size = {update_size} samples is not a multiple of train.micro_batch_size x workers = "
            f"{micro_batch_size} x {num_workers} = {samples_at_once}"
        )
    return micro_batch_size, update_size // samples_at_once, num_samples // samples_at_once


def convert_run(given: Given, named: Named, notes: list[str]) -> Arguments:
    """Length of the run, its data, its checkpoints and its judge."""
    arguments = {}
    if "train.num_episodes" in given:
        # A step limit in the recipe's configuration would win over epochs.
        arguments |= {"num_train_epochs": [given["train.num_episodes"]], "max_steps": ["-1"]}
    if "data.max_samples" in given:
        if "data.prompt_dataset" in given or "train_file" in named:
            raise FlagError("--data.max_samples limits only prompts of the shapes world: shorten the file instead")
        arguments["num_train_prompts"] = [given["data.max_samples"]]
    save_steps = given.get("ckpt.save_steps")
    if save_steps is not None:
        never = save_steps == "-1"
        arguments |= {"save_strategy": ["no"]} if never else {"save_strategy": ["steps"], "save_steps": [save_steps]}
    if "reward.remote_url" in given:
        arguments |= {"judge": ["server"], "judge_base_url": [given["reward.remote_url"]]}
    return arguments


def convert_loss(given: Given, named: Named, notes: list[str]) -> Arguments:
    """Clipping, averaging, advantages and KL of text."""
    arguments = {}
    if "actor.eps_clip" in given or "actor.eps_clip_low_high" in given:
        low, high = given.get("actor.eps_clip_low_high") or [given["actor.eps_clip"]] * 2
        arguments |= {"epsilon": [low], "epsilon_high": [high]}
    if "actor.loss_agg_mode" in given:
        arguments["loss_type"] = ["dapo" if given["actor.loss_agg_mode"] == "token-mean" else "grpo"]
    if "actor.policy_loss_type" in given:
        is_gspo = given["actor.policy_loss_type"] == "gspo"
        # OpenRLHF averages by sequence whenever ratios are those of sequences.
        arguments |= {"importance_sampling_level": ["sequence" if is_gspo else "token"]}
        arguments |= {"loss_type": ["grpo"]} if is_gspo else {}
    estimator = given.get("algo.advantage.estimator")
    if estimator == "dr_grpo" or "algo.advantage.no_std_norm" in given:
        arguments["scale_rewards"] = ["none"]
    elif estimator:
        arguments["scale_rewards"] = ["group"]
    coefficient = given.get("algo.kl.init_coef")
    if coefficient is not None:
        if float(coefficient) > 0 and ("algo.kl.use_loss" not in given or given.get("algo.kl.estimator") != "k3"):
            raise FlagError(
                f"--algo.kl.init_coef {coefficient}: here the KL is a term of the loss, estimated by k3, not a part of the "
                "reward. Add --algo.kl.use_loss --algo.kl.estimator k3, or set it to 0"
            )
        arguments["beta"] = [coefficient]
    return arguments


def convert_scheduler(given: Given, named: Named, notes: list[str]) -> Arguments:
    scheduler = given.get("actor.lr_scheduler", named.get("lr_scheduler_type"))
    flags = {"actor.lr_scheduler", "actor.min_lr_ratio"} & given.keys()
    arguments = {"lr_scheduler_type": [scheduler]} if "actor.lr_scheduler" in given else {}
    if scheduler == "cosine_with_min_lr" and flags:
        if "actor.min_lr_ratio" not in given:
            notes.append("--actor.min_lr_ratio is not given and taken as 0.1, OpenRLHF's default")
        ratio = float(given.get("actor.min_lr_ratio", 0.1))
        return arguments | {"lr_scheduler_kwargs": [json.dumps({"min_lr_rate": ratio})]}
    if "actor.min_lr_ratio" in given:
        raise FlagError("--actor.min_lr_ratio needs --actor.lr_scheduler cosine_with_min_lr beside it")
    # Options in the recipe's configuration belong to the scheduler that is named there.
    return arguments | ({"lr_scheduler_kwargs": ["{}"]} if flags else {})


def convert_deepspeed(given: Given, named: Named, notes: list[str]) -> Arguments:
    stage, partition = int(given.get("ds.zero_stage", 0)), int(given.get("ds.zpg", 1))
    for name in ("ds.adam_offload", "ds.overlap_comm", "ds.grad_accum_dtype"):
        if name in given and not stage:
            raise FlagError(f"--{name} needs --ds.zero_stage 1, 2 or 3 beside it")
    if partition > 1 and stage != 3:
        raise FlagError(f"--ds.zpg {partition} needs --ds.zero_stage 3 beside it")
    if not stage:
        return {}
    zero: dict[str, object] = {"stage": stage}
    batch_sizes = ("gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu")
    config = {"zero_optimization": zero, "bf16": {"enabled": "auto"}, "gradient_clipping": "auto"}
    config |= dict.fromkeys(batch_sizes, "auto")
    if partition > 1:
        zero["zero_hpz_partition_size"] = partition
    if "ds.overlap_comm" in given:
        zero |= {"overlap_comm": True, "contiguous_gradients": True}
    if "ds.adam_offload" in given:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        # The trainer makes the optimizer itself.
        config["zero_force_ds_cpu_optimizer"] = False
    if "ds.grad_accum_dtype" in given:
        config["data_types"] = {"grad_accum_dtype": given["ds.grad_accum_dtype"]}
    return {"deepspeed": [json.dumps(config)]}


def convert_precision(given: Given, named: Named, notes: list[str]) -> Arguments:
    arguments = {}
    rank = given.get("ds.lora.rank")
    if rank is not None:
        arguments |= {"use_peft": ["false"]} if rank == "0" else {"use_peft": ["true"], "lora_r": [rank]}
    if "ds.param_dtype" in given:
        has_adapter = (rank or "0") != "0" or named.get("use_peft", "").lower() == "true"
        has_masters = given.get("ds.zero_stage", "0") != "0" or "deepspeed" in named
        arguments |= {"bf16": ["true"], "dtype": ["bfloat16" if has_adapter or has_masters else "float32"]}
        if not has_adapter and not has_masters:
            notes.append(
                "--ds.param_dtype bf16: forward and backward run in bf16, and weights stay fp32, because neither an adapter "
                "(--ds.lora.rank) nor DeepSpeed (--ds.zero_stage) keeps fp32 copies of them"
            )
    return arguments


def convert_reports(given: Given, named: Named, notes: list[str]) -> Arguments:
    variables = {
        "logger.wandb.project": "WANDB_PROJECT",
        "logger.wandb.org": "WANDB_ENTITY",
        "logger.wandb.group": "WANDB_RUN_GROUP",
        "logger.tensorboard_dir": "TENSORBOARD_LOGGING_DIR",
    }
    environment = [f"{variable}={given[name]}" for name, variable in variables.items() if name in given]
    services = {"wandb": "WANDB_", "tensorboard": "TENSORBOARD_"}
    used = [service for service, prefix in services.items() if any(entry.startswith(prefix) for entry in environment)]
    return {"environment": environment, "report_to": used} if environment else {}


CONVERSIONS = (
    convert_workers,
    convert_batches,
    convert_run,
    convert_loss,
    convert_scheduler,
    convert_deepspeed,
    convert_precision,
    convert_reports,
)
