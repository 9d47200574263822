# SPDX-License-Identifier: Apache-2.0

"""
OpenRLHF's dotted flags as arguments of this repository's recipes.

Only flags that are given are translated. What is not given keeps the recipe's own default, not OpenRLHF's.
"""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from recipe_tools.openrlhf_flag_table import FLAGS, Flag, FlagError, Treatment, real_number, whole_number


Given = Mapping[str, Sequence[str]]
"""Values by name: of OpenRLHF's flags, or of arguments."""

DOTTED_NAME = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)+")
NUM_GPUS_PER_NODE = 8
"""OpenRLHF's default."""
SCHEDULER_FLAGS = ("actor.lr_scheduler", "actor.min_lr_ratio")


@dataclass(frozen=True)
class Translation:
    """
    Args:
        arguments (`list[str]`): Arguments of recipes: those that were given as such, and what the flags became.
        notes (`list[str]`): A line for each flag that has no effect, and for each value that was filled in.
    """

    arguments: list[str]
    notes: list[str]


@dataclass(frozen=True)
class BatchSizes:
    """
    OpenRLHF's batch sizes.

    Args:
        num_prompts (`int`): Prompts a rollout.
        group_size (`int`): Samples a prompt.
        train_batch_size (`int`): Samples an update, of all workers.
        micro_batch_size (`int`): Samples that a worker trains on at once.
        num_workers (`int`): Workers.

    Raises:
        [`FlagError`]: If they do not divide each other; the message has the numbers.
    """

    num_prompts: int
    group_size: int
    train_batch_size: int
    micro_batch_size: int
    num_workers: int

    def __post_init__(self) -> None:
        samples, update = self.num_prompts * self.group_size, self.train_batch_size
        together = self.micro_batch_size * self.num_workers
        if samples % update:
            raise FlagError(
                f"a rollout has rollout.batch_size x rollout.n_samples_per_prompt = {self.num_prompts} x {self.group_size} = "
                f"{samples} samples, which is not a multiple of train.batch_size = {update}: --train.batch_size {samples} "
                "makes one update a rollout"
            )
        if update % together:
            raise FlagError(
                f"train.batch_size = {update} samples is not a multiple of train.micro_batch_size x workers = "
                f"{self.micro_batch_size} x {self.num_workers} = {together}"
            )

    @property
    def arguments(self) -> dict[str, list[str]]:
        """The same in TRL's arguments."""
        together = self.micro_batch_size * self.num_workers
        return {
            "per_device_train_batch_size": [str(self.micro_batch_size)],
            "gradient_accumulation_steps": [str(self.train_batch_size // together)],
            "steps_per_generation": [str(self.num_prompts * self.group_size // together)],
        }


def translate_flags(arguments: Sequence[str]) -> Translation:
    """
    Translate a command line that may mix OpenRLHF's flags with arguments of recipes.

    Args:
        arguments (`Sequence[str]`): The command line, e.g. `["--actor.adam.lr", "1e-5", "--num_workers", "8"]`.

    Raises:
        [`FlagError`]: If a flag is unknown or has no meaning here, if a value cannot be read, if batch sizes do not divide
            each other, or if a flag and an argument set the same thing.
    """
    given, native = split_command_line(arguments)
    notes = []
    for name, values in given.items():
        flag = FLAGS[name]
        if flag.treatment is Treatment.REFUSED and not (flag.accepts and flag.accepts(values)):
            raise FlagError(f"--{name} has no meaning here: {flag.why}")
        if flag.treatment is Treatment.IGNORED:
            notes.append(f"--{name} has no effect: {flag.why}")

    translated: dict[str, Sequence[str]] = {}
    for name, values in given.items():
        if convert := FLAGS[name].convert:
            translated |= convert(values)
    named = _named_arguments(native)
    for convert_jointly in JOINT_CONVERSIONS:
        translated |= convert_jointly(given, named, notes)

    for name in given:
        for argument in FLAGS[name].arguments:
            if argument in named and argument in translated:
                raise FlagError(f"--{name} and --{argument} set the same thing: give one of them")
    flat = [part for name, values in translated.items() for part in (f"--{name}", *values)]
    return Translation([*native, *flat], notes)


def split_command_line(arguments: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """
    Take OpenRLHF's flags out of a command line. Of a flag that is given twice the last one counts, as in OpenRLHF.

    Returns:
        `tuple[dict[str, list[str]], list[str]]`: Values of the flags by name, and all other parts as they were.

    Raises:
        [`FlagError`]: If a flag is unknown or has too few values.
    """
    given, native = {}, []
    rest = list(arguments)
    while rest:
        part = rest.pop(0)
        name, has_value, value = part.removeprefix("--").partition("=")
        if not part.startswith("--") or (name not in FLAGS and not DOTTED_NAME.fullmatch(name)):
            native.append(part)
            continue
        if name not in FLAGS:
            raise FlagError(_unknown(name))
        flag = FLAGS[name]
        if has_value:
            values = [value]
        else:
            values = []
            most = flag.num_values if isinstance(flag.num_values, int) else len(rest)
            while rest and len(values) < most and not rest[0].startswith("--"):
                values.append(rest.pop(0))
        _check_num_values(flag, values)
        given[name] = values
    return given, native


def describe_flags() -> str:
    """The table of all flags, for `--help`."""
    lines = ["OpenRLHF's flags (what is not given keeps the recipe's default, not OpenRLHF's):", ""]
    for treatment in Treatment:
        lines.append(f"{treatment.value}:")
        by_text: dict[str, list[str]] = {}
        for flag in FLAGS.values():
            if flag.treatment is treatment:
                becomes = " ".join(f"--{name}" for name in flag.arguments)
                text = " | ".join(part for part in (becomes, flag.why) if part)
                by_text.setdefault(text, []).append(f"--{flag.name}")
        for text, names in by_text.items():
            lines += textwrap.wrap(", ".join(names), 116, initial_indent="  ", subsequent_indent="  ")
            lines += textwrap.wrap(text, 116, initial_indent=" " * 8, subsequent_indent=" " * 8)
        lines.append("")
    return "\n".join(lines)


def _check_num_values(flag: Flag, values: Sequence[str]) -> None:
    if flag.num_values == "*" or (flag.num_values == "+" and values) or flag.num_values == len(values):
        return
    expected = {0: "no value", 1: "one value", "+": "at least one value"}.get(
        flag.num_values, f"{flag.num_values} values"
    )
    raise FlagError(f"--{flag.name} takes {expected}, but got {' '.join(values) or 'none'}")


def _unknown(name: str) -> str:
    # The right name in the wrong place comes first.
    useful = [known for known, flag in FLAGS.items() if flag.treatment is not Treatment.REFUSED]
    placed = [known for known in useful if known.rpartition(".")[2] == name.rpartition(".")[2]]
    close = difflib.get_close_matches(name, placed, n=1) or placed or difflib.get_close_matches(name, FLAGS, n=1)
    hint = f"did you mean --{close[0]}?" if close else "--help lists those that it has"
    return f"OpenRLHF has no flag --{name}: {hint}"


def _named_arguments(native: Sequence[str]) -> dict[str, str]:
    """The value, or the first one, of each argument."""
    named = {}
    for part, following in zip_longest(native, native[1:], fillvalue=""):
        if part.startswith("--"):
            name, has_value, value = part.removeprefix("--").partition("=")
            # Transformers' parser takes both spellings.
            named[name.replace("-", "_")] = value if has_value else following
    return named


def _choose(name: str, values: Sequence[str], choices: Mapping[str, str]) -> str:
    if values[0] not in choices:
        raise FlagError(f"--{name} takes {' or '.join(choices)}, but got {values[0]!r}")
    return choices[values[0]]


def _workers(given: Given, named: Mapping[str, str], notes: list[str]) -> dict[str, list[str]]:
    names = ("actor.num_nodes", "actor.num_gpus_per_node")
    if not any(name in given for name in names):
        return {}
    nodes, gpus = (
        whole_number(name, given.get(name, [str(default)])[0], least=1)
        for name, default in zip(names, (1, NUM_GPUS_PER_NODE), strict=True)
    )
    return {"num_workers": [str(nodes * gpus)], "use_gpu": ["true"]}


def _batches(given: Given, named: Mapping[str, str], notes: list[str]) -> dict[str, list[str]]:
    def number(name: str, least: int = 1) -> int | None:
        return whole_number(name, given[name][0], least) if name in given else None

    prompts, samples = number("rollout.batch_size"), number("train.batch_size")
    micro, group = number("train.micro_batch_size"), number("rollout.n_samples_per_prompt")
    if group == 1:
        raise FlagError(
            "--rollout.n_samples_per_prompt 1: the baseline of an advantage is the mean of its group, so a group needs at least 2"
        )
    arguments = {} if group is None else {"num_generations": [str(group)]}
    if prompts is None and samples is None:
        return arguments if micro is None else arguments | {"per_device_train_batch_size": [str(micro)]}
    if prompts is None or samples is None:
        have, lack = ("train", "rollout") if prompts is None else ("rollout", "train")
        raise FlagError(f"--{have}.batch_size needs --{lack}.batch_size beside it, to know the updates a rollout")
    if group is None:
        if "num_generations" not in named:
            raise FlagError("--rollout.batch_size needs --rollout.n_samples_per_prompt beside it, to know the samples")
        group = whole_number("num_generations", named["num_generations"], least=2)
    if micro is None:
        micro = 1
        notes.append("--train.micro_batch_size is not given and taken as 1, OpenRLHF's default")
    (num_workers,) = _workers(given, named, []).get("num_workers", [named.get("num_workers", "1")])
    sizes = BatchSizes(prompts, group, samples, micro, whole_number("num_workers", num_workers, least=1))
    # They follow from the four together, whichever of them is given.
    for argument in (*sizes.arguments, "generation_batch_size"):
        if argument in named:
            raise FlagError(f"--{argument} follows from --rollout.batch_size and --train.batch_size: leave it out")
    return arguments | sizes.arguments


def _data(given: Given, named: Mapping[str, str], notes: list[str]) -> dict[str, list[str]]:
    if "data.max_samples" not in given:
        return {}
    if "data.prompt_dataset" in given or "train_file" in named:
        raise FlagError("--data.max_samples limits prompts of the shapes world alone: shorten the file instead")
    return {"num_train_prompts": [str(whole_number("data.max_samples", given["data.max_samples"][0], least=1))]}


def _clipping(given: Given, named: Mapping[str, str], notes: list[str]) -> dict[str, list[str]]:
    if "actor.eps_clip_low_high" in given:
        name, (low, high) = "actor.eps_clip_low_high", given["actor.eps_clip_low_high"]
    elif "actor.eps_clip" in given:
        name, (low, high) = "actor.eps_clip", given["actor.eps_clip"] * 2
    else:
        return {}
    for value in (low, high):
        real_number(name, value)
    return {"epsilon": [low], "epsilon_high": [high]}


def _policy_loss(given: Given, named: Mapping[str, str], notes: list[str]) -> dict[str, list[str]]:
    arguments = {}
    if "actor.loss_agg_mode" in given:
        loss = {"token-mean": "dapo", "seq-mean-token-mean": "grpo"}
        arguments["loss_type"] = [_choose("actor.loss_agg_mode", given["actor.loss_agg_mode"], loss)]
    if "actor.policy_loss_type" in given:
        level = _choose(
            "actor.policy_loss_type", given["actor.policy_loss_type"], {"ppo": "token", "gspo": "sequence"}
        )
        arguments["importance_sampling_level"] = [level]
        if level == "sequence":
            arguments["loss_type"] = ["grpo"]
    return arguments


def _advantages(given: Given, named: Mapping[str, str], notes: list[str]) -> dict[str, list[str]]:
    estimator = given.get("algo.advantage.estimator", [None])[0]
    if estimator not in (None, "group_norm", "dr_grpo"):
        instead = {
            "rloo": "dr_grpo is the same but for the factor (n - 1) / n",
            "reinforce_baseline": "--scale_rewards batch comes closest: mean of the group, deviation of the batch",
        }.get(estimator, "take group_norm, or dr_grpo, which does not divide by the deviation")
        raise FlagError(
            f"--algo.advantage.estimator {estimator} is not there, since advantages are relative to a group: {instead}"
        )
    if estimator == "dr_grpo" or "algo.advantage.no_std_norm" in given:
        return {"scale_rewards": ["none"]}
    return {"scale_rewards": ["group"]} if estimator else {}


def _kl(given: Given, named: Mapping[str, str], notes: list[str]) -> dict[str, list[str]]:
    if "algo.kl.init_coef" not in given:
        return {}
    (value,) = given["algo.kl.init_coef"]
    if real_number("algo.kl.init_coef", value) > 0:
        if "algo.kl.use_loss" not in given or given.get("algo.kl.estimator") != ["k3"]:
            raise FlagError(
                f"--algo.kl.init_coef {value}: here the KL is a term of the loss, estimated by k3, not a part of the reward: say "
                "so with --algo.kl.use_loss --algo.kl.estimator k3, or set it to 0"
            )
    return {"beta": [value]}


def _schedule(given: Given, named: Mapping[str, str], notes: list[str]) -> dict[str, list[str]]:
    arguments = {}
    scheduler = given.get("actor.lr_scheduler", [named.get("lr_scheduler_type")])[0]
    has_minimum = scheduler == "cosine_with_min_lr" and not given.keys().isdisjoint(SCHEDULER_FLAGS)
    if "actor.lr_scheduler" in given:
        arguments["lr_scheduler_type"] = [scheduler]
    if "actor.min_lr_ratio" in given and not has_minimum:
        raise FlagError("--actor.min_lr_ratio needs --actor.lr_scheduler cosine_with_min_lr beside it")
    if has_minimum:
        ratio = given.get("actor.min_lr_ratio", ["0.1"])[0]
        if "actor.min_lr_ratio" not in given:
            notes.append("--actor.min_lr_ratio is not given and taken as 0.1, OpenRLHF's default")
        arguments["lr_scheduler_kwargs"] = [json.dumps({"min_lr_rate": real_number("actor.min_lr_ratio", ratio)})]
    elif "actor.lr_scheduler" in given:
        # What the recipe's configuration may hold belongs to its own scheduler.
        arguments["lr_scheduler_kwargs"] = ["{}"]
    if "actor.lr_warmup_ratio" in given:
        (ratio,) = given["actor.lr_warmup_ratio"]
        if not 0 <= real_number("actor.lr_warmup_ratio", ratio) < 1:
            raise FlagError(
                f"--actor.lr_warmup_ratio takes a share of all steps, at least 0 and below 1, but got {ratio}"
            )
        arguments["warmup_steps"] = [ratio]
    return arguments


def _deepspeed(given: Given, named: Mapping[str, str], notes: list[str]) -> dict[str, list[str]]:
    stage = whole_number("ds.zero_stage", given.get("ds.zero_stage", ["0"])[0])
    if stage > 3:
        raise FlagError(f"--ds.zero_stage takes 0, 1, 2 or 3, but got {stage}")
    partition = whole_number("ds.zpg", given.get("ds.zpg", ["1"])[0], least=1)
    if not stage:
        for name in ("ds.adam_offload", "ds.overlap_comm", "ds.grad_accum_dtype"):
            if name in given:
                raise FlagError(f"--{name} needs --ds.zero_stage 1, 2 or 3 beside it")
    if partition > 1 and stage != 3:
        raise FlagError(f"--ds.zpg {partition} needs --ds.zero_stage 3 beside it")
    if not stage:
        return {}
    zero: dict[str, object] = {"stage": stage}
    config: dict[str, object] = {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    if partition > 1:
        zero["zero_hpz_partition_size"] = partition
    if "ds.overlap_comm" in given:
        zero |= {"overlap_comm": True, "contiguous_gradients": True}
    if "ds.adam_offload" in given:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        # The optimizer is the trainer's own.
        config["zero_force_ds_cpu_optimizer"] = False
    if "ds.grad_accum_dtype" in given:
        config["data_types"] = {"grad_accum_dtype": given["ds.grad_accum_dtype"][0]}
    return {"deepspeed": [json.dumps(config)]}


def _precision(given: Given, named: Mapping[str, str], notes: list[str]) -> dict[str, list[str]]:
    if "ds.param_dtype" not in given:
        return {}
    (dtype,) = given["ds.param_dtype"]
    if dtype == "fp16":
        raise FlagError("--ds.param_dtype fp16: nothing here was tried with fp16; take bf16")
    _choose("ds.param_dtype", [dtype], {"bf16": "bfloat16"})
    has_adapter = given.get("ds.lora.rank", ["0"])[0] != "0" or named.get("use_peft", "").lower() == "true"
    has_masters = given.get("ds.zero_stage", ["0"])[0] != "0" or "deepspeed" in named
    if has_adapter or has_masters:
        return {"bf16": ["true"], "dtype": ["bfloat16"]}
    notes.append(
        "--ds.param_dtype bf16: forward and backward in bf16, weights in fp32, since neither an adapter (--ds.lora.rank) nor "
        "DeepSpeed (--ds.zero_stage) keeps fp32 copies of them"
    )
    return {"bf16": ["true"], "dtype": ["float32"]}


def _reports(given: Given, named: Mapping[str, str], notes: list[str]) -> dict[str, list[str]]:
    variables = {
        "logger.wandb.project": ("wandb", "WANDB_PROJECT"),
        "logger.wandb.org": ("wandb", "WANDB_ENTITY"),
        "logger.wandb.group": ("wandb", "WANDB_RUN_GROUP"),
        "logger.tensorboard_dir": ("tensorboard", "TENSORBOARD_LOGGING_DIR"),
    }
    environment, services = [], {}
    for name, (service, variable) in variables.items():
        if name in given:
            environment.append(f"{variable}={given[name][0]}")
            services[service] = None
    return {"environment": environment, "report_to": list(services)} if environment else {}


JOINT_CONVERSIONS: tuple[Callable[[Given, Mapping[str, str], list[str]], dict[str, list[str]]], ...] = (
    _workers,
    _batches,
    _data,
    _clipping,
    _policy_loss,
    _advantages,
    _kl,
    _schedule,
    _deepspeed,
    _precision,
    _reports,
)
"""Conversions of flags that belong together: from flags and arguments that are given, they add notes to the last one."""
