# SPDX-License-Identifier: Apache-2.0

"""Callbacks that any Transformers trainer takes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class JsonLinesCallback(TrainerCallback):
    """
    Write every log of the main process to a file of JSON lines.

    The file holds one run: when training begins it is written anew with what the checkpoint that it goes on from had
    logged, so that a run that was stopped and resumed has each line once.

    Args:
        path (`str` or `Path`): The file. Its folder is made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        temporary.write_text("".join(_line(entry["step"], entry) for entry in state.log_history), encoding="utf-8")
        os.replace(temporary, self.path)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(state.global_step, logs))


def _line(step: int, logs: dict[str, Any]) -> str:
    return json.dumps({"step": step, **logs}) + "\n"
