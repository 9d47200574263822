# SPDX-License-Identifier: Apache-2.0

"""
What becomes of every flag of OpenRLHF's `train_ppo_ray` (0.11.2) in a recipe of this repository: translated, ignored with a
note, or refused with an explanation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from urllib.parse import urlsplit


class FlagError(ValueError):
    """A flag that cannot be translated. The message says why and what to do."""


class Treatment(Enum):
    """What becomes of a flag."""

    TRANSLATED = "translated"
    IGNORED = "ignored"
    REFUSED = "refused"


@dataclass(frozen=True)
class Flag:
    """
    A flag of OpenRLHF.

    Args:
        name (`str`):
            Without the dashes, e.g. `"actor.adam.lr"`.
        treatment ([`Treatment`]):
            What becomes of it.
        num_values (`int` or `str`):
            How many values follow: a number, `"*"` or `"+"`, as in `argparse`.
        arguments (`tuple[str, ...]`):
            Arguments of recipes that it sets. Empty unless it is translated.
        why (`str`):
            Why it is ignored or refused; of a translated one, how.
        convert (`Callable`, *optional*):
            From its values to arguments with theirs. `None` if other flags have a say; see `flags.py`.
        accepts (`Callable`, *optional*):
            Whether values of a refused flag ask for what happens anyway, so that there is nothing to refuse.
    """

    name: str
    treatment: Treatment
    num_values: int | str
    arguments: tuple[str, ...] = ()
    why: str = ""
    convert: Callable[[Sequence[str]], Mapping[str, Sequence[str]]] | None = None
    accepts: Callable[[Sequence[str]], bool] | None = None


def whole_number(name: str, value: str, least: int = 0) -> int:
    """
    Read a value of a flag.

    Raises:
        [`FlagError`]: If it is no whole number, or smaller than `least`.
    """
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least:
        raise FlagError(f"--{name} takes a whole number of at least {least}, but got {value!r}")
    return number


def real_number(name: str, value: str) -> float:
    """
    Read a value of a flag.

    Raises:
        [`FlagError`]: If it is no number.
    """
    try:
        return float(value)
    except ValueError as error:
        raise FlagError(f"--{name} takes a number, but got {value!r}") from error


def _same_number(accepted: float) -> Callable[[Sequence[str]], bool]:
    def accepts(values: Sequence[str]) -> bool:
        try:
            return float(values[0]) == accepted
        except ValueError:
            return False

    return accepts


def _same_text(*accepted: str) -> Callable[[Sequence[str]], bool]:
    return lambda values: values[0] in accepted


def _contains_unit_interval(values: Sequence[str]) -> bool:
    low, high = (real_number("reward.clip_range", value) for value in values)
    return low <= 0 and high >= 1


def _text(name: str, argument: str, why: str = "") -> Flag:
    return Flag(name, Treatment.TRANSLATED, 1, (argument,), why, lambda values: {argument: values})


def _number(name: str, argument: str, why: str = "") -> Flag:
    def convert(values: Sequence[str]) -> dict[str, Sequence[str]]:
        real_number(name, values[0])
        return {argument: values}

    return Flag(name, Treatment.TRANSLATED, 1, (argument,), why, convert)


def _count(name: str, argument: str, least: int, why: str = "") -> Flag:
    def convert(values: Sequence[str]) -> dict[str, Sequence[str]]:
        return {argument: [str(whole_number(name, values[0], least))]}

    return Flag(name, Treatment.TRANSLATED, 1, (argument,), why, convert)


def _switch(name: str, why: str = "", **arguments: str) -> Flag:
    converted = {argument: [value] for argument, value in arguments.items()}
    return Flag(name, Treatment.TRANSLATED, 0, tuple(arguments), why, lambda values: converted)


def _jointly(name: str, num_values: int | str, *arguments: str, why: str = "") -> Flag:
    return Flag(name, Treatment.TRANSLATED, num_values, arguments, why)


def _ignored(name: str, num_values: int | str, why: str) -> Flag:
    return Flag(name, Treatment.IGNORED, num_values, (), why)


def _refused(name: str, num_values: int | str, why: str, accepts: Callable | None = None) -> Flag:
    return Flag(name, Treatment.REFUSED, num_values, (), why, None, accepts)


def _betas(values: Sequence[str]) -> dict[str, list[str]]:
    for value in values:
        real_number("actor.adam.betas", value)
    return {"adam_beta1": [values[0]], "adam_beta2": [values[1]]}


def _episodes(values: Sequence[str]) -> dict[str, list[str]]:
    # A limit of steps in the recipe's configuration would win over epochs.
    return {
        "num_train_epochs": [str(whole_number("train.num_episodes", values[0], least=1))],
        "max_steps": ["-1"],
    }


def _save_steps(values: Sequence[str]) -> dict[str, list[str]]:
    if values[0] == "-1":
        return {"save_strategy": ["no"]}
    steps = whole_number("ckpt.save_steps", values[0], least=1)
    return {"save_strategy": ["steps"], "save_steps": [str(steps)]}


def _lora_rank(values: Sequence[str]) -> dict[str, list[str]]:
    rank = whole_number("ds.lora.rank", values[0])
    return {"use_peft": ["true"], "lora_r": [str(rank)]} if rank else {"use_peft": ["false"]}


def _lora_targets(values: Sequence[str]) -> dict[str, Sequence[str]]:
    if not values or "all-linear" in values:
        raise FlagError(
            "--ds.lora.target_modules all-linear would adapt the vision tower and the embeddings of latents, too: leave "
            "it out for attention and MLP of both experts, or name modules"
        )
    return {"lora_target_modules": values}


def _attention(values: Sequence[str]) -> dict[str, Sequence[str]]:
    if "flash" in values[0]:
        raise FlagError(
            f"--ds.attn_implementation {values[0]}: flash attention knows causal and full masks alone, and an image in the "
            "middle of text needs another: take flex_attention (GPUs), sdpa or eager"
        )
    return {"attn_implementation": values}


def _remote_url(values: Sequence[str]) -> dict[str, list[str]]:
    value = values[0]
    if "," in value:
        raise FlagError(
            f"--reward.remote_url {value}: OpenRLHF sums the rewards of several servers; here one judge answers, so name one"
        )
    if value == "agent" or value.endswith(".py"):
        raise FlagError(
            f"--reward.remote_url {value}: OpenRLHF's reward file gets text alone, and the reward here is that of an image. "
            "Give a reward server (python -m reward_models.server), or choose a judge with --judge; a judge of your own is "
            "one file and one decorator"
        )
    url = urlsplit(value if "://" in value else f"http://{value}")
    path = url.path.rstrip("/")
    if path.endswith("/v1"):
        raise FlagError(
            f"--reward.remote_url {value} looks like an OpenAI-compatible endpoint, not like a reward server: "
            f"--judge openai --judge_base_url {value} --judge_model NAME asks it"
        )
    if url.scheme not in ("http", "https") or not url.netloc:
        raise FlagError(
            f"--reward.remote_url takes the URL of a reward server, e.g. http://host:8001, but got {value!r}"
        )
    for route in ("/get_reward", "/score"):
        path = path.removesuffix(route)
    return {"judge": ["server"], "judge_base_url": [f"{url.scheme}://{url.netloc}{path}"]}


_NO_CRITIC = "GRPO has no critic: the baseline of an advantage is the mean of its group"
_NO_VLLM = (
    "the workers that train also roll out, text and image by the same weights; vLLM generates text alone. Serve the judge with "
    "it instead"
)
_NO_PLACEMENT = "every worker holds the whole policy (or its shard) and takes turns between rollout and update"
_NO_MISMATCH = "it corrects for a rollout engine that disagrees with the trainer; here both are the same model"
_NO_ASYNC = "rollouts and updates take turns, so that no rollout is older than the update before it"
_NO_REWARD_MODEL = (
    "a scalar reward model scores text, and the reward here is that of an image: choose a judge with --judge, e.g. "
    "--judge transformers --judge_model NAME"
)
_NO_MUON = "the optimizer is AdamW: --actor.adam.lr and its like, or any other of Transformers by --optim"
_NO_TOKEN_BATCHES = "batches are counted in samples, since images take most of the memory: --train.micro_batch_size"
_NO_RING = "sequences are not split over workers"
_NO_SHAPING = (
    "the reward is the judge's alone; --mask_truncated_completions leaves thoughts that were cut off out of the loss"
)
_COLUMNS = "a row has 'prompt', 'semantic_questions' and 'quality_questions'; see reward_models/prompts/questions.py"
_JUDGE_RESOURCES = "the judge is a server with resources of its own, or part of every worker"


FLAGS: Mapping[str, Flag] = {
    flag.name: flag
    for flag in (
        # Workers.
        _jointly("actor.num_nodes", 1, "num_workers", "use_gpu", why="times actor.num_gpus_per_node (8 if not given)"),
        _jointly("actor.num_gpus_per_node", 1, "num_workers", "use_gpu", why="times actor.num_nodes (1 if not given)"),
        _ignored("ref.num_nodes", 1, _NO_PLACEMENT),
        _ignored("ref.num_gpus_per_node", 1, _NO_PLACEMENT),
        _ignored("reward.num_nodes", 1, _JUDGE_RESOURCES),
        _ignored("reward.num_gpus_per_node", 1, _JUDGE_RESOURCES),
        _ignored("critic.num_nodes", 1, _NO_CRITIC),
        _ignored("critic.num_gpus_per_node", 1, _NO_CRITIC),
        _ignored("train.colocate_actor_ref", 0, _NO_PLACEMENT),
        _ignored("train.colocate_critic_reward", 0, _NO_CRITIC),
        _ignored("train.colocate_all", 0, _NO_PLACEMENT),
        _ignored("local_rank", 1, "Ray Train sets it"),
        # vLLM.
        _ignored("vllm.num_engines", 1, _NO_VLLM),
        _ignored("vllm.tensor_parallel_size", 1, _NO_VLLM),
        _ignored("vllm.sync_backend", 1, _NO_VLLM),
        _ignored("vllm.sync_with_ray", 0, _NO_VLLM),
        _ignored("vllm.enable_prefix_caching", 0, "the prompt's cache is always shared by its group"),
        _ignored("vllm.enforce_eager", 0, _NO_VLLM),
        _ignored("vllm.enable_sleep", 0, _NO_VLLM),
        _ignored("vllm.gpu_memory_utilization", 1, _NO_VLLM),
        _ignored("rollout.vllm_generate_batch_size", 1, _NO_VLLM),
        _ignored("ds.enable_sleep", 0, _NO_VLLM),
        _ignored("algo.advantage.is_correction_level", 1, _NO_MISMATCH),
        _ignored("algo.advantage.is_correction_mode", 1, _NO_MISMATCH),
        _ignored("algo.advantage.is_correction_gating", 1, _NO_MISMATCH),
        _ignored("algo.advantage.is_correction_threshold", "+", _NO_MISMATCH),
        _refused("train.async_enable", 0, _NO_ASYNC),
        _refused("train.async_queue_size", 1, _NO_ASYNC, _same_number(1)),
        _refused("train.partial_rollout_enable", 0, _NO_ASYNC),
        # Checkpoints and logs.
        _text("ckpt.output_dir", "output_dir", "also where checkpoints and what Ray writes go"),
        Flag("ckpt.save_steps", Treatment.TRANSLATED, 1, ("save_strategy", "save_steps"), "-1 is never", _save_steps),
        _count("ckpt.max_num", "save_total_limit", 1),
        _switch(
            "ckpt.load_enable", "goes on from the last checkpoint of ckpt.output_dir", resume_from_checkpoint="last"
        ),
        _refused("ckpt.path", 1, "checkpoints stand in --ckpt.output_dir, beside the model: leave it out"),
        _ignored("ckpt.save_hf", 0, "checkpoints are always in the layout that from_pretrained reads"),
        _refused("ckpt.disable_ds", 0, "a run that is restarted needs the state of its optimizer"),
        _refused(
            "ckpt.max_mem", 1, "the number of checkpoints is limited by --ckpt.max_num", _same_number(float("inf"))
        ),
        _refused(
            "ckpt.best_metric_key", 1, "there is no evaluation during training to choose by", _same_text("", "none")
        ),
        _refused("ds.use_universal_ckpt", 0, "a run goes on with as many workers as it began with"),
        _count("logger.logging_steps", "logging_steps", 1),
        _refused(
            "logger.wandb.key",
            1,
            "keys come from the environment alone, since command lines are seen by others: set WANDB_API_KEY where the workers "
            "run, and --report_to wandb",
        ),
        _jointly("logger.wandb.org", 1, "environment", "report_to", why="WANDB_ENTITY"),
        _jointly("logger.wandb.group", 1, "environment", "report_to", why="WANDB_RUN_GROUP"),
        _jointly("logger.wandb.project", 1, "environment", "report_to", why="WANDB_PROJECT"),
        _text("logger.wandb.run_name", "run_name"),
        _jointly("logger.tensorboard_dir", 1, "environment", "report_to", why="TENSORBOARD_LOGGING_DIR"),
        # Evaluation.
        _refused(
            "eval.steps",
            1,
            "recipes evaluate before and after training, not in between (--eval_seeds 0 not at all)",
            _same_number(-1),
        ),
        _text("eval.dataset", "eval_file"),
        _refused("eval.split", 1, "an evaluation takes all rows of --eval.dataset", _same_text("train")),
        _number("eval.temperature", "eval_temperature"),
        _count("eval.n_samples_per_prompt", "eval_seeds", 0, "noise seeds that each prompt is painted with"),
        # DeepSpeed, precision, memory.
        _jointly("ds.zero_stage", 1, "deepspeed", why="0 is DDP, which is also what you get without the flag"),
        _jointly("ds.adam_offload", 0, "deepspeed"),
        _jointly("ds.zpg", 1, "deepspeed", why="stage 3 alone"),
        _jointly("ds.overlap_comm", 0, "deepspeed"),
        _jointly("ds.grad_accum_dtype", 1, "deepspeed"),
        _jointly(
            "ds.param_dtype",
            1,
            "bf16",
            "dtype",
            why="bf16; weights stay fp32 where neither DeepSpeed nor an adapter keeps fp32 masters",
        ),
        _switch("actor.gradient_checkpointing_enable", gradient_checkpointing="true"),
        _switch(
            "actor.gradient_checkpointing_reentrant",
            gradient_checkpointing_kwargs='{"use_reentrant": true}',
        ),
        Flag("ds.attn_implementation", Treatment.TRANSLATED, 1, ("attn_implementation",), "not flash", _attention),
        _refused("ds.deepcompile", 0, "nothing here was tried with compiled graphs"),
        _refused("ds.experts_implementation", 1, "the two experts are chosen by the kind of token, not by a router"),
        _refused(
            "ds.use_liger_kernel", 0, "the packed forward scores text and image at once, which Liger's loss does not"
        ),
        _refused(
            "ds.tensor_parallel_size", 1, "weights are sharded by ZeRO-3 or FSDP, not by tensor", _same_number(1)
        ),
        _ignored("ds.packing_samples", 0, "the forward of a micro-batch is laid out by the model and needs no switch"),
        _refused("ds.load_in_4bit", 0, "weights are not quantized here"),
        _refused("ds.ring_attn_size", 1, _NO_RING, _same_number(1)),
        _refused("ds.ring_attn_head_stride", 1, _NO_RING, _same_number(1)),
        _refused("ds.value_head_prefix", 1, _NO_CRITIC, _same_text("score")),
        _refused("train.dynamic_batch_enable", 0, _NO_TOKEN_BATCHES),
        _refused("rollout.max_tokens_per_gpu", 1, _NO_TOKEN_BATCHES),
        _refused("train.max_tokens_per_gpu", 1, _NO_TOKEN_BATCHES),
        _refused("train.enable_ema", 0, "no average of the weights is kept"),
        _refused("train.ema_beta", 1, "no average of the weights is kept"),
        Flag("ds.lora.rank", Treatment.TRANSLATED, 1, ("use_peft", "lora_r"), "0 trains all weights", _lora_rank),
        _count("ds.lora.alpha", "lora_alpha", 1),
        _number("ds.lora.dropout", "lora_dropout"),
        Flag(
            "ds.lora.target_modules",
            Treatment.TRANSLATED,
            "*",
            ("lora_target_modules",),
            "not all-linear",
            _lora_targets,
        ),
        # Models.
        _text("actor.model_name_or_path", "model_name_or_path"),
        _switch("actor.freeze_visual_encoder", "it is frozen by default", freeze_vision_tower="true"),
        _refused("actor.aux_loss_coef", 1, "there is no router whose load to balance", _same_number(0)),
        _refused("reward.model_name_or_path", 1, _NO_REWARD_MODEL),
        _refused("critic.model_name_or_path", 1, _NO_CRITIC),
        _switch("ref.offload", "with an adapter the reference takes no memory", offload_ref_model="true"),
        _ignored("reward.offload", 0, _JUDGE_RESOURCES),
        _refused("use_ms", 0, "models come from a folder or from the Hugging Face Hub: fetch them first"),
        _refused(
            "train.agent_func_path",
            1,
            "the recipe itself is the loop of several turns: --recipe self_reflection",
        ),
        # Rewards.
        Flag(
            "reward.remote_url",
            Treatment.TRANSLATED,
            1,
            ("judge", "judge_base_url"),
            "a reward server of ours; a reward file is refused, since it sees no images",
            _remote_url,
        ),
        _refused("reward.normalize_enable", 0, "advantages are normalized instead: --algo.advantage.estimator"),
        _refused("reward.clip_range", 2, "rewards lie in [0, 1] as it is", _contains_unit_interval),
        _refused("reward.overlong_buffer_len", 1, _NO_SHAPING),
        _refused("reward.overlong_penalty_factor", 1, _NO_SHAPING),
        _refused("reward.stop_properly_penalty_coef", 1, _NO_SHAPING),
        # Rollouts and batches.
        _jointly(
            "rollout.batch_size",
            1,
            "steps_per_generation",
            why="prompts a rollout; samples = prompts x n_samples_per_prompt = micro_batch_size x workers x steps_per_generation",
        ),
        _jointly("rollout.n_samples_per_prompt", 1, "num_generations", why="size of a group, at least 2"),
        _jointly(
            "train.batch_size",
            1,
            "gradient_accumulation_steps",
            why="samples an update = micro_batch_size x workers x gradient_accumulation_steps",
        ),
        _jointly("train.micro_batch_size", 1, "per_device_train_batch_size", why="samples a worker trains on at once"),
        _ignored(
            "rollout.micro_batch_size",
            1,
            "samples are scored --train.micro_batch_size at once; --rollout_batch_size limits how many are painted at once",
        ),
        _count("rollout.max_new_tokens", "max_completion_length", 1, "longest thought"),
        _number("rollout.temperature", "temperature", "of thoughts"),
        _number("rollout.top_p", "top_p", "of thoughts"),
        Flag("train.num_episodes", Treatment.TRANSLATED, 1, ("num_train_epochs", "max_steps"), "", _episodes),
        _count("train.max_epochs", "num_iterations", 1, "updates on the same rollout"),
        _count("train.seed", "seed", 0),
        _switch("train.full_determinism_enable", full_determinism="true"),
        # Data.
        _text("data.prompt_dataset", "train_file", "prompts with questions: JSON lines"),
        _refused("data.prompt_probs", 1, "a run has one file of prompts: mix them beforehand"),
        _refused("data.prompt_split", 1, "training takes all rows of --data.prompt_dataset", _same_text("train")),
        _refused("data.input_key", 1, _COLUMNS, _same_text("prompt")),
        _refused("data.label_key", 1, _COLUMNS),
        _refused("data.input_template", 1, "the request is part of the task; see alphagrpo_ext/rollout"),
        _ignored("data.apply_chat_template", 0, "the model's own format is always applied"),
        _refused("data.image_key", 1, "the image of a row, where its task needs one, is in the column 'image'"),
        _refused(
            "data.max_images_per_prompt",
            1,
            "how many images a trajectory holds follows from its task: --num_reflection_rounds",
            _same_number(0),
        ),
        _refused("data.max_len", 1, "prompts are never cut; --rollout.max_new_tokens limits the thought"),
        _jointly("data.max_samples", 1, "num_train_prompts", why="of the shapes world alone"),
        _refused("data.disable_fast_tokenizer", 0, "BAGEL has the fast tokenizer alone"),
        _count("data.dataloader_num_workers", "dataloader_num_workers", 0),
        # Loss.
        _jointly("actor.eps_clip", 1, "epsilon", "epsilon_high", why="of text; images have image_epsilon"),
        _jointly("actor.eps_clip_low_high", 2, "epsilon", "epsilon_high", why="of text; wins over actor.eps_clip"),
        _number("actor.dual_clip", "delta"),
        _jointly(
            "actor.policy_loss_type",
            1,
            "importance_sampling_level",
            "loss_type",
            why="ppo: ratio per token; gspo: per sequence",
        ),
        _jointly(
            "actor.loss_agg_mode", 1, "loss_type", why="token-mean: dapo; seq-mean-token-mean, and gspo always: grpo"
        ),
        _number("actor.entropy_coef", "entropy_coef"),
        _jointly(
            "algo.advantage.estimator",
            1,
            "scale_rewards",
            why="group_norm or dr_grpo",
        ),
        _jointly("algo.advantage.no_std_norm", 0, "scale_rewards"),
        _refused("algo.advantage.lambd", 1, _NO_CRITIC, _same_number(1)),
        _refused("algo.advantage.gamma", 1, "the reward comes at the end and is not discounted", _same_number(1)),
        _jointly("algo.kl.init_coef", 1, "beta", why="of text, in the loss; images have image_beta"),
        _jointly("algo.kl.use_loss", 0, why="has to stand beside algo.kl.init_coef above 0"),
        _jointly("algo.kl.estimator", 1, why="k3"),
        _switch("algo.kl.unbiased_gradient", use_bias_correction_kl="true"),
        _refused("algo.kl.target", 1, "the coefficient of the KL is fixed"),
        _refused("algo.kl.horizon", 1, "the coefficient of the KL is fixed"),
        _refused(
            "algo.dynamic_filtering_enable",
            0,
            "a group of equal rewards has no gradient as it is, and none is redrawn",
        ),
        _refused("algo.dynamic_filtering_range", 2, "no group is redrawn"),
        # Optimizers.
        _refused("actor.optim", 1, _NO_MUON, _same_text("adam")),
        _number("actor.adam.lr", "learning_rate"),
        Flag("actor.adam.betas", Treatment.TRANSLATED, 2, ("adam_beta1", "adam_beta2"), "", _betas),
        _number("actor.adam.eps", "adam_epsilon"),
        _number("actor.adam.weight_decay", "weight_decay"),
        _jointly("actor.lr_scheduler", 1, "lr_scheduler_type", "lr_scheduler_kwargs"),
        _jointly("actor.min_lr_ratio", 1, "lr_scheduler_kwargs", why="of cosine_with_min_lr"),
        _jointly("actor.lr_warmup_ratio", 1, "warmup_steps", why="a share of all steps"),
        _number("actor.max_norm", "max_grad_norm"),
        *(
            _refused(f"actor.muon.{name}", num_values, _NO_MUON)
            for name, num_values in (("lr", 1), ("momentum", 1), ("ns_steps", 1), ("nesterov", 0), ("no_nesterov", 0))
        ),
        *(
            _refused(f"critic.{name}", num_values, _NO_CRITIC)
            for name, num_values in (
                ("optim", 1),
                ("muon.lr", 1),
                ("muon.momentum", 1),
                ("muon.ns_steps", 1),
                ("muon.nesterov", 0),
                ("muon.no_nesterov", 0),
                ("adam.lr", 1),
                ("adam.betas", 2),
                ("adam.eps", 1),
                ("adam.weight_decay", 1),
                ("lr_scheduler", 1),
                ("lr_warmup_ratio", 1),
                ("min_lr_ratio", 1),
                ("max_norm", 1),
                ("value_clip", 1),
                ("freezing_steps", 1),
                ("save_value_network", 0),
            )
        ),
    )
}
"""All flags by name."""
