# SPDX-License-Identifier: Apache-2.0

"""The policy as a painter: a unified model in this process."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator, Task
from alphagrpo_ext.rollout.generator import sample_generator
from alphagrpo_ext.rollout.settings import TaskSettings, read_task_settings, resolve_settings
from alphagrpo_ext.rollout.task import PAINTING_TASK, REFLECTION_TASK
from alphagrpo_ext.trajectory import Segment, TextSegment
from reward_models.painters.base import PAINTERS, ImageRequest, Painter, PainterArguments, UnpaintableError


_TASKS = (PAINTING_TASK, REFLECTION_TASK)


@PAINTERS.register("policy")
class PolicyPainter(Painter):
    """
    Paints with a unified model, as the policy paints after it has written the given thought: the context of the full branch
    holds the thought between its delimiters, and guidance drops the same parts of the context as in a rollout. A request with
    an image is a row of the task `"self_reflection"`, with the guidance of that task.

    A thought is given as text, so its token ids are those of the tokenizer, which may differ from the sampled ones. An image
    depends on its request and seed alone, up to rounding: other requests in the batch may change a pixel by one level.

    The model runs in one thread of its own. A cancelled call stops after the current batch.

    Args:
        model ([`UnifiedModel`]): The model, in evaluation mode.
        processor (`UnifiedProcessor`): Its processor.
        config ([`RolloutConfig`] or `Mapping[str, RolloutConfig]`):
            Image size, denoising and batch size of all requests, or of those of the tasks `"reasoning_t2i"` and
            `"self_reflection"`.

    Raises:
        `ValueError`: If the model cannot paint the size.
    """

    def __init__(
        self,
        model: UnifiedModel,
        processor: UnifiedProcessor,
        config: RolloutConfig | Mapping[str, RolloutConfig],
    ) -> None:
        self.configs = {name: config if isinstance(config, RolloutConfig) else config[name] for name in _TASKS}
        for own in self.configs.values():
            own.grid(model)
        self.policy = (model, processor)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy-painter")

    @classmethod
    def from_arguments(cls, args: PainterArguments) -> PolicyPainter:
        if args.painter_batch_size < 1:
            raise ValueError(f"painter_batch_size must be at least 1, but is {args.painter_batch_size}")
        # The thought is given, so its length and its sampling have no effect.
        given = TaskSettings(
            cfg_text_scale=args.cfg_text_scale,
            cfg_img_scale=args.cfg_img_scale,
            cfg_interval=args.cfg_interval,
            cfg_renorm_type=args.cfg_renorm_type,
            num_timesteps=args.num_timesteps,
            timestep_shift=args.timestep_shift,
            image_height=args.image_height,
            image_width=args.image_width,
        ).given()
        overrides = read_task_settings(args.task_settings, TASKS)
        configs = {}
        for name in _TASKS:
            own = resolve_settings(TASKS.get(name).settings, given, {}, overrides.get(name, {}))
            configs[name] = RolloutConfig.from_settings(TaskSettings(**own), args.painter_batch_size)
        model, processor = load_model(args.painter_model, dtype=args.painter_dtype)
        model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu").eval()
        return cls(model, processor, configs)

    async def paint(self, requests: Sequence[ImageRequest]) -> list[Image.Image]:
        abandoned = threading.Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._worker, self._paint, list(requests), abandoned
            )
        finally:
            # A thread cannot be cancelled. This one checks the event between two batches.
            abandoned.set()

    async def aclose(self) -> None:
        await asyncio.to_thread(self._worker.shutdown, cancel_futures=True)

    def _paint(self, requests: list[ImageRequest], abandoned: threading.Event) -> list[Image.Image]:
        model, processor = self.policy
        tasks, rows, configs = self._tasks_and_rows(requests)
        generators = [
            sample_generator(secrets.randbits(63) if request.seed is None else request.seed, 0, 0)
            for request in requests
        ]
        images: list[Image.Image] = []
        for part in RolloutGenerator(model, processor, tasks).parts(rows, generators, configs):
            images += [trajectory.final_image for trajectory in part]
            if abandoned.is_set():
                break
        return images

    def _tasks_and_rows(
        self, requests: list[ImageRequest]
    ) -> tuple[dict[str, GivenThought], list[dict[str, Any]], dict[str, RolloutConfig]]:
        """Tasks by name, one dataset row per request that names its task, and how to sample each task."""
        model, processor = self.policy
        tasks: dict[str, GivenThought] = {}
        rows, configs = [], {}
        for index, request in enumerate(requests):
            kind = PAINTING_TASK if request.image is None else REFLECTION_TASK
            # Rows with the same task, prompt and image share a prefix, so the thought is part of the task's name.
            name = f"{kind} {request.thought!r}"
            task = tasks.setdefault(name, GivenThought(TASKS.get(kind)(request.thought is not None), request.thought))
            configs[name] = self.configs[kind]
            row = {"prompt": request.prompt, "image": request.image, "task": name}
            num_positions = task.max_positions(row, processor, model, configs[name])
            if num_positions > model.max_positions:
                raise UnpaintableError(
                    f"request {index}: prompt, thought and images take up to {num_positions} positions, more than the "
                    f"{model.max_positions} of the model: shorten the thought"
                )
            rows.append(row)
        return tasks, rows, configs


class GivenThought(Task):
    """
    A task whose thought is given instead of sampled.

    Args:
        task ([`Task`]): The task, with `think` set if there is a thought.
        thought (`str`, *optional*): The thought.
    """

    def __init__(self, task: Task, thought: str | None) -> None:
        # The generator has no thought to sample, so this task does not think.
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
        # As after sampling, only the full branch holds the thought.
        return [*context, TextSegment(processor.text_segment(self.thought).token_ids, role="assistant")]

    def request(self, row: Mapping[str, Any], processor: UnifiedProcessor, size: tuple[int, int]) -> TextSegment:
        return self.task.request(row, processor, size)

    def max_positions(
        self, row: Mapping[str, Any], processor: UnifiedProcessor, model: UnifiedModel, config: RolloutConfig
    ) -> int:
        num_tokens = len(processor.text_segment(self.thought).token_ids) if self.thought else 0
        return self.task.max_positions(row, processor, model, replace(config, max_new_tokens=num_tokens))
