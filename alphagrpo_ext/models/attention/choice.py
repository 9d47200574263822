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
    from alphagrpo_ext.models.contract import Family


ATTENTION_IMPLEMENTATIONS = ("flex_attention", "sdpa", "eager")
"""Transformers' names, the one that keeps the least for the backward first."""
LONG_IMAGE = 256
"""
Latent tokens of an image from which updates on a CPU in fp32 use `sdpa`. It was measured to be faster at this length, as fast as `eager` up
to 64 tokens, and not in between.
"""


@dataclass(frozen=True)
class AttentionChoice:
    """
    An implementation of attention.

    Args:
        name (`str`): Transformers' name.
        reason (`str`): Why this one.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def attention_implementations(family: Family) -> list[str]:
    """Names of the implementations of attention that a family's model has, the one that keeps the least first."""
    has = {"flex_attention": family.model_class._supports_flex_attn, "sdpa": family.model_class._supports_sdpa}
    return [name for name in ATTENTION_IMPLEMENTATIONS if has.get(name, True)]


def choose_attention(
    family: Family, device_type: str, given: str | None = None, is_fp32: bool = True, trained_image_tokens: int = 0
) -> AttentionChoice:
    """
    Choose the implementation of attention of a model.

    On a CPU, `eager` was as fast as `sdpa` or faster in rollouts, in updates in bf16, and in updates in fp32 with short images. With
    long images, updates in fp32 were faster with `sdpa`. Flex attention was not compared, because the package does not compile it there.
    `eager` also keeps the scores of all pairs of tokens for the backward; where memory is short, give `sdpa`.

    On other devices it is Transformers' default, because none was measured. `recipes/gpu_check.py` measures a GPU.

    Args:
        family ([`Family`]): The model's family.
        device_type (`str`): Where the model computes, e.g. `"cpu"` or `"cuda"`.
        given (`str`, *optional*): The user's choice, which always wins.
        is_fp32 (`bool`, *optional*, defaults to `True`): Whether it computes in fp32: weights in fp32, and no autocast.
        trained_image_tokens (`int`, *optional*, defaults to `0`): Latent tokens per image of updates; 0 for a model that only samples.
    """
    if given is not None:
        return AttentionChoice(given, "given")
    fused = "sdpa" if "sdpa" in attention_implementations(family) else "eager"
    if device_type != "cpu":
        return AttentionChoice(fused, f"Transformers' default; nothing was measured on {device_type}")
    if is_fp32 and trained_image_tokens >= LONG_IMAGE:
        return AttentionChoice(fused, f"faster on a CPU in fp32 with images of {LONG_IMAGE} tokens or more")
    return AttentionChoice("eager", "measured as the fastest on a CPU")
