# SPDX-License-Identifier: Apache-2.0

"""
Painting with a policy in a few lines: `alphagrpo_ext.pipeline("bagel-shapes")("a red circle").images[0]`.

The settings of sampling (size, steps, guidance, thoughts) are those that the checkpoint was trained with. The trainer
writes those of its evaluations, with the name of their task, as `sampling` into the model's configuration. A model without
them has the family's. Another task keeps what it declares itself, as in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.processing_utils import ProcessorMixin

from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.rollout.config import RolloutConfig
from alphagrpo_ext.rollout.refinement import Refinement, refine
from alphagrpo_ext.rollout.settings import SETTING_NAMES, TaskSettings, resolve_settings
from alphagrpo_ext.rollout.task import PAINTING_TASK, REFLECTION_TASK, TASKS


@dataclass(frozen=True)
class PipelineOutput:
    """
    What a pipeline painted.

    Args:
        images (`list[PIL.Image.Image]`): The last image of each prompt.
        texts (`list[str]`): What the policy wrote before it: its thought, or its reflection on the image before.
        refinements (`list[Refinement]`): All images of each prompt with their texts, from the first to the last.
    """

    images: list[Image.Image]
    texts: list[str]
    refinements: list[Refinement]


class UnifiedPipeline:
    """
    Paints prompts with a policy, and lets it refine its images.

    Args:
        model ([`UnifiedModel`]): The policy.
        processor ([`~transformers.ProcessorMixin`]): Its processor.
        settings (`Mapping[str, Any]`, *optional*):
            Settings of sampling for every task, in place of the model's own; names as in [`TaskSettings`].

    Raises:
        `ValueError`: If a setting is unknown.

    Example:

    ```python
    >>> pipe = UnifiedPipeline.from_pretrained("bagel-shapes")
    >>> output = pipe("a red circle on a white background", num_rounds=1, seed=0)
    >>> output.images[0].save("circle.png")
    ```
    """

    def __init__(
        self, model: UnifiedModel, processor: ProcessorMixin, settings: Mapping[str, Any] | None = None
    ) -> None:
        self.model, self.processor = model, processor
        saved = dict(getattr(model.config, "sampling", None) or model.family.sampling_settings)
        self.task = saved.pop("task", PAINTING_TASK)
        self.saved = _checked(saved)
        self.settings = _checked(settings or {})

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | Path,
        dtype: torch.dtype | str = torch.float32,
        revision: str | None = None,
        **kwargs: Any,
    ) -> UnifiedPipeline:
        """
        Load a model and its processor; arguments and errors as in [`~alphagrpo_ext.models.loading.load_model`].
        """
        model, processor = load_model(model_name_or_path, dtype, revision, **kwargs)
        return cls(model.eval(), processor)

    def to(self, *args: Any, **kwargs: Any) -> UnifiedPipeline:
        """Move the model, as `torch.nn.Module.to` does. Returns the pipeline."""
        self.model.to(*args, **kwargs)
        return self

    def rollout(self, task: str, **settings: Any) -> RolloutConfig:
        """
        How a task is sampled.

        Args:
            task (`str`): Name of the task.
            settings: Settings that replace the defaults.

        Raises:
            `ValueError`: If a setting is unknown or out of range, or if nothing says which size images have.
        """
        own = {**self.settings, **_checked(settings)}
        values = resolve_settings(TASKS.get(task).settings, self.saved, {}, own, is_main_task=task == self.task)
        if "image_height" not in values or "image_width" not in values:
            raise ValueError("this model does not say which size its images have: set image_height and image_width")
        return RolloutConfig.from_settings(TaskSettings(**values))

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Image.Image | Sequence[Image.Image] | None = None,
        *,
        think: bool = True,
        num_rounds: int = 0,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        **settings: Any,
    ) -> PipelineOutput:
        """
        Paint prompts.

        Args:
            prompt (`str` or `Sequence[str]`): One prompt or several.
            image (`PIL.Image.Image` or a sequence of them, *optional*):
                An image per prompt that the policy refines in `num_rounds` rounds, instead of painting a first one.
            think (`bool`, *optional*, defaults to `True`): Whether the policy writes a thought before the first image.
            num_rounds (`int`, *optional*, defaults to `0`): Rounds in which it reflects on the image and repaints it.
            num_images_per_prompt (`int`, *optional*, defaults to `1`): Images of each prompt, which follow each other.
            seed (`int`, *optional*, defaults to `0`): Seed of all noise.
            settings: Settings of sampling that replace the defaults; names as in [`TaskSettings`], e.g. `num_timesteps=20`.

        Raises:
            `ValueError`: If a setting is unknown or out of range, or if images are given and do not match the prompts.
        """
        configs = {task: self.rollout(task, **settings) for task in (PAINTING_TASK, REFLECTION_TASK)}
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, but is {num_images_per_prompt}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        rows: list[dict[str, Any]] = [{"prompt": text} for text in prompts]
        if image is not None:
            images = [image] if isinstance(image, Image.Image) else list(image)
            if len(images) != len(rows):
                raise ValueError(f"{len(images)} images are given for {len(rows)} prompts")
            if num_rounds < 1:
                raise ValueError("a given image is refined: set num_rounds to at least 1")
            rows = [{**row, "image": given} for row, given in zip(rows, images, strict=True)]
        refinements = refine(
            self.model,
            self.processor,
            [row for row in rows for _ in range(num_images_per_prompt)],
            configs,
            num_rounds=num_rounds,
            think=think,
            seed=seed,
        )
        last = [refinement.steps[-1] for refinement in refinements]
        return PipelineOutput([step.image for step in last], [step.text for step in last], refinements)


def pipeline(model: str | Path, **kwargs: Any) -> UnifiedPipeline:
    """
    A pipeline for a name, a folder or an id on the Hub; see [`UnifiedPipeline.from_pretrained`].

    Example:

    ```python
    >>> import alphagrpo_ext

    >>> pipe = alphagrpo_ext.pipeline("bagel-shapes")
    >>> pipe("a red circle on a white background").images[0].size
    (24, 24)
    ```
    """
    return UnifiedPipeline.from_pretrained(model, **kwargs)


def _checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [name for name in settings if name not in SETTING_NAMES]
    if unknown:
        raise ValueError(f"unknown settings of sampling: {', '.join(unknown)}; known are {', '.join(SETTING_NAMES)}")
    return dict(settings)
