# SPDX-License-Identifier: Apache-2.0

"""
The implementation of attention that a model uses where the user names none.

On a CPU the choice was measured. `python recipes/benchmark.py --parts attention` compares rollouts and updates with every implementation;
recipes/README.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from alphagrpo_ext.models.contract import Family, UnifiedModel


ATTENTION_IMPLEMENTATIONS = ("flex_attention", "sdpa", "eager")
"""Transformers' names, the one that keeps the least for the backward first."""
MEASURED_FAMILIES = ("bagel", "cosmos3")
"""Families, by the `model_type` of their configurations, whose implementations were compared on a CPU."""


@dataclass(frozen=True)
class AttentionChoice:
    """
    An implementation of attention.

    Args:
        name (`str`, *optional*): Transformers' name; `None` keeps what the model has.
        reason (`str`): Why this one.
    """

    name: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.name or 'as loaded'} ({self.reason})"


def attention_implementations(family: Family) -> list[str]:
    """Names of the implementations of attention that a family's model has, the one that keeps the least first."""
    has = {"flex_attention": family.model_class._supports_flex_attn, "sdpa": family.model_class._supports_sdpa}
    return [name for name in ATTENTION_IMPLEMENTATIONS if has.get(name, True)]


def choose_attention(family: Family, device_type: str, given: str | None = None) -> AttentionChoice:
    """
    Choose the implementation of attention of a model.

    Args:
        family ([`Family`]): The model's family.
        device_type (`str`): Where the model computes, e.g. `"cpu"` or `"cuda"`.
        given (`str`, *optional*): The user's choice, which always wins.
    """
    if given is not None:
        return AttentionChoice(given, "given")
    if device_type == "cuda":
        return AttentionChoice(attention_implementations(family)[0], "keeps the least of those that the model has")
    if device_type == "cpu" and family.model_class.config_class.model_type in MEASURED_FAMILIES:
        return AttentionChoice("eager", "measured as the fastest on a CPU")
    return AttentionChoice(None, f"nothing was measured for this model on {device_type}")


def set_attention(model: UnifiedModel, device_type: str) -> AttentionChoice:
    """
    Let a model use the implementation that [`choose_attention`] names.

    Args:
        model ([`UnifiedModel`]): The model, which may have an adapter.
        device_type (`str`): Where it computes.
    """
    choice = choose_attention(model.family, device_type)
    if choice.name is not None:
        model.set_attn_implementation(choice.name)
    return choice
