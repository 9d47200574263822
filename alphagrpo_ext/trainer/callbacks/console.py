# SPDX-License-Identifier: Apache-2.0

"""
What a run says on the terminal: a banner, and one line per log.

A log of the trainer has about 60 metrics. The console shows those that tell whether a run is healthy; `metrics.jsonl` and
trackers get all of them.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import (
    IntervalStrategy,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback


SHOWN_METRICS = {
    "reward": ("reward", "{:.3f}"),
    "strict_pass": ("strict pass", "{:.0%}"),
    "reflection/improved_frac": ("improved", "{:.0%}"),
    "entropy": ("entropy", "{:.2f}"),
    "grad_norm": ("grad norm", "{:.2f}"),
    "image/ratio_mean": ("image ratio", "{:.4f}"),
    "judge/failed_frac": ("unscored", "{:.0%}"),
}
"""Metrics of a line, by their names or the end of these, with their labels and formats. `unscored` is shown only above 0."""


def banner(title: str, facts: dict[str, Any]) -> str:
    """A title and facts about a run, one per line."""
    width = max(len(name) for name in facts)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in facts.items())])


def log_line(step: int, max_steps: int, logs: dict[str, Any], seconds_per_step: float | None = None) -> str:
    """
    One line about a log.

    Args:
        step, max_steps (`int`): Optimizer steps done, and all of them.
        logs (`dict[str, Any]`): The log.
        seconds_per_step (`float`, *optional*): Mean time of a step since the last line.
    """
    parts = [f"step {step}/{max_steps}"]
    for name, (label, form) in SHOWN_METRICS.items():
        value = _metric(logs, name)
        if isinstance(value, int | float) and (name != "judge/failed_frac" or value > 0):
            parts.append(f"{label} {form.format(value)}")
    if seconds_per_step is not None:
        parts.append(f"{seconds_per_step:.1f} s per step")
    return "  |  ".join(parts)


def _metric(logs: dict[str, Any], name: str) -> Any:
    """The metric of this name, or else the first one whose name ends in it: a log also has `timing/reward`."""
    return logs[name] if name in logs else next((v for key, v in logs.items() if key.endswith(f"/{name}")), None)


class LastLogCallback(TrainerCallback):
    """Logs the last steps of a run, too, if there are fewer than `logging_steps` of them."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True


class ConsoleCallback(ProgressCallback):
    """Shows a progress bar, where there is a terminal, and one line per log instead of all metrics."""

    def __init__(self) -> None:
        super().__init__()
        self._first = self._last = (0.0, 0)

    def attach(self, trainer: Trainer) -> None:
        """Take the place of Transformers' own callbacks that print logs."""
        # The default is another one in a notebook.
        for callback in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._first = self._last = (time.perf_counter(), state.global_step)
        self.current_step = 0
        if state.is_world_process_zero:
            # A bar in a file would be a line that the next one is glued to.
            disable = args.disable_tqdm or not sys.stderr.isatty()
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=disable)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not args.disable_tqdm and sys.stderr.isatty():
            super().on_prediction_step(args, state, control, **kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_step_end(args, state, control, **kwargs)
        then, step = self._first
        left = state.max_steps - state.global_step
        if state.is_world_process_zero and state.global_step == step + 2 and left > 0:
            seconds = (time.perf_counter() - then) / 2
            others = f"other {left} steps" if left > 1 else "last step"
            rest = f"{seconds * left / 60:.1f} min" if seconds * left >= 60 else f"{seconds * left:.0f} s"
            self._say(f"{seconds:.1f} s per step: about {rest} for the {others}")

    def _say(self, line: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self.training_bar is None or self.training_bar.disable:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        else:
            self.training_bar.write(line)

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
        if "eval_reward" in logs:
            self._say(f"evaluation after step {state.global_step}  |  reward {logs['eval_reward']:.3f}")
        # The last log of a run has its total time and no reward.
        if "loss" not in logs:
            return
        now, (then, step) = time.perf_counter(), self._last
        seconds = (now - then) / (state.global_step - step) if state.global_step > step else None
        self._last = (now, state.global_step)
        self._say(log_line(state.global_step, state.max_steps, logs, seconds))
