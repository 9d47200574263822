# SPDX-License-Identifier: Apache-2.0

"""PEFT adapters in folders of their own, without the model that they adapt."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

from alphagrpo_ext.files import write_text
from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.models.finite import check_finite_weights
from alphagrpo_ext.models.model_card import CardContent, base_license, write_model_card
from alphagrpo_ext.models.preflight import check_field_ranges, check_finite_numbers, read_json
from alphagrpo_ext.models.saving import staged_folder
from alphagrpo_ext.models.weight_files import check_weight_file, read_shapes, shape_differences, summarize


logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PACKAGED_CHECKPOINTS = {"bagel-shapes": Path(__file__).parents[1] / "shapes" / "checkpoint"}
"""Folders of the checkpoints that come with the package, by the names that load them on every machine."""
_PACKAGED_LICENSE = "apache-2.0"
# With an alpha of 0 an adapter would have no effect.
_RANK_RANGE, _ALPHA_RANGE, _DROPOUT_RANGE = "[1, inf)", "(0, inf)", "[0, 1)"


def is_adapter(folder: str | Path) -> bool:
    """Whether `folder` holds an adapter rather than a model."""
    return (Path(folder) / ADAPTER_CONFIG).exists() and not (Path(folder) / "config.json").exists()


def adapter_base(folder: str | Path) -> str:
    """
    Name or folder of the model that an adapter was made for.

    Raises:
        `ValueError`: If the adapter's configuration does not name it.
    """
    name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not name:
        raise ValueError(
            f"{ADAPTER_CONFIG} in {folder} has no base_model_name_or_path: write it there, or load the model yourself and "
            f"pass it to load_adapter"
        )
    # Adapters that were written with the folder of a package on another machine, or of one that was moved.
    return name if Path(name).exists() else _packaged_name(name) or name


def _packaged_name(folder: str) -> str | None:
    """Name of the packaged checkpoint whose folder this is, in this installation or in another one."""
    for name, packaged in PACKAGED_CHECKPOINTS.items():
        if Path(folder).is_absolute() and Path(folder).parts[-3:] == packaged.parts[-3:]:
            return name
    return None


def base_name(policy: PreTrainedModel) -> tuple[str, str | None]:
    """
    Name of the checkpoint that a model was loaded from, as another machine would load it, and its licence if that is known. A model
    that was not loaded has the name of its type.
    """
    folder = policy.config._name_or_path
    if packaged := _packaged_name(folder):
        return packaged, _PACKAGED_LICENSE
    return folder or policy.config.model_type, base_license(folder) if folder else None


def finish_adapter(folder: str | Path) -> None:
    """
    Let a saved adapter name its model as another machine loads it: a packaged checkpoint by its name and not by its folder.

    Args:
        folder (`str` or `Path`): What PEFT's `save_pretrained` wrote.
    """
    path = Path(folder) / ADAPTER_CONFIG
    config = read_json(path)
    if packaged := _packaged_name(config.get("base_model_name_or_path") or ""):
        write_text(path, json.dumps({**config, "base_model_name_or_path": packaged}, indent=2, sort_keys=True))


def check_adapter_numbers(config: PeftConfig, source: str | Path) -> None:
    """
    Check the numbers of an adapter's configuration: all are finite, and those of a LoRA are in their ranges. Other types have fields
    of the same names with another meaning.

    Args:
        config ([`~peft.PeftConfig`]): The configuration.
        source (`str` or `Path`): Where it comes from, for messages.

    Raises:
        `ValueError`: If a number is not in its range, or if the type learns a prompt; the message names field and source.
    """
    if config.is_prompt_learning:
        raise ValueError(
            f"{source} is a {type(config).__name__}, which learns a prompt for a language model and has no place in a unified "
            f"model: take a type that adapts layers, e.g. LoraConfig"
        )
    values = config.to_dict()
    if isinstance(config, LoraConfig):
        whole, others = {"r": _RANK_RANGE}, {"lora_alpha": _ALPHA_RANGE, "lora_dropout": _DROPOUT_RANGE}
        check_field_ranges(values, whole, others, "", source, takes_none=False)
        alphas = values["alpha_pattern"] or {}
        check_field_ranges(alphas, {}, dict.fromkeys(alphas, _ALPHA_RANGE), "alpha_pattern", source, False)
        # In that of AdaLoRA are the ranks that it has kept.
        ranks = {} if isinstance(config, AdaLoraConfig) else values["rank_pattern"] or {}
        check_field_ranges(ranks, dict.fromkeys(ranks, _RANK_RANGE), {}, "rank_pattern", source, False)
    check_finite_numbers(values, source)


def check_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """
    Check that an adapter fits a model, which is not changed.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to adapt.
        folder (`str` or `Path`): Folder of the adapter.

    Raises:
        `FileNotFoundError`: If a file is missing; the message names it.
        `ValueError`: If a file is truncated, if a number of the configuration is out of its range, or if names or shapes do not
            match. PEFT alone would only warn, and leave missing weights at their initial values.
    """
    if isinstance(model, PeftModel):
        raise ValueError("the model has an adapter already: merge it first (merge_and_unload)")
    folder = Path(folder)
    missing = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"the adapter folder {folder} lacks {', '.join(missing)}")
    shapes = read_shapes(folder / ADAPTER_WEIGHTS)
    check_weight_file(folder / ADAPTER_WEIGHTS)
    peft_config = PeftConfig.from_pretrained(str(folder))
    check_adapter_numbers(peft_config, folder / ADAPTER_CONFIG)
    # Without this, PEFT warns if the base model was moved.
    peft_config.base_model_name_or_path = None
    try:
        with torch.device("meta"):
            adapted = get_peft_model(type(model)(copy.deepcopy(model.config)), peft_config)
    except ValueError as error:
        raise ValueError(f"the adapter in {folder} was made for another model: {error}") from error
    # Where the embeddings are adapted, PEFT's own saving adds what they were before. Without the option, it asks the Hub whether the
    # vocabulary has grown.
    expected = (get_peft_model_state_dict(adapted, save_embedding_layers=saved) for saved in (False, True))
    differences = [shape_differences({n: t.shape for n, t in e.items()}, shapes, ADAPTER_WEIGHTS) for e in expected]
    if all(differences):
        problems = min(differences, key=len)
        raise ValueError(f"the adapter in {folder} was made for another model: {summarize(problems)}")


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """
    Put a saved adapter onto a model.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model that the adapter was made for; its modules are wrapped.
        folder (`str` or `Path`): Folder of the adapter.

    Raises:
        `FileNotFoundError`, `ValueError`: As [`check_adapter`].
    """
    check_adapter(model, folder)
    return PeftModel.from_pretrained(model, str(folder))


def fit_adapter_config(
    config: PeftConfig, model: UnifiedModel, preset: str = "both", trains_vision_tower: bool = False
) -> PeftConfig:
    """
    The configuration of a new adapter for a unified model, from one that was written for a language model. What differs is logged
    once.

    - `task_type` is left out: with one, PEFT expects the forward and the `generate` of a language model.
    - Without `target_modules`, the adapter goes where the family's preset says.
    - Modules that are not trained get no adapter and no trained copy, whatever names them: the autoencoder, and the vision tower
      unless it is trained. So `target_modules="all-linear"` means all linear layers of the decoder.

    Args:
        config ([`~peft.PeftConfig`]): The user's configuration, which is not changed.
        model ([`UnifiedModel`]): The model to adapt.
        preset (`str`, *optional*, defaults to `"both"`): One of [`LORA_TARGETS`].
        trains_vision_tower (`bool`, *optional*, defaults to `False`): Whether the vision tower may get an adapter.

    Raises:
        `ValueError`: If nothing is left of `target_modules` or `modules_to_save`, or if an adapter is asked for on the head, which scores tokens.
    """
    config, family, notes = copy.deepcopy(config), model.family, []
    if config.task_type is not None:
        notes.append(f"task_type={str(getattr(config.task_type, 'value', config.task_type))!r} is left out")
        config.task_type = None
    if getattr(config, "target_modules", ...) is None and not getattr(config, "target_parameters", None):
        config.target_modules = family.lora_target_modules(preset)
        notes.append(f"target_modules are those of the preset {preset!r}")
    parts = family.frozen_modules + (() if trains_vision_tower else family.vision_modules)
    if parts and hasattr(config, "exclude_modules"):
        targets = _adapted_modules(config, model)
        left_out = [name for name in targets if _is_inside(name, parts)]
        if targets and len(left_out) == len(targets):
            named = config.target_modules
            raise ValueError(
                f"target_modules={named if isinstance(named, str) else sorted(named)} names only modules that are not trained "
                f"({', '.join(left_out[:3])}): name some of the decoder, or leave it out"
            )
        if left_out:
            config.exclude_modules = _exclude_parts(config.exclude_modules, parts)
            notes.append(
                f"{len(left_out)} of {len(targets)} modules are in parts that are not trained and get no adapter"
            )
        head = next((n for n, module in model.named_modules() if module is model.get_output_embeddings()), None)
        if head in targets:
            raise ValueError(
                f"target_modules names {head}, which scores tokens: train it as a whole, by modules_to_save"
            )
    if getattr(config, "modules_to_save", None):
        config.modules_to_save = _without_parts(config.modules_to_save, parts, model, notes)
    if notes and (not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0):
        skipped = f" Not trained: {', '.join(parts)}." if parts else ""
        logger.warning("The adapter's configuration is fitted to the model: %s.%s", "; ".join(notes), skipped)
    return config


@contextmanager
def adapters_switched_off(model: torch.nn.Module) -> Iterator[None]:
    """
    While the block runs, a model computes as it would without its adapters, where [`~peft.PeftModel`] may not be at hand: `model`
    may also be what it wraps. A model without adapters stays as it is.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    switched = [layer for layer in layers if not layer.disable_adapters]
    trained = [parameter for layer in switched for parameter in layer.parameters() if parameter.requires_grad]
    for layer in switched:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in switched:
            layer.enable_adapters(True)
            # PEFT makes every active adapter trainable.
            layer.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def freeze_parts(model: PeftModel, trains_vision_tower: bool = False) -> None:
    """
    Freeze what an adapted model does not train, adapters within it included, e.g. biases that `bias="all"` has unfrozen.

    Args:
        model ([`~peft.PeftModel`]): The adapted model.
        trains_vision_tower (`bool`, *optional*, defaults to `False`): Whether the vision tower stays as it is.
    """
    policy = model.get_base_model()
    for name in policy.family.frozen_modules:
        policy.get_submodule(name).requires_grad_(False)
    if not trains_vision_tower:
        policy.family.freeze_vision_tower(policy)


def _is_inside(name: str, parts: Sequence[str]) -> bool:
    """Whether a module is one of `parts` or in one of them."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _adapted_modules(config: PeftConfig, model: PreTrainedModel) -> list[str]:
    """Names of the modules that get an adapter."""
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        head = model.get_output_embeddings()
        linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
        config = copy.copy(config)
        config.target_modules = set(linear)
    # PEFT returns a match, a boolean or nothing, and for an excluded module an object that is false.
    return [name for name, _ in model.named_modules() if check_target_module_exists(config, name)]


def _exclude_parts(excluded: Sequence[str] | str | None, parts: Sequence[str]) -> str:
    """A regular expression of whole names: those that `exclude_modules` excludes already, and all in `parts`."""
    patterns = [rf"(?:{'|'.join(map(re.escape, parts))})(?:\..*)?"]
    if isinstance(excluded, str):
        patterns.append(f"(?:{excluded})")
    elif excluded:
        patterns.append(rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(excluded)))})")
    return "|".join(patterns)


def _without_parts(names: Sequence[str], parts: Sequence[str], model: PreTrainedModel, notes: list[str]) -> list[str]:
    """`modules_to_save` without those in `parts`. PEFT takes them as the ends of names: "vae" also means "llm2vae"."""
    every = [name for name, _ in model.named_modules()]
    left_out = [name for name in every if _is_inside(name, parts) and name.endswith(tuple(names))]
    if not left_out:
        return list(names)
    kept = [
        name
        for name in every
        if not _is_inside(name, parts) and f".{name}".endswith(tuple(f".{end}" for end in names))
    ]
    if not kept:
        raise ValueError(
            f"modules_to_save={list(names)} names only modules that are not trained ({', '.join(left_out[:3])}): leave it out, "
            f"or set freeze_vision_tower=False for a vision tower"
        )
    notes.append(f"of modules_to_save, {', '.join(kept)} are trained")
    return kept


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """
    Write an adapter without its model. The folder appears complete or not at all.

    Args:
        model ([`~peft.PeftModel`]): The adapted model.
        folder (`str` or `Path`): The folder to write, which must be empty or not exist.

    Raises:
        `FileExistsError`: If `folder` has files.
        `OSError`: If the disk has no room.
        `FloatingPointError`: If a weight is NaN or infinite; the message names it.
    """
    # Without the option, PEFT asks the Hub whether the vocabulary has grown.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    check_finite_weights(state.items(), f"the adapter is not saved to {folder}")
    with staged_folder(folder, sum(tensor.nbytes for tensor in state.values())) as stage:
        model.save_pretrained(str(stage), save_embedding_layers=False)
        finish_adapter(stage)
        name, license = base_name(model.get_base_model())
        write_model_card(stage, CardContent(name, is_adapter=True, license=license), path=folder)
