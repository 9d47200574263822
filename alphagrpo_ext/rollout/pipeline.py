# SPDX-License-Identifier: Apache-2.0

"""
Painting with a policy in a few lines: `alphagrpo_ext.pipeline("bagel-shapes")("a red circle").images[0]`.

The settings of sampling (size, steps, guidance, texts) are those that the checkpoint was trained with. The trainer
writes those of its evaluations, with the name of their task, as `sampling` into the model's configuration. A model without
them has the family's. Another task keeps what it declares itself, as in training.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from alphagrpo_ext.models.adapters import save_adapter
from alphagrpo_ext.models.attention.choice import choose_attention
from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.models.saving import save_model
from alphagrpo_ext.rollout.config import RolloutConfig
from alphagrpo_ext.rollout.pipeline_inputs import as_images, as_prompts, refuse_unknown_names, whole_number
from alphagrpo_ext.rollout.readable_prompts import unknown_words, unknown_words_warning
from alphagrpo_ext.rollout.refinement import Refinement, refine
from alphagrpo_ext.rollout.settings import SETTING_NAMES, TaskSettings, check_setting, resolve_settings
from alphagrpo_ext.rollout.stopping import STOP_THRESHOLD
from alphagrpo_ext.rollout.task import PAINTING_TASK, REFLECTION_TASK, TASKS


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PipelineOutput:
    """
    What a pipeline painted.

    Args:
        images (`list[PIL.Image.Image]`): The last image of each prompt.
        texts (`list[str]`):
            What the policy wrote right before that image: after rounds its last reflection, otherwise its thought, which is empty
            without one.
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
    >>> output = pipe("a red circle on a white background", cfg_text_scale=4.0, seed=0)
    >>> output.images[0].save("circle.png")
    ```
    """

    def __init__(
        self, model: UnifiedModel, processor: ProcessorMixin, settings: Mapping[str, Any] | None = None
    ) -> None:
        self.model, self.processor = model, processor
        saved = dict(getattr(model.config, "sampling", None) or model.family.sampling_settings)
        self.task = saved.pop("task", PAINTING_TASK)
        self.stop_threshold = saved.pop(STOP_THRESHOLD, None)
        self.saved = _checked(saved)
        self.settings = _checked(settings or {})
        self._words_warned_of: set[str] = set()
        self._chosen_attention: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | Path,
        dtype: torch.dtype | str = torch.float32,
        revision: str | None = None,
        *,
        attn_implementation: str | None = None,
        settings: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> UnifiedPipeline:
        """
        Load a model and its processor. Where a model's family takes further options, pass what
        [`~alphagrpo_ext.models.loading.load_model`] returns to the class itself.

        Args:
            model_name_or_path (`str` or `Path`): As in [`~alphagrpo_ext.models.loading.load_model`].
            dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`): Data type of the weights, e.g. `"bfloat16"`.
            revision (`str`, *optional*): Branch, tag or commit of a repository on the Hub.
            attn_implementation (`str`, *optional*):
                Implementation of attention, as in Transformers. Without one the pipeline chooses it for its device, and again in
                [`~UnifiedPipeline.to`]; see [`~alphagrpo_ext.models.attention.choice.choose_attention`].
            settings (`Mapping[str, Any]`, *optional*): As in the class.
            unknown: Refused, with the name that was probably meant.

        Raises:
            `FileNotFoundError`, `ValueError`: As [`~alphagrpo_ext.models.loading.load_model`], and if an argument is unknown.
        """
        for name in unknown:
            if name in SETTING_NAMES:
                raise ValueError(
                    f"{name} is an argument of the call, pipe(prompt, {name}=...); for all calls give "
                    f"settings={{{name!r}: ...}}"
                )
        refuse_unknown_names(unknown, ("dtype", "revision", "attn_implementation", "settings"))
        options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        model, processor = load_model(model_name_or_path, dtype, revision, **options)
        pipe = cls(model.eval(), processor, settings)
        if attn_implementation is None:
            pipe._choose_attention()
        return pipe

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    def to(self, *args: Any, **kwargs: Any) -> UnifiedPipeline:
        """Move the model, as `torch.nn.Module.to` does. Returns the pipeline."""
        self.model.to(*args, **kwargs)
        # Unless the user has chosen one, or set another one since.
        if self._chosen_attention is not None and self._chosen_attention == self.model.config._attn_implementation:
            self._choose_attention()
        return self

    def _choose_attention(self) -> None:
        self._chosen_attention = choose_attention(self.model.family, self.device.type).name
        self.model.set_attn_implementation(self._chosen_attention)

    def save_pretrained(self, folder: str | Path) -> None:
        """
        Write model and processor, for [`~UnifiedPipeline.from_pretrained`]; of an adapted model the adapter alone. The folder
        appears complete or not at all.

        Args:
            folder (`str` or `Path`): The folder to write, which must be empty or not exist.

        Raises:
            `FileExistsError`, `OSError`, `FloatingPointError`: As [`~alphagrpo_ext.models.saving.save_model`].
        """
        if isinstance(self.model, PeftModel):
            save_adapter(self.model, folder)
        else:
            save_model(self.model, self.processor, folder)

    def __repr__(self) -> str:
        weights = next(self.model.parameters())
        millions = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        dtype = str(weights.dtype).removeprefix("torch.")
        lines = [
            f"{type(self).__name__}(",
            f"  {type(self.model).__name__} of {self.model.config._name_or_path}: {millions:.1f} M parameters, {dtype}, "
            f"{weights.device}",
            f"  trained for {self.task}; defaults: {_listed(self.saved)}",
        ]
        return "\n".join([*lines, *([f"  settings: {_listed(self.settings)}"] if self.settings else []), ")"])

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
        prompt: str | Sequence[Any],
        image: Image.Image | str | Path | Sequence[Image.Image | str | Path] | None = None,
        *,
        think: bool = True,
        num_rounds: int = 0,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        allow_stop: bool = False,
        stop_threshold: float | None = None,
        **settings: Any,
    ) -> PipelineOutput:
        """
        Paint prompts.

        Args:
            prompt (`str`, `list[dict]`, or a sequence of them):
                One prompt or several. A prompt is a text, or a conversation that ends with the user's message.
            image (`PIL.Image.Image`, `str` or `Path`, or a list of them, *optional*):
                An image per prompt, or the path of one, that the policy refines in `num_rounds` rounds, instead of painting a
                first one. The prompt says what the image shall show; it is no instruction to edit.
            think (`bool`, *optional*, defaults to `True`): Whether the policy writes a thought before the first image.
            num_rounds (`int`, *optional*, defaults to `0`): Rounds in which it reflects on the image and repaints it.
            num_images_per_prompt (`int`, *optional*, defaults to `1`): Images of each prompt, which follow each other.
            seed (`int`, *optional*, defaults to `0`): Seed of all noise. Each image of a call has noise of its own.
            allow_stop (`bool`, *optional*, defaults to `False`): Whether a round may keep the image that it looks at.
            stop_threshold (`float`, *optional*):
                Probability of that verdict from which an image is kept, in [0, 1]. By default the one that the model's
                configuration keeps; without any, the words of the reflection decide.
            settings: Settings of sampling that replace the defaults; names as in [`TaskSettings`], e.g. `num_timesteps=20`.

        Raises:
            `ValueError`: If an argument is unknown, of another kind or out of range, or if images do not match the prompts.
        """
        refuse_unknown_names(settings, _CALL_NAMES)
        configs = {task: self.rollout(task, **settings) for task in (PAINTING_TASK, REFLECTION_TASK)}
        seed = whole_number("seed", seed)
        num_rounds = whole_number("num_rounds", num_rounds, least=0)
        num_images_per_prompt = whole_number("num_images_per_prompt", num_images_per_prompt, least=1)
        prompts = as_prompts(prompt)
        rows: list[dict[str, Any]] = [{"prompt": one} for one in prompts]
        if image is not None:
            images = as_images(image, len(prompts))
            if num_rounds < 1:
                raise ValueError("a given image is refined: set num_rounds to at least 1")
            rows = [{**row, "image": given} for row, given in zip(rows, images, strict=True)]
        self._warn_of_unknown_words(prompts)
        refinements = refine(
            self.model,
            self.processor,
            [row for row in rows for _ in range(num_images_per_prompt)],
            configs,
            num_rounds=num_rounds,
            think=think,
            seed=seed,
            allow_stop=allow_stop,
            stop_threshold=self.stop_threshold if allow_stop and stop_threshold is None else stop_threshold,
        )
        last = [refinement.steps[-1] for refinement in refinements]
        return PipelineOutput([step.image for step in last], [step.text for step in last], refinements)

    def _warn_of_unknown_words(self, prompts: Sequence[Any]) -> None:
        """Warn of each word once."""
        words = [word for word in unknown_words(prompts, self.processor) if word not in self._words_warned_of]
        if words:
            self._words_warned_of.update(words)
            logger.warning(unknown_words_warning(words, self.processor))


_CALL_NAMES = (
    *(
        name
        for name, parameter in inspect.signature(UnifiedPipeline.__call__).parameters.items()
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD
    ),
    *SETTING_NAMES,
)
"""Names of all arguments of a call."""


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
    refuse_unknown_names(settings, SETTING_NAMES)
    # `None` leaves a setting to the run.
    return {name: check_setting(value, name, name) for name, value in settings.items() if value is not None}


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items()) or "none"
