# SPDX-License-Identifier: Apache-2.0

"""Rollouts and updates with each implementation of attention that a CPU runs uncompiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmark_parts.adapters import make_rollout
from benchmark_parts.sizes import Size
from benchmark_parts.updates.split_update import SplitUpdate


CPU_ATTENTIONS = ("eager", "sdpa")
"""Flex attention is not among them: without compilation it computes all scores in fp32, whatever its mask leaves out."""


def attention_calls(size: Size, precision: str) -> dict[str, dict[str, Callable[[], object]]]:
    """
    The rollout of one prompt and the update of one micro-batch with every implementation, by what is run and the implementation. One
    model is switched between them.

    Args:
        size ([`Size`]): The model, and the number of samples.
        precision (`str`): `"float32"`, or `"bfloat16"` by autocast over weights in fp32.
    """
    update = SplitUpdate.of(size, precision)
    model, rollout = update.model, make_rollout(size, precision == "bfloat16")

    def with_attention(name: str, function: Callable[[], object]) -> None:
        model.set_attn_implementation(name)
        function()

    functions = {"rollout": partial(rollout, model), "update": partial(update.run, update.automatic)}
    return {
        what: {name: partial(with_attention, name, function) for name in CPU_ATTENTIONS}
        for what, function in functions.items()
    }
