# SPDX-License-Identifier: Apache-2.0

"""Callbacks that the configuration of a trainer asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from alphagrpo_ext.trainer.callbacks.completion_logs import completions_callbacks
from alphagrpo_ext.trainer.callbacks.report import ReportCallback
from alphagrpo_ext.trainer.config import AlphaGRPOConfig


def own_callbacks(
    args: AlphaGRPOConfig, callbacks: Sequence[TrainerCallback], table: Mapping[str, Any]
) -> list[TrainerCallback]:
    """
    Make the report's callback and those of logged completions.

    Args:
        args ([`AlphaGRPOConfig`]): Says which are wanted.
        callbacks (`Sequence[TrainerCallback]`), table (`Mapping[str, Any]`): As in [`completions_callbacks`].
    """
    report = [ReportCallback()] if args.report else []
    return [*report, *(completions_callbacks(callbacks, table) if args.log_completions else [])]
