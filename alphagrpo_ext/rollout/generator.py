# SPDX-License-Identifier: Apache-2.0

"""The multimodal rollout generator: from dataset rows to trajectories, with the current policy."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from transformers.processing_utils import ProcessorMixin

from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.models.pixels import tensor_to_image
from alphagrpo_ext.rollout.denoising import DenoisingConfig, denoise
from alphagrpo_ext.rollout.noised_copies import forward_windows
from alphagrpo_ext.rollout.task import Task, TaskContexts
from alphagrpo_ext.trajectory import ImageSegment, TextSegment, Trajectory


@dataclass(frozen=True)
class RolloutConfig:
    """
    How trajectories are sampled.

    Args:
        height, width (`int`):
            Size of painted images, in pixels.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Longest thought, in tokens.
        temperature, top_k, top_p (`float`, `int`, `float`, *optional*, defaults to `1.0`, `0`, `1.0`):
            Sampling of thoughts; a temperature of 0 takes the likeliest token.
        denoising ([`DenoisingConfig`], *optional*):
            Schedule, guidance and stochastic window of images.
        batch_size (`int`, *optional*):
            Samples that are generated at once, rounded to whole groups. `None` takes all.
        branches_per_thought (`int`, *optional*, defaults to `1`):
            Consecutive samples of a group that share, in their first turn, the thought, the initial noise and the path up to
            the stochastic window, the noise of which then tells them apart. They have those of the first among them.
    """

    height: int
    width: int
    max_new_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)
    batch_size: int | None = None
    branches_per_thought: int = 1

    def __post_init__(self) -> None:
        if self.branches_per_thought < 1:
            raise ValueError(f"branches_per_thought must be at least 1, but is {self.branches_per_thought}")
        if self.branches_per_thought > 1 and not (
            self.denoising.window_start is not None and self.denoising.window_size
        ):
            raise ValueError(
                f"branches_per_thought={self.branches_per_thought} needs a stochastic window: without one, images that share "
                f"thought and initial noise are the same"
            )

    def deterministic(self) -> RolloutConfig:
        """The same without a stochastic window, and so without branches."""
        return replace(self, denoising=self.denoising.without_window(), branches_per_thought=1)

    def grid(self, model: UnifiedModel) -> tuple[int, int]:
        """
        Rows and columns of latent tokens.

        Raises:
            `ValueError`: If the model cannot paint this size.
        """
        for name, side in (("height", self.height), ("width", self.width)):
            if side <= 0 or side % model.latent_downsample:
                raise ValueError(
                    f"{name}={side} is no positive multiple of the model's {model.latent_downsample} pixels"
                )
        grid = (self.height // model.latent_downsample, self.width // model.latent_downsample)
        if max(grid) > model.max_latent_size:
            raise ValueError(
                f"an image of {self.height} x {self.width} pixels has {grid[0]} x {grid[1]} latent tokens, more than "
                f"the model's {model.max_latent_size} a side"
            )
        return grid


def sample_generator(seed: int | str, step: int, index: int) -> torch.Generator:
    """
    Source of all randomness of one sample: the same in whatever batch, on whatever rank it is generated.

    Args:
        seed (`int` or `str`): Seed of the run.
        step (`int`): Index of the rollout batch.
        index (`int`): Index of the sample in the global rollout batch.
    """
    return torch.Generator().manual_seed(random.Random(f"{seed}-{step}-{index}").getrandbits(63))


def image_key(image: Image.Image | None) -> str | None:
    """Equal for images with equal pixels, wherever they were decoded."""
    if image is None:
        return None
    return f"{image.mode}-{image.size}-{hashlib.sha256(image.tobytes()).hexdigest()}"


def same_context(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Rows with this key in common, one after the other, are a group: same task, same prompt, same image."""
    return repr(row.get("task")), repr(row["prompt"]), repr(image_key(row.get("image")))


def _runs(rows: Sequence[Mapping[str, Any]]) -> list[range]:
    """Runs of consecutive rows that share their context."""
    runs, start = [], 0
    for _, run in groupby(rows, key=same_context):
        length = len(list(run))
        runs.append(range(start, start + length))
        start += length
    return runs


class RolloutGenerator:
    """
    Samples trajectories.

    A context is prefilled once a group and shared by it; guidance branches run as one batch; a thought that was
    sampled stays in the cache and is not read a second time, whether one image follows it or several, or another round.

    Args:
        model ([`UnifiedModel`]): The policy, unwrapped.
        processor (`ProcessorMixin`): Its processor.
        task ([`Task`] or `Mapping[str, Task]`):
            What goes into context: of all rows, or by the name in a row's column `task`.
    """

    def __init__(self, model: UnifiedModel, processor: ProcessorMixin, task: Task | Mapping[str, Task]) -> None:
        self.model = model
        self.processor = processor
        self.task = task

    def task_of(self, row: Mapping[str, Any]) -> Task:
        """The task of a row."""
        return self.task if isinstance(self.task, Task) else self.task[row["task"]]

    def __call__(
        self, rows: Sequence[Mapping[str, Any]], generators: Sequence[torch.Generator], config: RolloutConfig
    ) -> list[Trajectory]:
        """
        Args:
            rows (`Sequence[Mapping[str, Any]]`): Dataset rows, the members of a group one after the other.
            generators (`Sequence[torch.Generator]`): Randomness of every sample; see [`sample_generator`].
            config ([`RolloutConfig`]): How to sample.

        Returns:
            `list[Trajectory]`: One a row.
        """
        return [trajectory for part in self.parts(rows, generators, config) for trajectory in part]

    def parts(
        self, rows: Sequence[Mapping[str, Any]], generators: Sequence[torch.Generator], config: RolloutConfig
    ) -> Iterator[list[Trajectory]]:
        """The same, `config.batch_size` rows at a time, each part as soon as it is there."""
        batch: list[range] = []
        limit = config.batch_size or len(rows)
        for run in _runs(rows):
            if batch and run.stop - batch[0].start > limit:
                yield self._generate(rows, generators, batch, config)
                batch = []
            batch.append(run)
        if batch:
            yield self._generate(rows, generators, batch, config)

    # On the whole part and not on the generator above, whose caller would lose its gradients between two parts.
    @torch.no_grad()
    def _generate(
        self,
        rows: Sequence[Mapping[str, Any]],
        generators: Sequence[torch.Generator],
        runs: Sequence[range],
        config: RolloutConfig,
    ) -> list[Trajectory]:
        # Groups of one size share a prefix by a plain reshape, so unequal runs are cut into equal parts.
        group_size = math.gcd(*(len(run) for run in runs))
        if group_size % config.branches_per_thought:
            raise ValueError(
                f"branches_per_thought={config.branches_per_thought} does not divide the samples of every prompt, of which "
                f"there are {', '.join(str(len(run)) for run in runs)}"
            )
        contexts: list[TaskContexts] = []
        for run in runs:
            context = self.task_of(rows[run.start]).contexts(rows[run.start], self.processor, self.model)
            contexts += [context] * (len(run) // group_size)
        members = range(runs[0].start, runs[-1].stop)
        think = self.task_of(rows[members.start]).think
        segments = {i: list(contexts[(i - members.start) // group_size].full) for i in members}
        acting, turn, cache = list(members), 0, None
        while acting:
            sampled, cache = self._turn(contexts, group_size, [generators[i] for i in acting], think, config, cache)
            turn += 1
            next_acting, next_contexts = [], []
            for place, (i, new) in enumerate(zip(acting, sampled, strict=True)):
                segments[i] += new
                task = self.task_of(rows[i])
                if turn == task.num_turns:
                    continue
                request = task.request(rows[i], self.processor)
                new[-1].pixel_values = self.processor.vit_pixels(self.processor.resize_image(new[-1].image))
                segments[i].append(request)
                next_acting.append(i)
                next_contexts.append(contexts[place // group_size].after_turn(new, request))
            # From now on every sample has a history of its own.
            acting, contexts, group_size = next_acting, next_contexts, 1
            config = replace(config, branches_per_thought=1)
        return [Trajectory(segments[i]) for i in members]

    def _turn(
        self,
        contexts: Sequence[TaskContexts],
        group_size: int,
        generators: Sequence[torch.Generator],
        think: bool,
        config: RolloutConfig,
        past: Any | None,
    ) -> tuple[list[list[TextSegment | ImageSegment]], Any]:
        """What each sample writes, if it thinks, and paints, given its group's context; and the cache in which that stands."""
        model, forks = self.model, config.branches_per_thought
        grid = config.grid(model)
        branches = config.denoising.branches
        cache = model.prefill(
            [context.branch(name) for name in branches for context in contexts],
            group_size=group_size // forks,
            capacity=(config.max_new_tokens + 2 if think else 0) + model.image_slots(grid),
            past=past,
        )
        texts: list[TextSegment] = []
        if think:
            uniforms = torch.stack([torch.rand(config.max_new_tokens, generator=g) for g in generators])
            sampled = model.sample_text(
                cache, uniforms[::forks], temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
            )
            texts = [
                TextSegment(list(ids), sampled=True, ended=ended, log_probs=list(log_probs))
                for ids, ended, log_probs in zip(sampled.token_ids, sampled.ended, sampled.log_probs, strict=True)
                for _ in range(forks)
            ]
        images = self._paint(cache, grid, generators, config)
        for i, image in enumerate(images):
            context = contexts[i // group_size]
            image.guidance_contexts = {name: context.branch(name) for name in branches[1:]}
        return [[*texts[i : i + 1], image] for i, image in enumerate(images)], cache

    def _paint(
        self, cache: Any, grid: tuple[int, int], generators: Sequence[torch.Generator], config: RolloutConfig
    ) -> list[ImageSegment]:
        model, denoising = self.model, config.denoising
        num_tokens, channels = grid[0] * grid[1], model.latent_channels
        window_size = len(denoising.forward_times) if denoising.window_start is None else denoising.window_size
        noise = torch.stack([torch.randn(1 + window_size, num_tokens, channels, generator=g) for g in generators]).to(
            model.device
        )
        # Branches draw initial noise that they do not use, so that their transitions have the same noise without sharing.
        initial_noise = noise[:: config.branches_per_thought, 0]
        latents, windows = denoise(model, cache, initial_noise, grid, denoising, noise[:, 1:])
        if denoising.forward_times:
            windows = forward_windows(latents, noise[:, 1:], denoising.forward_times)
        pixels = model.decode_latents(latents, grid)
        return [
            ImageSegment(latents[i].cpu(), grid, image=tensor_to_image(pixels[i]), sampled=True, window=windows[i])
            for i in range(len(generators))
        ]
