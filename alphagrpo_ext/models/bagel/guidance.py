# SPDX-License-Identifier: Apache-2.0

"""BAGEL's guidance with two nested conditions, text and image, and three kinds of renormalisation.

As in BAGEL (https://huggingface.co/papers/2505.14683), with one difference: norms are taken per sample. The original
takes the global norm over the whole batch, so that samples influence each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from alphagrpo_ext.flow.guidance import GuidanceConfig, extrapolate, in_interval, renormalize
from alphagrpo_ext.trajectory import Segment, TextSegment


BRANCHES = ("full", "text_dropped", "image_dropped")
"""The whole context; the context without the last request; the given texts alone."""


@dataclass(frozen=True)
class BagelGuidance:
    """
    Guided velocity: away from the branches that miss a condition, then scaled back to at most the norm of the full
    branch.

    A scale of at most 1 switches its branch off. Image guidance builds on text guidance and is off without it.

    Args:
        settings ([`GuidanceConfig`]): Scales, interval and renormalisation.
    """

    settings: GuidanceConfig

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches that have an effect, of [`BRANCHES`], in their order."""
        if self.settings.text_scale <= 1:
            return BRANCHES[:1]
        return BRANCHES[:2] if self.settings.image_scale <= 1 else BRANCHES

    def branches_at(self, t: float | torch.Tensor) -> tuple[str, ...]:
        """The branches that are needed at time `t`: all inside the interval, and `"full"` outside it."""
        return self.branches if in_interval(t, self.settings.interval) else BRANCHES[:1]

    def combine(self, velocities: Mapping[str, torch.Tensor], mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            velocities (`Mapping[str, torch.Tensor]`):
                A velocity `(..., tokens, channels)` for every branch, or for `"full"` alone, which is then returned.
            mask (`torch.Tensor` of shape `(..., tokens)`, *optional*):
                False on padding, which does not count in a norm; broadcastable.

        Returns:
            `torch.Tensor` of shape `(..., tokens, channels)`, fp32.

        Raises:
            `ValueError`: If the velocity of a branch is missing.
        """
        guided = full = velocities["full"].float()
        if len(self.branches) == 1 or len(velocities) == 1:
            return full
        missing = [name for name in self.branches if name not in velocities]
        settings = self.settings
        if missing:
            raise ValueError(
                f"text_scale {settings.text_scale} and image_scale {settings.image_scale} need the velocity of "
                f"{' and '.join(missing)}"
            )
        guided = extrapolate(velocities["text_dropped"].float(), guided, settings.text_scale)
        if settings.renorm_type == "text_channel":
            guided = renormalize(guided, full, settings.renorm_min, per_token=True, mask=mask)
        if "image_dropped" in self.branches:
            guided = extrapolate(velocities["image_dropped"].float(), guided, settings.image_scale)
        if settings.renorm_type != "text_channel":
            is_per_token = settings.renorm_type == "channel"
            guided = renormalize(guided, full, settings.renorm_min, per_token=is_per_token, mask=mask)
        return guided


def branch_context(branch: str, context: Sequence[Segment]) -> list[Segment]:
    """
    The context of a guidance branch, as BAGEL's inferencer makes it. Without the text, only the last request is left
    out, and with it the thought about it. Without images, only the given texts are left. So in text-to-image, where
    there are no images, `"image_dropped"` is the context without the thought.

    Args:
        branch (`str`): One of [`BRANCHES`].
        context (`Sequence[Segment]`): All that the policy sees when it starts to act.

    Raises:
        `ValueError`: If the branch is unknown.
    """
    if branch not in BRANCHES:
        raise ValueError(f"unknown guidance branch {branch!r}, available: {', '.join(BRANCHES)}")
    given = [i for i, s in enumerate(context) if isinstance(s, TextSegment) and s.role != "assistant"]
    if branch == "full":
        return list(context)
    if branch == "text_dropped":
        return list(context[: given[-1]] if given else context)
    return [context[i] for i in given]
