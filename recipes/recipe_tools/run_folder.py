# SPDX-License-Identifier: Apache-2.0

"""The output folder of a training run: which run it holds, and how that goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from alphagrpo_ext.files import write_text
from alphagrpo_ext.trainer.resume.setting_kinds import SETTING_KINDS, SettingKind


ARGUMENTS_NAME = "arguments.json"
"""File of a run's arguments. It is written when training begins."""
_CONTENTS = ("metrics.jsonl", "*.safetensors", "checkpoint-*")
# What a run saves and prints on its way does not make it another run.
_OUTPUT = ("save_", "log_", "logging_", "report", "push_", "hub_", "verbose_logs")
_NUM_NAMED = 3


def run_arguments(script_args: Any, training_args: TrainingArguments, model_args: Any) -> dict[str, Any]:
    """All arguments that make a run what it is, by name, as JSON values: not those of where it runs, and what it writes and when."""
    values = {**asdict(script_args), **asdict(model_args), **training_args.to_dict()}
    kept = {
        name: value
        for name, value in values.items()
        if SETTING_KINDS.get(name) is not SettingKind.LOCAL and not name.startswith(_OUTPUT)
    }
    return json.loads(json.dumps(kept, default=str))


def refuse_other_run(output_dir: Path, arguments: Mapping[str, Any]) -> None:
    """
    Keep a new run from overwriting another one. The same command may run again.

    Args:
        output_dir (`Path`): Folder of the new run, which does not resume.
        arguments (`Mapping[str, Any]`): From [`run_arguments`].

    Raises:
        `ValueError`: If the folder holds a model, a checkpoint or metrics, and the run with these arguments did not make them.
    """
    found = [path for pattern in _CONTENTS for path in output_dir.glob(pattern)]
    # A run that failed in its first step has an empty file of metrics.
    if not any(path.is_dir() or path.stat().st_size for path in found):
        return
    path = output_dir / ARGUMENTS_NAME
    advice = "name another --output_dir, continue that run with --resume_from_checkpoint last, or remove the folder"
    if not path.is_file():
        raise ValueError(f"output_dir {output_dir} holds a model or another run, which would be overwritten: {advice}")
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name, value in arguments.items() if name in before and before[name] != value]
    if changed:
        differences = ", ".join(
            f"{name} was {before[name]!r} and is {arguments[name]!r}" for name in changed[:_NUM_NAMED]
        )
        more = f" and {len(changed) - _NUM_NAMED} more" if len(changed) > _NUM_NAMED else ""
        raise ValueError(
            f"output_dir {output_dir} holds a run with other arguments, which would be overwritten ({differences}{more}): "
            f"{advice}"
        )


def write_arguments(output_dir: Path, arguments: Mapping[str, Any]) -> None:
    """Keep the arguments of a run that begins in its folder."""
    write_text(output_dir / ARGUMENTS_NAME, json.dumps(arguments, indent=2) + "\n")


def how_to_go_on(output_dir: Path) -> str:
    """What somebody whose run ended early can do next."""
    checkpoints = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if checkpoints:
        return f"The last checkpoint is {checkpoints[-1]}: the same command with --resume_from_checkpoint last continues there."
    return (
        "There is no checkpoint yet. With --save_strategy steps --save_steps 10 --resume_from_checkpoint last, the "
        "same command starts a run and continues it."
    )
