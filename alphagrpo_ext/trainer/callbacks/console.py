# SPDX-License-Identifier: Apache-2.0

"""
What a run says on the terminal: a banner when training begins, and one line per log.

A log of the trainer has about 60 metrics. The console shows those that tell whether a run is healthy; `metrics.jsonl` and
trackers get all of them.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from transformers import ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
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


class ConsoleCallback(ProgressCallback):
    """
    Shows a banner, a progress bar, and one line per log instead of all metrics.

    Args:
        title (`str`): First line of the banner.
        facts (`dict[str, Any]`): Facts about the run, for the banner.
    """

    def __init__(self, title: str, facts: dict[str, Any]) -> None:
        super().__init__()
        self.title, self.facts = title, facts
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
        if state.is_world_process_zero:
            sys.stdout.write(banner(self.title, self.facts) + "\n")
        self._first = self._last = (time.perf_counter(), state.global_step)
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.disable = args.disable_tqdm or not sys.stderr.isatty()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_step_end(args, state, control, **kwargs)
        then, step = self._first
        left = state.max_steps - state.global_step
        if state.is_world_process_zero and state.global_step == step + 2 and left > 0:
            seconds = (time.perf_counter() - then) / 2
            self._say(f"{seconds:.1f} s per step: about {seconds * left / 60:.1f} min for the other {left} steps")

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
        # The last log of a run has its total time and no reward.
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        now, (then, step) = time.perf_counter(), self._last
        seconds = (now - then) / (state.global_step - step) if state.global_step > step else None
        self._last = (now, state.global_step)
        self._say(log_line(state.global_step, state.max_steps, logs, seconds))
