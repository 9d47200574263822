# SPDX-License-Identifier: Apache-2.0

"""The settings of a run, as a checkpoint keeps them, and their comparison with those of a run that resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import xxhash
from peft import PeftConfig, PeftModel

from alphagrpo_ext.files import write_text
from alphagrpo_ext.models.fingerprint import processor_settings, weights_digest
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from alphagrpo_ext.trainer.resume.setting_kinds import SAVED_RATE_SCHEDULERS, SETTING_KINDS, SettingKind
from alphagrpo_ext.trainer.reward_functions import reward_attribute


SETTINGS_NAME = "settings.json"
# What PEFT notes about where an adapter comes from and what it is used for now.
_ADAPTER_NOTES = ("base_model_name_or_path", "inference_mode", "revision", "peft_version", "auto_mapping", "task_type")


class ChangedSettingsError(ValueError):
    """Raised for a run that resumes with a setting that cannot change."""


@dataclass(frozen=True)
class Change:
    """
    A setting that differs.

    Args:
        name (`str`): Its name.
        before, now (`Any`): Its value in the checkpoint, and in the run that resumes.
    """

    name: str
    before: Any
    now: Any

    @property
    def kind(self) -> SettingKind:
        # What is not in the table is a field of another version of TRL or Transformers.
        return SETTING_KINDS.get(self.name, SettingKind.FREE)

    def __str__(self) -> str:
        before, now = _differing_entries(self.before, self.now)
        return f"{self.name} was {_shown(before)} and is {_shown(now)}"


def plain(value: Any) -> Any:
    """A value as JSON can keep it: equal settings give equal values in every process."""
    if isinstance(value, Enum):
        return plain(value.value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain(entry) for entry in value), key=str)
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    # The `repr` of an object may show its address.
    return repr(value) if type(value).__repr__ is not object.__repr__ else type(value).__name__


def config_settings(args: AlphaGRPOConfig) -> dict[str, Any]:
    """The fields of a configuration that a checkpoint keeps."""
    kept = (f.name for f in fields(args) if SETTING_KINDS.get(f.name) is not SettingKind.LOCAL)
    return {name: plain(getattr(args, name)) for name in kept}


def given_settings(
    model: torch.nn.Module,
    reference: torch.nn.Module | None,
    processor: Any,
    train_dataset: Any,
    reward_funcs: Sequence[Any],
    reward_names: Sequence[str],
    sharding: str,
) -> dict[str, Any]:
    """
    What a trainer is given beside its configuration.

    Args:
        model (`torch.nn.Module`): The policy, not wrapped, before training.
        reference (`torch.nn.Module`, *optional*): Its reference model.
        processor ([`UnifiedProcessor`]): Its processor.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`): Training prompts.
        reward_funcs (`Sequence`):
            Reward functions. The attribute `run_settings` of one, a dictionary, belongs to the settings of the run. Its entry
            `reward_model`, a dictionary as well, has the settings of a model that the function asks.
        reward_names (`Sequence[str]`): Their names.
        sharding (`str`): How parameters are distributed.
    """
    policy = model.get_base_model() if isinstance(model, PeftModel) else model
    rewards = [
        (name, plain(reward_attribute(function, "run_settings", {})))
        for name, function in zip(reward_names, reward_funcs, strict=True)
    ]
    # An entry of its own, so that a checkpoint of an earlier version, which has none, is compared by the rest.
    asked = {name: settings.pop("reward_model", {}) for name, settings in rewards}
    return {
        "model.name": getattr(policy.config, "_name_or_path", ""),
        "model.dtype": str(next(policy.parameters()).dtype),
        "peft_config": _adapters(model),
        "model.frozen_weights": weights_digest(model, reference),
        "processing_class": plain(processor_settings(processor)),
        "train_dataset": dataset_identity(train_dataset),
        "reward_funcs": [{"name": name, **settings} for name, settings in rewards],
        "reward_model": {name: settings for name, settings in asked.items() if settings},
        "sharding": sharding,
    }


def _adapters(model: torch.nn.Module) -> Any:
    if not isinstance(model, PeftModel):
        return None

    def kept(config: PeftConfig) -> dict[str, Any]:
        return {name: plain(value) for name, value in config.to_dict().items() if name not in _ADAPTER_NOTES}

    return {name: kept(config) for name, config in model.peft_config.items()}


def dataset_identity(dataset: Any) -> str:
    """Number of rows and a digest of all columns that hold no images or other bytes; a stream is not read."""
    if not isinstance(dataset, datasets.Dataset):
        return "a stream"
    columns = [name for name, feature in dataset.features.items() if not _holds_bytes(feature)]
    digest = xxhash.xxh3_64(str(sorted(dataset.column_names)).encode())
    for batch in dataset.select_columns(sorted(columns)).with_format("arrow").iter(batch_size=1000):
        digest.update(repr(batch.to_pylist()).encode(errors="surrogatepass"))
    return f"{len(dataset)} rows (digest {digest.hexdigest()})"


def _holds_bytes(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return any(_holds_bytes(entry) for entry in feature.values())
    if isinstance(feature, list | tuple):
        return any(_holds_bytes(entry) for entry in feature)
    inner = getattr(feature, "feature", None)
    is_binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
    return is_binary or isinstance(feature, datasets.Image) or (inner is not None and _holds_bytes(inner))


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Keep settings in a checkpoint."""
    write_text(folder / SETTINGS_NAME, json.dumps(settings, indent=2) + "\n")


def read_settings_file(folder: Path) -> dict[str, Any] | None:
    """The settings that a checkpoint keeps; `None` if an earlier version saved it."""
    path = folder / SETTINGS_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Settings that both have and that differ, in the order of `now`."""
    return [
        Change(name, before[name], value)
        for name, value in now.items()
        if name in before and not _are_same(before[name], value)
    ]


def _are_same(before: Any, now: Any) -> bool:
    # 0 and 0.0 are the same setting, and so are two NaN, which are equal as text alone.
    return before == now or json.dumps(before, sort_keys=True) == json.dumps(now, sort_keys=True)


def check_changes(checkpoint: Path, found: list[Change]) -> None:
    """
    Refuse changes of settings that cannot change.

    Args:
        checkpoint (`Path`): The checkpoint.
        found (`list[Change]`): All changes.

    Raises:
        [`ChangedSettingsError`]: The message names each of them with both values.
    """
    by_name = {change.name: change for change in found}
    fixed = [change for change in found if change.kind is SettingKind.FIXED]
    if "peft_config" in by_name:
        # Another adapter leaves other weights frozen.
        fixed = [change for change in fixed if change.name != "model.frozen_weights"]
    if any(change.name == "model.frozen_weights" for change in fixed) and "model.name" in by_name:
        # A model may move, but where its weights differ its name says more than their digest.
        fixed.append(by_name["model.name"])
    schedule = by_name.get("lr_scheduler_type")
    if schedule is not None and {schedule.before, schedule.now} & {*SAVED_RATE_SCHEDULERS}:
        fixed.append(schedule)
    # Whether the optimizer has parameter groups for both experts.
    own_rate = by_name.get("generation_learning_rate")
    if own_rate is not None and (own_rate.before is None) != (own_rate.now is None):
        fixed.append(own_rate)
    if fixed:
        raise ChangedSettingsError(
            f"the checkpoint {checkpoint} belongs to a run whose settings cannot change: "
            f"{'; '.join(str(change) for change in fixed)}. Resume with the values that it had, or start a new run from its "
            f"weights with model_name_or_path"
        )


def _differing_entries(before: Any, now: Any) -> tuple[Any, Any]:
    """Two values, or of two dictionaries what differs."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return before, now
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    pairs = {name: _differing_entries(before.get(name), now.get(name)) for name in names}
    return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
