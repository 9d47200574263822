# SPDX-License-Identifier: Apache-2.0

"""Painters: from prompts and thoughts to images. Their contract, their arguments, and the policy as a painter."""

from __future__ import annotations

import asyncio
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from transformers.processing_utils import ProcessorMixin

from alphagrpo_ext.flow import GuidanceConfig
from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.registry import Registry
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator, Task
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.rollout.generator import sample_generator
from alphagrpo_ext.trajectory import Segment, TextSegment


PAINTERS = Registry(
    "painter",
    "alphagrpo_ext.painters",
    {
        "openai": "reward_models.painters.openai:OpenAIPainter",
        "policy": "reward_models.painters.policy:PolicyPainter",
    },
)

DEFAULT_PAINTER_MODEL = "bagel-shapes"


@dataclass(frozen=True)
class PaintRequest:
    """
    What is to be painted.

    Args:
        prompt (`str`):
            The request of the user.
        thought (`str`, *optional*):
            What was written before the image: a plan, or with `image` the reflection on it. `None` paints without one; an
            empty thought is a thought.
        image (`PIL.Image.Image`, *optional*):
            An image in RGB to refine. `None` paints anew.
        seed (`int`, *optional*):
            Of the noise. `None` draws one.
    """

    prompt: str
    thought: str | None = None
    image: Image.Image | None = None
    seed: int | None = None


class UnpaintableError(ValueError):
    """Raised for a request that cannot be painted as it is, however often it is tried."""


class PaintError(RuntimeError):
    """Raised when a painter failed; another try may succeed."""


@dataclass
class PainterArguments:
    """
    Who paints, and how. The defaults suit the packaged model; for a large one set size, steps and guidance. Keys of endpoints
    come from the environment alone.

    Args:
        painter (`str`, *optional*, defaults to `"none"`):
            Who paints: `"none"`, `"policy"`, `"openai"`, or a painter that another package registers.
        painter_model (`str`, *optional*, defaults to `"bagel-shapes"`):
            Name or folder of the policy, or name of the model at the endpoint.
        painter_dtype (`str`, *optional*, defaults to `"float32"`):
            Of the policy's weights.
        painter_batch_size (`int`, *optional*, defaults to `16`):
            Images that the policy paints at once.
        painter_base_url (`str`, *optional*):
            OpenAI-compatible endpoint of the painter `"openai"`.
        painter_max_concurrency (`int`, *optional*, defaults to `16`):
            Images that are with the endpoint at once.
        painter_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds for one try of an image at the endpoint.
        painter_max_retries (`int`, *optional*, defaults to `2`):
            Further tries of an image at the endpoint.
        image_height, image_width (`int`, *optional*, defaults to `24`):
            Size of painted images, in pixels.
        num_timesteps (`int`, *optional*, defaults to `11`):
            Points of the policy's denoising schedule.
        timestep_shift (`float`, *optional*, defaults to `1.0`):
            Shift of the schedule towards noise.
        cfg_text_scale, cfg_img_scale (`float`, *optional*, defaults to `1.0`):
            Guidance scales of text and images; at most 1 is off.
        cfg_interval (`list[float]`, *optional*, defaults to `[0.4, 1.0]`):
            Half-open interval of guided times.
        cfg_renorm_type (`str`, *optional*, defaults to `"global"`):
            `"global"`, `"channel"` or `"text_channel"`.
    """

    painter: str = field(
        default="none", metadata={"help": "Who paints: 'none', 'policy', 'openai' or a registered one."}
    )
    painter_model: str = field(
        default=DEFAULT_PAINTER_MODEL,
        metadata={"help": "Name or folder of the policy, or name of the model at the endpoint."},
    )
    painter_dtype: str = field(default="float32", metadata={"help": "Of the policy's weights."})
    painter_batch_size: int = field(default=16, metadata={"help": "Images that the policy paints at once."})
    painter_base_url: str | None = field(
        default=None,
        metadata={"help": "OpenAI-compatible endpoint of the painter 'openai', e.g. http://localhost:8000/v1."},
    )
    painter_max_concurrency: int = field(default=16, metadata={"help": "Images that are with the endpoint at once."})
    painter_timeout: float = field(default=120.0, metadata={"help": "Seconds for one try at the endpoint."})
    painter_max_retries: int = field(default=2, metadata={"help": "Further tries of an image at the endpoint."})
    image_height: int = field(default=24, metadata={"help": "Height of painted images, in pixels."})
    image_width: int = field(default=24, metadata={"help": "Width of painted images, in pixels."})
    num_timesteps: int = field(default=11, metadata={"help": "Points of the denoising schedule."})
    timestep_shift: float = field(default=1.0, metadata={"help": "Shift of the schedule towards noise."})
    cfg_text_scale: float = field(default=1.0, metadata={"help": "Guidance scale of text; at most 1 is off."})
    cfg_img_scale: float = field(default=1.0, metadata={"help": "Guidance scale of images; at most 1 is off."})
    cfg_interval: list[float] = field(
        default_factory=lambda: [0.4, 1.0], metadata={"help": "Half-open interval of guided times."}
    )
    cfg_renorm_type: str = field(default="global", metadata={"help": "'global', 'channel' or 'text_channel'."})

    def make_painter(self) -> Painter | None:
        """
        The painter; `None` for `"none"`.

        Raises:
            `ValueError`: If there is no such painter, or an argument is out of range.
        """
        return None if self.painter == "none" else PAINTERS.get(self.painter).from_arguments(self)


class Painter(ABC):
    """
    Paints images. Register one with `@PAINTERS.register("name")`.

    A painter is called from one event loop, for several requests of a server at once. It must not block that loop.
    """

    max_calls: int = 1
    """How many calls of [`paint`] are of use at once; further ones wait, and hold no decoded images meanwhile."""

    policy: tuple[UnifiedModel, ProcessorMixin] | None = None
    """The model that paints and its processor, where they are in this process: a judge may ask them too."""

    @classmethod
    @abstractmethod
    def from_arguments(cls, args: PainterArguments) -> Painter:
        """
        Build the painter.

        Args:
            args ([`PainterArguments`]): The arguments.

        Raises:
            `ValueError`: If something is missing or out of range; the message names the argument.
        """

    @abstractmethod
    async def paint(self, requests: Sequence[PaintRequest]) -> list[Image.Image]:
        """
        Paint one image a request, in RGB.

        Raises:
            [`UnpaintableError`]: If a request cannot be painted as it is; the message names it by its index.
            [`PaintError`]: If the painter failed.
        """

    async def aclose(self) -> None:
        """Release what the painter holds, e.g. threads and connections. The default does nothing."""
        return


@PAINTERS.register("policy")
class PolicyPainter(Painter):
    """
    Paints with a unified model, as the policy itself paints after it has written the given thought: the thought stands in
    the context of the full branch, between its delimiters, and guidance drops what it drops in a rollout. With an image
    the request is that of the task `"self_reflection"`.

    A thought comes as text, so its ids are those of the tokenizer, which need not be those that were sampled. An image
    depends on its request and seed alone, but for rounding: other requests in the same batch may move a pixel by one.

    The model runs in one thread of its own. A call that is cancelled ends after the batch that is being painted.

    Args:
        model ([`UnifiedModel`]): The model, in evaluation mode.
        processor (`ProcessorMixin`): Its processor.
        config ([`RolloutConfig`]): Size, denoising and batch size.

    Raises:
        `ValueError`: If the model cannot paint the size.
    """

    def __init__(self, model: UnifiedModel, processor: ProcessorMixin, config: RolloutConfig) -> None:
        config.grid(model)
        self.policy = (model, processor)
        self.config = config
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy-painter")

    @classmethod
    def from_arguments(cls, args: PainterArguments) -> PolicyPainter:
        guidance = GuidanceConfig(
            args.cfg_text_scale, args.cfg_img_scale, tuple(args.cfg_interval), args.cfg_renorm_type
        )
        if args.painter_batch_size < 1:
            raise ValueError(f"painter_batch_size must be at least 1, but is {args.painter_batch_size}")
        config = RolloutConfig(
            args.image_height,
            args.image_width,
            denoising=DenoisingConfig(args.num_timesteps, args.timestep_shift, guidance),
            batch_size=args.painter_batch_size,
        )
        model, processor = load_model(args.painter_model, dtype=args.painter_dtype)
        model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu").eval()
        return cls(model, processor, config)

    async def paint(self, requests: Sequence[PaintRequest]) -> list[Image.Image]:
        abandoned = threading.Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._worker, self._paint, list(requests), abandoned
            )
        finally:
            # A thread cannot be cancelled; this one looks between two batches whether anybody still waits for it.
            abandoned.set()

    async def aclose(self) -> None:
        await asyncio.to_thread(self._worker.shutdown, cancel_futures=True)

    def _paint(self, requests: list[PaintRequest], abandoned: threading.Event) -> list[Image.Image]:
        model, processor = self.policy
        tasks: dict[str, GivenThought] = {}
        rows = []
        for index, request in enumerate(requests):
            kind = "reasoning_t2i" if request.image is None else "self_reflection"
            # Rows of one name, prompt and image share a prefix, so the thought is part of the name.
            name = f"{kind} {request.thought!r}"
            task = tasks.setdefault(name, GivenThought(TASKS.get(kind)(request.thought is not None), request.thought))
            row = {"prompt": request.prompt, "image": request.image, "task": name}
            num_positions = task.max_positions(row, processor, model, self.config)
            if num_positions > model.max_positions:
                raise UnpaintableError(
                    f"request {index}: prompt, thought and images take up to {num_positions} positions, more than the "
                    f"{model.max_positions} of the model: shorten the thought"
                )
            rows.append(row)
        generators = [
            sample_generator(secrets.randbits(63) if request.seed is None else request.seed, 0, 0)
            for request in requests
        ]
        images: list[Image.Image] = []
        for part in RolloutGenerator(model, processor, tasks).parts(rows, generators, self.config):
            images += [trajectory.final_image for trajectory in part]
            if abandoned.is_set():
                break
        return images


class GivenThought(Task):
    """
    A task whose thought is given instead of sampled.

    Args:
        task ([`Task`]): The task; it thinks if there is a thought.
        thought (`str`, *optional*): The thought.
    """

    def __init__(self, task: Task, thought: str | None) -> None:
        # For the generator it does not think: there is nothing left to write.
        super().__init__(think=False)
        self.task = task
        self.thought = thought
        self.needs_image = task.needs_image

    def context(
        self, row: Mapping[str, Any], processor: UnifiedProcessor, model: UnifiedModel, size: tuple[int, int]
    ) -> list[Segment]:
        context = self.task.context(row, processor, model, size)
        if self.thought is None:
            return context
        # As after sampling, when only the full branch has read the thought.
        return [*context, TextSegment(processor.text_segment(self.thought).token_ids, role="assistant")]

    def request(self, row: Mapping[str, Any], processor: UnifiedProcessor, size: tuple[int, int]) -> TextSegment:
        return self.task.request(row, processor, size)

    def max_positions(
        self, row: Mapping[str, Any], processor: UnifiedProcessor, model: UnifiedModel, config: RolloutConfig
    ) -> int:
        num_tokens = len(processor.text_segment(self.thought).token_ids) if self.thought else 0
        return self.task.max_positions(row, processor, model, replace(config, max_new_tokens=num_tokens))
