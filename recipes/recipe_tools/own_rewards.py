# SPDX-License-Identifier: Apache-2.0

"""Reward functions of the user: their import, and an evaluation by them where there are no questions for a judge."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from reward_models.arguments import BUILT_IN_REWARDS


_PREFIX, _SUFFIX = "eval_rewards/", "/mean"


def import_reward(name: str) -> Callable[..., Any]:
    """
    Import a reward function, or a class of such functions, that is given as `module:function`. Modules beside the command are
    found, as for `python -m`.

    Raises:
        `ValueError`: If it cannot be imported, or is no function.
    """
    module, separator, function = name.rpartition(":") if ":" in name else name.rpartition(".")
    if not separator:
        listing = ", ".join(map(repr, BUILT_IN_REWARDS))
        raise ValueError(f"--reward {name}: give {listing}, or a function as module:function")
    sys.path.insert(0, os.getcwd())
    try:
        value = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--reward {name}: {error}") from error
    finally:
        sys.path.pop(0)
    if not callable(value):
        raise ValueError(f"--reward {name}: {function} is {type(value).__name__}, not a function")
    return value


def set_evaluation(args: AlphaGRPOConfig, num_seeds: int, batch_size: int) -> None:
    """
    Let the trainer evaluate with its own reward functions before training, as TRL does.

    Args:
        args ([`AlphaGRPOConfig`]): The configuration. Its fields are written to.
        num_seeds (`int`): Images per prompt, unless `num_generations_eval` says otherwise.
        batch_size (`int`): Largest number of images per batch.
    """
    args.num_generations_eval = args.num_generations_eval or num_seeds
    args.per_device_eval_batch_size = max(1, batch_size // args.num_generations_eval) * args.num_generations_eval
    args.eval_on_start = True


def evaluation_rewards(log_history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """
    Find the rewards of the first and the last evaluation in a trainer's log.

    Returns:
        `dict[str, dict[str, float]]`: For `"before"` and `"after"`, the mean of each reward function by name, and `reward`, the
        weighted sum. A function that gave no reward is left out.
    """
    logs = [entry for entry in log_history if "eval_reward" in entry]
    return {
        moment: {
            **{name[len(_PREFIX) : -len(_SUFFIX)]: v for name, v in log.items() if _is_mean(name)},
            "reward": log["eval_reward"],
        }
        for moment, log in (("before", logs[0]), ("after", logs[-1]))
    }


def _is_mean(name: str) -> bool:
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


def rewards_table(rewards: Mapping[str, Mapping[str, float]]) -> str:
    """The rewards of [`evaluation_rewards`] as text."""
    before, after = rewards["before"], rewards["after"]
    names = [name for name in before if name in after]
    # A single function is the reward.
    names = names[:-1] if len(names) == 2 else names
    header = f"{'mean of':<24}{'before':>10}{'after':>10}{'change':>10}"
    lines = [
        f"{name:<24}{before[name]:>10.3f}{after[name]:>10.3f}{after[name] - before[name]:>+10.3f}" for name in names
    ]
    return "\n".join([header, "-" * len(header), *lines])
