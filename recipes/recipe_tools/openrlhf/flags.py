# SPDX-License-Identifier: Apache-2.0

"""
Translation of OpenRLHF's dotted flags (`openrlhf.cli.train_ppo_ray`, 0.11.2) to arguments of this repository's recipes.

The tables list what is translated, what has no effect, and which values ask for what happens anyway. Every other dotted flag
is refused. A flag that is not given keeps the recipe's default, not OpenRLHF's.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NoReturn
from urllib.parse import urlsplit

from recipe_tools.openrlhf.joint_flags import CONVERSIONS, FlagError


def number(text: str, low: float = -math.inf, high: float = math.inf) -> str:
    """A number in [low, high), as it was written."""
    try:
        if low <= float(text) < high:
            return text
    except ValueError:
        pass
    limits = "" if low == -math.inf else f" of at least {low} and below {high}"
    raise argparse.ArgumentTypeError(f"takes a number{limits}, but got {text!r}")


def share(text: str) -> str:
    return number(text, 0, 1)


def whole(least: int) -> Callable[[str], str]:
    """A reader of whole numbers."""

    def read(text: str) -> str:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"takes a whole number of at least {least}, but got {text!r}")
        return str(int(text))

    return read


def save_interval(text: str) -> str:
    return text if text == "-1" else whole(1)(text)


def module_name(text: str) -> str:
    if text == "all-linear":
        raise argparse.ArgumentTypeError(
            "all-linear would adapt the vision tower and the latents' embeddings, too: leave the flag out to adapt attention "
            "and MLP, or name modules"
        )
    return text


def server_url(text: str) -> str:
    """Base URL of a reward server."""
    url = urlsplit(text if "://" in text else f"http://{text}")
    path = url.path.rstrip("/")
    is_other_reward = text == "agent" or text.endswith(".py") or "," in text or path.endswith("/v1")
    if is_other_reward or url.scheme not in ("http", "https") or not url.netloc:
        raise argparse.ArgumentTypeError(
            f"takes the URL of one reward server, e.g. http://host:8001, but got {text!r}; --judge chooses another judge, e.g. "
            "--judge openai --judge_base_url URL for an OpenAI-compatible endpoint"
        )
    return f"{url.scheme}://{url.netloc}{path.removesuffix('/get_reward').removesuffix('/score')}"


RENAMED: Mapping[str, tuple[str, dict[str, Any]]] = {
    "actor.model_name_or_path": ("model_name_or_path", {}),
    "actor.adam.lr": ("learning_rate", {"type": number}),
    "actor.adam.betas": ("adam_beta1 adam_beta2", {"type": number, "nargs": 2}),
    "actor.adam.eps": ("adam_epsilon", {"type": number}),
    "actor.adam.weight_decay": ("weight_decay", {"type": number}),
    "actor.max_norm": ("max_grad_norm", {"type": number}),
    "actor.lr_warmup_ratio": ("warmup_steps", {"type": share}),
    "actor.dual_clip": ("delta", {"type": number}),
    "actor.entropy_coef": ("entropy_coef", {"type": number}),
    "ckpt.output_dir": ("output_dir", {}),
    "ckpt.max_num": ("save_total_limit", {"type": whole(1)}),
    "data.prompt_dataset": ("train_file", {}),
    "data.dataloader_num_workers": ("dataloader_num_workers", {"type": whole(0)}),
    "ds.attn_implementation": ("attn_implementation", {"choices": ("flex_attention", "sdpa", "eager")}),
    "ds.lora.alpha": ("lora_alpha", {"type": whole(1)}),
    "ds.lora.dropout": ("lora_dropout", {"type": number}),
    "ds.lora.target_modules": ("lora_target_modules", {"type": module_name, "nargs": "+"}),
    "eval.dataset": ("eval_file", {}),
    "eval.n_samples_per_prompt": ("eval_seeds", {"type": whole(0)}),
    "eval.temperature": ("eval_temperature", {"type": number}),
    "logger.logging_steps": ("logging_steps", {"type": whole(1)}),
    "logger.wandb.run_name": ("run_name", {}),
    "rollout.max_new_tokens": ("max_completion_length", {"type": whole(1)}),
    "rollout.temperature": ("temperature", {"type": number}),
    "rollout.top_p": ("top_p", {"type": number}),
    "train.max_epochs": ("num_iterations", {"type": whole(1)}),
    "train.seed": ("seed", {"type": whole(0)}),
}
"""Flags that are arguments of other names, one argument per value. Options are those of `ArgumentParser.add_argument`."""

SWITCHES: Mapping[str, dict[str, str]] = {
    "actor.freeze_visual_encoder": {"freeze_vision_tower": "true"},
    "actor.gradient_checkpointing_enable": {"gradient_checkpointing": "true"},
    "actor.gradient_checkpointing_reentrant": {"gradient_checkpointing_kwargs": '{"use_reentrant": true}'},
    "algo.kl.unbiased_gradient": {"use_bias_correction_kl": "true"},
    "ckpt.load_enable": {"resume_from_checkpoint": "last"},
    "ref.offload": {"offload_ref_model": "true"},
    "train.full_determinism_enable": {"full_determinism": "true"},
}
"""Flags without a value, and the arguments that they set."""

JOINT: Mapping[str, tuple[str, dict[str, Any]]] = {
    "actor.eps_clip": ("epsilon epsilon_high", {"type": number}),
    "actor.eps_clip_low_high": ("epsilon epsilon_high", {"type": number, "nargs": 2}),
    "actor.loss_agg_mode": ("loss_type", {"choices": ("token-mean", "seq-mean-token-mean")}),
    "actor.lr_scheduler": ("lr_scheduler_type lr_scheduler_kwargs", {}),
    "actor.min_lr_ratio": ("lr_scheduler_kwargs", {"type": number}),
    "actor.num_gpus_per_node": ("num_workers use_gpu", {"type": whole(1)}),
    "actor.num_nodes": ("num_workers use_gpu", {"type": whole(1)}),
    "actor.policy_loss_type": ("importance_sampling_level loss_type", {"choices": ("ppo", "gspo")}),
    "algo.advantage.estimator": ("scale_rewards", {"choices": ("group_norm", "dr_grpo")}),
    "algo.advantage.no_std_norm": ("scale_rewards", {"action": "store_true"}),
    "algo.kl.estimator": ("beta", {}),
    "algo.kl.init_coef": ("beta", {"type": number}),
    "algo.kl.use_loss": ("beta", {"action": "store_true"}),
    "ckpt.save_steps": ("save_strategy save_steps", {"type": save_interval}),
    "data.max_samples": ("num_train_prompts", {"type": whole(1)}),
    "ds.adam_offload": ("deepspeed", {"action": "store_true"}),
    "ds.grad_accum_dtype": ("deepspeed", {}),
    "ds.lora.rank": ("use_peft lora_r", {"type": whole(0)}),
    "ds.overlap_comm": ("deepspeed", {"action": "store_true"}),
    "ds.param_dtype": ("bf16 dtype", {"choices": ("bf16",)}),
    "ds.zero_stage": ("deepspeed", {"choices": ("0", "1", "2", "3")}),
    "ds.zpg": ("deepspeed", {"type": whole(1)}),
    "logger.tensorboard_dir": ("environment report_to", {}),
    "logger.wandb.group": ("environment report_to", {}),
    "logger.wandb.org": ("environment report_to", {}),
    "logger.wandb.project": ("environment report_to", {}),
    "reward.remote_url": ("judge judge_base_url", {"type": server_url}),
    "rollout.batch_size": ("steps_per_generation", {"type": whole(1)}),
    "rollout.n_samples_per_prompt": ("num_generations", {"type": whole(2)}),
    "train.batch_size": ("gradient_accumulation_steps", {"type": whole(1)}),
    "train.micro_batch_size": ("per_device_train_batch_size", {"type": whole(1)}),
    "train.num_episodes": ("num_train_epochs max_steps", {"type": whole(1)}),
}
"""Flags whose translation needs a function of `joint_flags.py`, and the arguments that they set."""

WITHOUT_EFFECT = """
    algo.advantage.is_correction_gating algo.advantage.is_correction_level algo.advantage.is_correction_mode
    algo.advantage.is_correction_threshold ckpt.save_hf critic.num_gpus_per_node critic.num_nodes
    data.apply_chat_template ds.enable_sleep ds.packing_samples local_rank ref.num_gpus_per_node ref.num_nodes
    reward.num_gpus_per_node reward.num_nodes reward.offload rollout.micro_batch_size rollout.vllm_generate_batch_size
    train.colocate_actor_ref train.colocate_all train.colocate_critic_reward vllm.enable_prefix_caching
    vllm.enable_sleep vllm.enforce_eager vllm.gpu_memory_utilization vllm.num_engines vllm.sync_backend
    vllm.sync_with_ray vllm.tensor_parallel_size
""".split()

FIXED: Mapping[str, tuple[str, ...]] = {
    "actor.aux_loss_coef": ("0",),
    "actor.optim": ("adam",),
    "algo.advantage.gamma": ("1", "1.0"),
    "algo.advantage.lambd": ("1", "1.0"),
    "ckpt.best_metric_key": ("", "none"),
    "data.input_key": ("prompt",),
    "data.max_images_per_prompt": ("0",),
    "data.prompt_split": ("train",),
    "ds.ring_attn_head_stride": ("1",),
    "ds.ring_attn_size": ("1",),
    "ds.tensor_parallel_size": ("1",),
    "ds.value_head_prefix": ("score",),
    "eval.split": ("train",),
    "eval.steps": ("-1",),
    "train.async_queue_size": ("1",),
}
"""Flags that may only ask for what happens anyway."""

ALTERNATIVES = {
    "ckpt.path": "checkpoints are in --ckpt.output_dir, beside the model",
    "data.label_key": "a row has 'prompt', 'semantic_questions' and 'quality_questions'",
    "logger.wandb.key": "command lines are visible to others, so set WANDB_API_KEY where the workers run",
    "reward.model_name_or_path": "choose a judge of images with --judge and --judge_model",
    "train.agent_func_path": "the recipe itself runs several turns: --recipe self_reflection",
}
"""What to do without a refused flag, where no other flag is near."""


class FlagParser(argparse.ArgumentParser):
    """Parser of OpenRLHF's flags, which leaves all other arguments alone."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS, usage="")
        translated = self.add_argument_group(
            "OpenRLHF's flags and what they become (without one, the recipe's default)"
        )
        for name, (arguments, options) in sorted({**RENAMED, **JOINT}.items()):
            hint = " ".join(f"--{argument}" for argument in arguments.split())
            translated.add_argument(
                f"--{name}",
                help=hint,
                **({} if options.keys() & {"action", "choices"} else {"metavar": "X"}),
                **options,
            )
        for name, settings in SWITCHES.items():
            hint = " ".join(f"--{argument} {value}" for argument, value in settings.items())
            translated.add_argument(f"--{name}", action="store_true", help=hint)
        fixed = self.add_argument_group("OpenRLHF's flags that may only ask for what happens anyway")
        for name, values in FIXED.items():
            fixed.add_argument(f"--{name}", choices=values)
        ignored = self.add_argument_group("OpenRLHF's flags without effect")
        for name in WITHOUT_EFFECT:
            ignored.add_argument(f"--{name}", nargs="*", metavar="X")

    def error(self, message: str) -> NoReturn:
        raise FlagError(message)


def translate_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """
    Translate a command line that may mix OpenRLHF's flags with arguments of recipes.

    Returns:
        `tuple[list[str], list[str]]`: Arguments of recipes, and notes about flags without effect and values that were filled in.

    Raises:
        [`FlagError`]: If a flag is not translated, if a value cannot be read, if batch sizes do not divide each other, or if
            a flag and an argument set the same thing.
    """
    namespace, native = FlagParser().parse_known_args(arguments)
    given, named = vars(namespace), read_arguments(native)
    for part in native:
        name = part.removeprefix("--").partition("=")[0]
        if part.startswith("--") and re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)+", name):
            raise FlagError(f"this recipe does not translate OpenRLHF's flag --{name}: {find_alternative(name)}")
    notes = [
        f"--{name} has no effect: the workers that train also roll out, without vLLM and without a critic, and always use the "
        "model's own chat format and checkpoint layout"
        for name in given
        if name in WITHOUT_EFFECT
    ]
    translated: dict[str, list[str]] = {}
    for name, value in given.items():
        targets = target_arguments(name)
        if name in SWITCHES:
            translated |= {argument: [text] for argument, text in SWITCHES[name].items()}
        elif name in RENAMED and len(targets) > 1:
            translated |= {argument: [text] for argument, text in zip(targets, value, strict=True)}
        elif name in RENAMED:
            translated |= {targets[0]: value if isinstance(value, list) else [value]}
    for convert in CONVERSIONS:
        translated |= convert(given, named, notes)
    for name in given:
        for argument in target_arguments(name):
            if argument in named and argument in translated:
                raise FlagError(f"--{name} and --{argument} set the same thing: give one of them")
    return [*native, *(part for name, values in translated.items() for part in (f"--{name}", *values))], notes


def target_arguments(name: str) -> list[str]:
    """Arguments of recipes that a flag sets."""
    if name in SWITCHES:
        return list(SWITCHES[name])
    arguments, _ = RENAMED.get(name) or JOINT.get(name, ("", {}))
    return arguments.split()


def read_arguments(native: Sequence[str]) -> dict[str, str]:
    """First value of each argument of a recipe, by its name."""
    named = {}
    for part, following in pairwise([*native, ""]):
        if part.startswith("--"):
            name, equals, value = part.removeprefix("--").partition("=")
            # Transformers' parser accepts both spellings.
            named[name.replace("-", "_")] = value if equals else following
    return named


def find_alternative(name: str) -> str:
    """What to do instead of using a flag that is not translated."""
    if name in ALTERNATIVES:
        return ALTERNATIVES[name]
    known = [*RENAMED, *SWITCHES, *JOINT]
    # The right name in the wrong place is nearer than a name of similar spelling.
    moved = [flag for flag in known if flag.rpartition(".")[2] == name.rpartition(".")[2]]
    close = difflib.get_close_matches(name, moved, n=1) or moved or difflib.get_close_matches(name, known, n=1)
    return f"did you mean --{close[0]}?" if close else "--help lists the flags that it translates"
