# SPDX-License-Identifier: Apache-2.0

"""
The seams to TRL, Transformers, Accelerate and PyTorch: every private name and every overridden method of theirs that is used.

`tests/trainer/test_upstream.py` checks the table against the installed versions, and that the source uses no other private name.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import trl
from packaging.version import Version
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import align_special_tokens

from alphagrpo_ext.trainer.config import AlphaGRPOConfig


TESTED_TRL = (Version("1.16.0"), Version("1.17.0"))
"""The first version that is tested, and the first one after those that are."""


@dataclass(frozen=True)
class Seam:
    """
    A name of another package that the code relies on.

    Args:
        owner (`str`): Dotted path of the class or module that has the name.
        name (`str`): The name.
        parameters (`str`, *optional*):
            Names of a method's parameters without `self`, as `"a, b"`. After `"a, ..."` others may follow. `None` for an
            attribute.
    """

    owner: str
    name: str
    parameters: str | None = None

    def fits(self, owner: type | Any) -> bool:
        """Whether `owner` has the name, with these parameters."""
        if self.parameters is None:
            return hasattr(owner, self.name) or (isinstance(owner, type) and self.name in _names_in_methods(owner))
        found, expected = self.found(owner), self.parameters
        return found == expected or (expected.endswith(", ...") and f"{found}, ".startswith(expected[:-3]))

    def found(self, owner: type | Any) -> str | None:
        """Parameters of the method that `owner` has, as in `parameters`. `None` if there is none."""
        method = inspect.getattr_static(owner, self.name, None)
        method = getattr(method, "__func__", method)
        if not callable(method):
            return None
        names = list(inspect.signature(method).parameters)
        return ", ".join(names[1:] if isinstance(owner, type) else names)


def _names_in_methods(owner: type) -> set[str]:
    """Names of all attributes that the methods of a class read or write."""
    functions = [
        inspect.unwrap(value) for base in inspect.getmro(owner) for value in vars(base).values() if callable(value)
    ]
    return {name for function in functions if inspect.isfunction(function) for name in function.__code__.co_names}


def _seams(owner: str, attributes: Sequence[str] = (), **methods: str) -> list[Seam]:
    return [Seam(owner, name) for name in attributes] + [Seam(owner, name, text) for name, text in methods.items()]


SEAMS: tuple[Seam, ...] = (
    *_seams(
        "trl.GRPOTrainer",
        attributes=(
            "_buffered_inputs",
            "_logs",
            "_metrics",
            "_name",
            "_paper",
            "_step",
            "_tokenizer",
        )
        + ("_tag_names",),
        create_model_card="model_name, dataset_name, tags",
        log="logs, start_time",
        training_step="model, inputs, num_items_in_batch",
        _generate_and_score_completions="inputs",
        _calculate_rewards="inputs, prompts, completions, completion_ids_list",
        _get_per_token_logps_and_entropies="model, input_ids, attention_mask, logits_to_keep, batch_size, "
        "compute_entropy, ...",
        _compute_loss="model, inputs",
        _get_train_sampler="dataset",
        _save_checkpoint="model, trial",
    ),
    *_seams(
        "trl.trainer.grpo_trainer",
        print_prompt_completions_sample="prompts, completions, rewards, advantages, step, num_samples, extra",
    ),
    *_seams(
        "transformers.Trainer",
        attributes=("_globalstep_last_logged", "_initial_global_step", "_total_loss_scalar", "_tr_loss"),
        create_optimizer="model",
        train="resume_from_checkpoint, ...",
        evaluate="eval_dataset, ...",
        _evaluate="trial, ignore_keys_for_eval, skip_scheduler",
        _finalize_training="trial, num_train_samples, start_time",
        _get_output_dir="trial",
        _get_grad_norm="model, grad_norm",
        _init_training_state="max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial",
        _push_from_checkpoint="checkpoint_folder",
        _run_epoch="model, epoch, ...",
        _save="output_dir, state_dict",
    ),
    *_seams("torch.optim.lr_scheduler.LRScheduler", attributes=("_last_lr",)),
    *_seams("accelerate.state.GradientState", _set_sync_gradients="sync_gradients"),
    *_seams("torch.distributed.fsdp.FSDPModule", _get_fsdp_state=""),
    *_seams(
        "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState", attributes=("_fsdp_param_group",), _lazy_init=""
    ),
    *_seams(
        "torch.ops.aten",
        attributes=(
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention_for_cpu_backward",
        ),
    ),
    *_seams(
        "transformers.PreTrainedConfig",
        attributes=("_attn_implementation", "_name_or_path"),
        get_text_config="decoder, encoder",
    ),
    *_seams(
        "transformers.PreTrainedModel",
        attributes=(
            "_keep_in_fp32_modules_strict",
            "_no_split_modules",
            "_supports_flex_attn",
            "_supports_sdpa",
        ),
        _init_weights="module",
        from_pretrained="pretrained_model_name_or_path, ...",
        get_input_embeddings="",
        get_output_embeddings="",
        set_attn_implementation="attn_implementation, ...",
        set_input_embeddings="value",
        set_output_embeddings="new_embeddings",
    ),
)


def misfits(seams: Sequence[Seam] = SEAMS) -> Iterator[str]:
    """Compare seams with what is installed. Yields a sentence about each that does not fit, with both signatures."""
    for seam in seams:
        try:
            owner = _load(seam.owner)
        except (AttributeError, ImportError) as error:
            yield f"{seam.owner} cannot be found ({error})"
            continue
        if seam.fits(owner):
            continue
        if seam.parameters is None:
            yield f"{seam.owner} has no {seam.name}"
        else:
            found = seam.found(owner)
            installed = "there is no such method" if found is None else f"{seam.name}({found}) is installed"
            yield f"{seam.owner}.{seam.name}({seam.parameters}) is needed, but {installed}"


def _load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def check_installed(version: str = trl.__version__, seams: Sequence[Seam] = SEAMS) -> None:
    """
    Check that the installed packages fit the overridden methods. Warns once if TRL is newer than the tested versions.

    Raises:
        `ImportError`: If TRL is older than the tested versions, or if a seam does not fit. The message names the seam and both
            signatures.
    """
    low, high = TESTED_TRL
    if Version(version) < low:
        raise ImportError(
            f"alphagrpo_ext.trainer needs trl>={low}, but trl {version} is installed: pip install 'trl>={low},<{high}'"
        )
    if faults := list(misfits(seams)):
        raise ImportError(
            f"alphagrpo_ext.trainer is tested with trl>={low},<{high} and does not fit trl {version} and the packages that "
            f"are installed with it: {'; '.join(faults)}. Install a tested version: pip install 'trl>={low},<{high}'"
        )
    if Version(version) >= high:
        warnings.warn(
            f"alphagrpo_ext.trainer is tested with trl>={low},<{high}, but trl {version} is installed. The methods that it "
            f"overrides have the expected signatures, so it goes on.",
            stacklevel=2,
        )


@contextmanager
def expected_warnings() -> Iterator[None]:
    """
    Make TRL's trainer without warnings that no user can do anything about: within the block, that `rollout_func` is experimental
    ([`SEAMS`] are checked); from then on, that TRL and PEFT call methods of models by names that Transformers will change.
    """
    renamed = r"`(is_)?gradient_checkpointing(_\w+)?` is deprecated"
    warnings.filterwarnings("ignore", renamed, FutureWarning, r"transformers\.modeling_utils")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are using 'rollout_func'", UserWarning)
        yield


def align_tokens(model: Any, processor: Any) -> None:
    """
    Write the token ids of the processor into the configurations of a model, as Transformers does when training begins. It warns
    where a configuration left them open, as those of a model family's text part do.
    """
    logger = logging.getLogger(align_special_tokens.__module__)
    was_disabled, logger.disabled = logger.disabled, True
    try:
        align_special_tokens(model, processor)
    finally:
        logger.disabled = was_disabled


def check_argument_types(args: Any, processing_class: Any) -> None:
    """
    Check what a user of TRL may take from another trainer.

    Raises:
        `TypeError`: If the configuration is another one, or a tokenizer stands for the processor.
    """
    if args is not None and not isinstance(args, AlphaGRPOConfig):
        raise TypeError(
            f"args must be an AlphaGRPOConfig, but is a {type(args).__name__}: import it from alphagrpo_ext.trainer; it takes "
            f"the arguments of GRPOConfig, too"
        )
    if isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"processing_class is a tokenizer ({type(processing_class).__name__}): pass the processor of the model, which "
            f"prepares images as well (AutoProcessor, or load_model), or leave it out"
        )


def refuse_arguments(quantization_config: Any, tools: Any, rollout_func: Any, environment_factory: Any) -> None:
    """
    Refuse arguments of TRL's constructor that have no meaning here.

    Raises:
        `ValueError`: If one of them is set. The message names it.
    """
    for name, value, advice in (
        ("quantization_config", quantization_config, "load a quantized model yourself and pass it as `model`"),
        ("tools", tools, "a policy that paints calls no tools"),
        (
            "rollout_func",
            rollout_func,
            "it samples text and images with its own rollout generator; write a task instead",
        ),
        ("environment_factory", environment_factory, "write a task instead"),
    ):
        if value is not None:
            raise ValueError(f"AlphaGRPOTrainer does not take TRL's argument {name}: {advice}")
