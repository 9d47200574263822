# SPDX-License-Identifier: Apache-2.0

"""
When a policy that looks at its image keeps it, at inference: by a threshold on the probability of its verdict.

The likeliest verdict may keep too few images or too many. How likely it is tells right images from wrong ones all the same, so a
threshold is calibrated on training prompts; no judge is asked at inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.trajectory import Segment, TextSegment, Trajectory


STOP_THRESHOLD = "stop_threshold"
"""Key of the threshold among the settings of sampling that a model's configuration keeps."""


@dataclass(frozen=True)
class VerdictChoice:
    """
    The place in a reflection where its two verdicts differ.

    Args:
        prefix_ids (`list[int]`): Token ids before that place.
        keep_id, repaint_id (`int`): The token of either verdict there.
    """

    prefix_ids: list[int]
    keep_id: int
    repaint_id: int


def verdict_choice(text: TextSegment, processor: UnifiedProcessor) -> VerdictChoice | None:
    """
    The first token in which the last verdict of a reflection differs from the other verdict in its place.

    Args:
        text (`TextSegment`): The reflection.
        processor ([`UnifiedProcessor`]): Its verdicts and its tokenizer.

    Returns:
        [`VerdictChoice`] or `None`: `None` if the text has no verdict.
    """
    written, body = processor.decode_sampled([text]), processor.decode(text.content_ids)
    verdicts = (processor.keep_verdict, processor.repaint_verdict)
    place = max(map(written.rfind, verdicts))
    if place < 0:
        return None
    # What the template wrote for the policy is not among its tokens.
    opened = written.removesuffix(body)
    keep, repaint = (
        processor.text_segment(f"{written[:place]}{verdict}".removeprefix(opened)).token_ids for verdict in verdicts
    )
    common = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(keep, repaint, strict=False))))
    if common == min(len(keep), len(repaint)):
        return None
    return VerdictChoice(keep[:common], keep[common], repaint[common])


@torch.no_grad()
def keep_probabilities(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    contexts: Sequence[Sequence[Segment]],
    texts: Sequence[TextSegment],
) -> list[float | None]:
    """
    How sure a policy is that its image is right: `p(keep) / (p(keep) + p(repaint))` at the token of [`verdict_choice`], at a
    temperature of 1. The work is not counted.

    Args:
        model ([`UnifiedModel`]): The policy.
        processor ([`UnifiedProcessor`]): Its processor.
        contexts (`Sequence[Sequence[Segment]]`): What each reflection follows.
        texts (`Sequence[TextSegment]`): The reflections.

    Returns:
        `list[float | None]`: In [0, 1]; `None` for a reflection without a verdict.
    """
    choices = [verdict_choice(text, processor) for text in texts]
    judged = [i for i, choice in enumerate(choices) if choice is not None]
    if not judged:
        return [None] * len(texts)
    trajectories = [
        Trajectory([*contexts[i], TextSegment([*choices[i].prefix_ids, token], sampled=True, ended=False)])
        for i in judged
        for token in (choices[i].keep_id, choices[i].repaint_id)
    ]
    batch = model.pack(trajectories, GuidanceConfig(text_scale=1.0))
    counter, model.work = model.work, None
    try:
        log_probs = model(**{name: tensor.to(model.device) for name, tensor in batch.inputs.items()}).log_probs.cpu()
    finally:
        model.work = counter
    # The verdict is the last token of each.
    last = [len(t.sampled_texts[0].token_ids) - 1 for t in trajectories]
    is_last = batch.score_column.cpu() == torch.tensor(last)[batch.score_trajectory.cpu()]
    keep, repaint = log_probs[is_last].double().view(-1, 2).T
    values = dict(zip(judged, torch.sigmoid(keep - repaint).tolist(), strict=True))
    return [values.get(i) for i in range(len(texts))]


def best_threshold(
    keep_probabilities: Sequence[float | None], first_passes: Sequence[bool], repainted_passes: Sequence[bool]
) -> float:
    """
    The threshold with which most images pass, if those at or above it are kept and the others repainted. Of equal ones it is
    the middle of the range with the fewest stops.

    Args:
        keep_probabilities (`Sequence[float | None]`): Of each image, as from [`keep_probabilities`].
        first_passes, repainted_passes (`Sequence[bool]`): Whether each image passes, and whether its repaint does.

    Raises:
        `ValueError`: If there is no image.
    """
    if not keep_probabilities:
        raise ValueError("a threshold is calibrated on images, but there are none")
    values = sorted({p for p in keep_probabilities if p is not None}, reverse=True)
    triples = list(zip(keep_probabilities, first_passes, repainted_passes, strict=True))

    def num_passing(threshold: float) -> int:
        return sum(first if p is not None and p >= threshold else repainted for p, first, repainted in triples)

    # Midways between neighbours, so that no image of another prompt is decided by rounding; 1 keeps nothing but certainty.
    bounds = [1.0, *((high + low) / 2 for high, low in zip(values, values[1:], strict=False)), 0.0]
    return max(bounds, key=num_passing)


def saved_threshold(model: UnifiedModel) -> float | None:
    """The threshold that a model's configuration keeps, if it was calibrated."""
    return (getattr(model.config, "sampling", None) or {}).get(STOP_THRESHOLD)


def with_threshold(sampling: dict[str, Any], threshold: float) -> dict[str, Any]:
    """Settings of sampling, as a model's configuration keeps them, with a threshold."""
    return {**sampling, STOP_THRESHOLD: threshold}
