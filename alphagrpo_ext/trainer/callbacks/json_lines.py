# SPDX-License-Identifier: Apache-2.0

"""Logs of a run as a file of JSON lines, for any Transformers trainer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alphagrpo_ext.files import write_text


class JsonLinesCallback(TrainerCallback):
    """
    Write every log of the main process to a file of JSON lines.

    The file holds one run. When training begins, it is rewritten with what the run had logged until the checkpoint that it
    resumes from. So a run that was stopped and resumed has each line once.

    Args:
        path (`str` or `Path`): The file. Its folder is created.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        write_text(self.path, "".join(_line(entry["step"], entry) for entry in state.log_history))

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
    # JSON has no NaN, which a mean over no sample is.
    values = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in logs.items()}
    return json.dumps({"step": step, **values}) + "\n"
