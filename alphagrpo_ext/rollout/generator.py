# SPDX-License-Identifier: Apache-2.0

"""The multimodal rollout generator: from dataset rows to trajectories, with the current policy.

Randomness belongs to the sample. Every text token is drawn with one uniform number, and noise comes from a generator
that is seeded by run, step and index in the global batch. So a sample is the same in any batch, on any rank and at any
group size.

A painted image becomes context as it was painted. Later rounds read the sampled latents themselves, and not those of
the decoded image encoded again. Only a vision tower reads the decoded image.

A task may end a turn, and with it the trajectory, after its text; see [`Task.paints`]. The network is not evaluated for
samples that ended.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from PIL import Image

from alphagrpo_ext.flow.forward_process import forward_windows
from alphagrpo_ext.models.contract import Cache, UnifiedModel, UnifiedProcessor
from alphagrpo_ext.models.finite import is_finite, names_not_finite
from alphagrpo_ext.models.pixels import image_to_tensor, tensor_to_image
from alphagrpo_ext.rollout.config import RolloutConfig
from alphagrpo_ext.rollout.denoising import denoise
from alphagrpo_ext.rollout.merged_adapters import merged_adapters
from alphagrpo_ext.rollout.readable_prompts import check_prompt_room
from alphagrpo_ext.rollout.task import Task, prompt_text
from alphagrpo_ext.trajectory import ImageSegment, Segment, TextSegment, Trajectory


def sample_generator(seed: int | str, step: int, index: int) -> torch.Generator:
    """
    Source of all randomness of one sample. It does not depend on the batch or the rank that the sample is generated
    in.

    Args:
        seed (`int` or `str`): Seed of the run.
        step (`int`): Index of the rollout batch.
        index (`int`): Index of the sample in the global rollout batch.
    """
    return torch.Generator().manual_seed(random.Random(f"{seed}-{step}-{index}").getrandbits(63))


def image_key(image: Image.Image | None) -> str | None:
    """Hash of an image's pixels, equal for equal images that were decoded separately."""
    if image is None:
        return None
    return f"{image.mode}-{image.size}-{hashlib.sha256(image.tobytes()).hexdigest()}"


def same_context(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Key of a row's group: consecutive rows with equal task, prompt and image are a group."""
    return repr(row.get("task")), repr(row["prompt"]), repr(image_key(row.get("image")))


def _runs(rows: Sequence[Mapping[str, Any]]) -> list[range]:
    """Ranges of consecutive rows that share their context."""
    runs, start = [], 0
    for _, run in groupby(rows, key=same_context):
        length = len(list(run))
        runs.append(range(start, start + length))
        start += length
    return runs


def _row_config(row: Mapping[str, Any], config: RolloutConfig | Mapping[str, RolloutConfig]) -> RolloutConfig:
    return config if isinstance(config, RolloutConfig) else config[row["task"]]


@dataclass
class _Turn:
    """
    Samples that are about to act, in groups of equal size that share a context.

    Args:
        members (`list[int]`): Indices of the rows, group after group.
        contexts (`list[list[Segment]]`): What each group sees.
        group_size (`int`): Samples per context.
        config ([`RolloutConfig`]): How to sample.
        writes (`bool`): Whether the policy writes a text.
        can_paint (`bool`): Whether it may go on to paint.
    """

    members: list[int]
    contexts: list[list[Segment]]
    group_size: int
    config: RolloutConfig
    writes: bool
    can_paint: bool


class RolloutGenerator:
    """
    Samples trajectories.

    A context is prefilled once per group and shared by it, and guidance branches run as one batch. A sampled thought
    stays in the cache: neither the images that follow it nor a later round read it a second time. While the policy samples, its
    adapters are merged or converted once where that is safe; see [`merged_adapters`].

    Args:
        model ([`UnifiedModel`]): The policy, unwrapped.
        processor ([`UnifiedProcessor`]): Its processor.
        task ([`Task`] or `Mapping[str, Task]`):
            The task of all rows, or tasks by the name in a row's column `task`.
    """

    def __init__(self, model: UnifiedModel, processor: UnifiedProcessor, task: Task | Mapping[str, Task]) -> None:
        self.model = model
        self.processor = processor
        self.task = task

    def task_of(self, row: Mapping[str, Any]) -> Task:
        """The task of a row."""
        return self.task if isinstance(self.task, Task) else self.task[row["task"]]

    def __call__(
        self,
        rows: Sequence[Mapping[str, Any]],
        generators: Sequence[torch.Generator],
        config: RolloutConfig | Mapping[str, RolloutConfig],
    ) -> list[Trajectory]:
        """
        Sample one trajectory per row.

        Args:
            rows (`Sequence[Mapping[str, Any]]`): Dataset rows, with the members of a group one after the other.
            generators (`Sequence[torch.Generator]`): Randomness of every sample; see [`sample_generator`].
            config ([`RolloutConfig`] or `Mapping[str, RolloutConfig]`):
                How to sample all rows, or the rows of each task, by the name in a row's column `task`. The batch size
                of the first row's task holds for all.

        Raises:
            `ValueError`: If a row does not fit into the model's context; see [`check_prompt_room`].
        """
        return [trajectory for part in self.parts(rows, generators, config) for trajectory in part]

    def parts(
        self,
        rows: Sequence[Mapping[str, Any]],
        generators: Sequence[torch.Generator],
        config: RolloutConfig | Mapping[str, RolloutConfig],
    ) -> Iterator[list[Trajectory]]:
        """Sample `config.batch_size` rows at a time, and yield each part as soon as it is complete."""
        batch: list[range] = []
        limit = (rows and _row_config(rows[0], config).batch_size) or len(rows)
        for run in _runs(rows):
            row = rows[run.start]
            named = [(f"row {run.start}", row)]
            check_prompt_room(named, self.task_of(row), self.processor, self.model, _row_config(row, config))
            if batch and run.stop - batch[0].start > limit:
                yield self._generate(rows, generators, batch, config)
                batch = []
            batch.append(run)
        if batch:
            yield self._generate(rows, generators, batch, config)

    # The decorator is here and not on the generator above, whose caller would lose its gradients between two parts.
    @torch.no_grad()
    def _generate(
        self,
        rows: Sequence[Mapping[str, Any]],
        generators: Sequence[torch.Generator],
        runs: Sequence[range],
        config: RolloutConfig | Mapping[str, RolloutConfig],
    ) -> list[Trajectory]:
        """Trajectories of the consecutive groups `runs`. Those that are sampled in the same way are one batch."""
        batches: list[tuple[tuple[RolloutConfig, bool, bool], list[range]]] = []
        for run in runs:
            task = self.task_of(rows[run.start])
            row_config = _row_config(rows[run.start], config).effective
            way = (row_config if task.starts_from_image() else row_config.from_noise(), task.writes, task.can_paint)
            alike = next((batch for other, batch in batches if other == way), None)
            if alike is None:
                batches.append((way, [run]))
            else:
                alike.append(run)
        sampled: dict[int, Trajectory] = {}
        with merged_adapters(self.model):
            for (row_config, *_), alike in batches:
                sampled |= self._generate_alike(rows, generators, alike, row_config)
        return [sampled[i] for run in runs for i in run]

    def _generate_alike(
        self,
        rows: Sequence[Mapping[str, Any]],
        generators: Sequence[torch.Generator],
        runs: Sequence[range],
        config: RolloutConfig,
    ) -> dict[int, Trajectory]:
        """Trajectories of groups with one configuration, by the index of their row."""
        turn: _Turn | None = self._first_turn(rows, runs, config)
        members, group_size = turn.members, turn.group_size
        segments = {i: list(turn.contexts[place // group_size]) for place, i in enumerate(members)}
        turn_index, cache = 0, None
        while turn is not None:
            sampled, cache = self._take_turn(turn, rows, [generators[i] for i in turn.members], cache)
            turn_index += 1
            for i, new in zip(turn.members, sampled, strict=True):
                _check_finite(new, rows[i], i, self.model)
                segments[i] += new
            turn = self._next_turn(rows, turn, turn_index, segments)
        num_steps = config.denoising.num_trained_steps
        return {i: Trajectory(segments[i], rows[i].get("task"), num_steps) for i in members}

    def _first_turn(self, rows: Sequence[Mapping[str, Any]], runs: Sequence[range], config: RolloutConfig) -> _Turn:
        # Groups of one size share a prefix by a plain reshape, so unequal runs are cut into equal parts.
        group_size = math.gcd(*(len(run) for run in runs))
        if group_size % config.branches_per_thought:
            raise ValueError(
                f"branches_per_thought={config.branches_per_thought} does not divide the number of samples of every prompt: "
                f"{', '.join(str(len(run)) for run in runs)}"
            )
        contexts: list[list[Segment]] = []
        for run in runs:
            row = rows[run.start]
            context = self.task_of(row).context(row, self.processor, self.model, config.size)
            contexts += [context] * (len(run) // group_size)
        members = [i for run in runs for i in run]
        task = self.task_of(rows[members[0]])
        return _Turn(members, contexts, group_size, config, task.writes, task.can_paint)

    def _next_turn(
        self,
        rows: Sequence[Mapping[str, Any]],
        turn: _Turn,
        turn_index: int,
        segments: Mapping[int, list[Segment]],
    ) -> _Turn | None:
        """
        The turn of the samples that act once more, which are those that painted. Their next request is appended to
        `segments`. `None` if there are none.
        """
        config = replace(turn.config, branches_per_thought=1)
        painted = [i for i in turn.members if isinstance(segments[i][-1], ImageSegment)]
        members = [i for i in painted if self.task_of(rows[i]).num_turns > turn_index]
        for i in members:
            image = segments[i][-1]
            image.pixel_values = self.processor.look(image.image)
            segments[i].append(self.task_of(rows[i]).request(rows[i], self.processor, config.size))
        # From now on every sample has a history of its own.
        contexts = [list(segments[i]) for i in members]
        return _Turn(members, contexts, 1, config, turn.writes, turn.can_paint) if members else None

    def _take_turn(
        self,
        turn: _Turn,
        rows: Sequence[Mapping[str, Any]],
        generators: Sequence[torch.Generator],
        past: Cache | None,
    ) -> tuple[list[list[TextSegment | ImageSegment]], Cache]:
        """
        What each sample does, and the cache that it did it with: a text, if it writes one, and an image, unless the task
        ends the turn after the text.
        """
        model, config = self.model, turn.config
        num_copies, grid = config.branches_per_thought, config.grid(model)
        branches = config.denoising.branches(model.guidance(config.denoising.guidance))
        # Only an image is guided.
        branches = branches if turn.can_paint else branches[:1]
        contexts = {
            name: [self.processor.branch_context(name, context, config.size) for context in turn.contexts]
            for name in branches
        }
        rewrites = turn.writes and self.processor.thought_context == "rewrite"
        image_slots = model.image_slots(grid) if turn.can_paint else 0
        cache = model.prefill(
            [context for name in (branches[:1] if rewrites else branches) for context in contexts[name]],
            group_size=turn.group_size // num_copies,
            capacity=(model.text_slots(config.max_new_tokens) if turn.writes else 0) + image_slots,
            past=past,
        )
        texts = self._write(cache, generators, config) if turn.writes else []
        painting = self._painting(turn, rows, texts)
        canvas = cache
        if rewrites or len(painting) < len(turn.members):
            thoughts = painting[::num_copies]
            each = {name: [own[i // turn.group_size] for i in thoughts] for name, own in contexts.items()}
            thought_texts = [texts[i] for i in thoughts]
            each["full"] = self._after_thoughts(each["full"], thought_texts, config, rewrites)
            needed = [context for own in each.values() for context in own]
            if needed:
                canvas = model.prefill(needed, capacity=image_slots, past=None if rewrites else cache)
                cache = cache if rewrites else canvas
            contexts = each
        sources = self._sources(turn, grid)[painting] if painting and config.denoising.refine_strength < 1 else None
        images = self._paint(canvas, grid, [generators[i] for i in painting], config, sources) if painting else []
        samples_per_context = len(images) // max(len(contexts["full"]), 1)
        for i, image in enumerate(images):
            image.guidance_contexts = {
                name: own[i // samples_per_context] for name, own in contexts.items() if rewrites or name != "full"
            }
        done: list[list[TextSegment | ImageSegment]] = [texts[i : i + 1] for i in range(len(turn.members))]
        for i, image in zip(painting, images, strict=True):
            done[i].append(image)
        return done, cache

    def _painting(self, turn: _Turn, rows: Sequence[Mapping[str, Any]], texts: Sequence[TextSegment]) -> list[int]:
        """Which members go on to paint, as places in the turn. Those that share a thought have the same text."""
        if not texts:
            return list(range(len(turn.members)))
        by_task: dict[int, list[int]] = {}
        for place, i in enumerate(turn.members):
            by_task.setdefault(id(self.task_of(rows[i])), []).append(place)
        painting: list[int] = []
        for places in by_task.values():
            chosen = self.task_of(rows[turn.members[places[0]]]).which_paint(
                [turn.contexts[place // turn.group_size] for place in places],
                [texts[place] for place in places],
                self.processor,
                self.model,
            )
            painting += [place for place, paints in zip(places, chosen, strict=True) if paints]
        return sorted(painting)

    def _after_thoughts(
        self,
        contexts: Sequence[list[Segment]],
        thoughts: Sequence[TextSegment],
        config: RolloutConfig,
        rewrites: bool,
    ) -> list[list[Segment]]:
        """The contexts that images are painted from, one for every thought."""
        return [
            self.processor.painting_context(context, thought, config.size) if rewrites else [*context, thought]
            for context, thought in zip(contexts, thoughts, strict=True)
        ]

    def _write(self, cache: Cache, generators: Sequence[torch.Generator], config: RolloutConfig) -> list[TextSegment]:
        """A thought per sample. Samples that share a thought get copies of it."""
        num_copies = config.branches_per_thought
        uniforms = torch.stack([torch.rand(config.max_new_tokens, generator=g) for g in generators])
        sampled = self.model.sample_text(
            cache, uniforms[::num_copies], temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
        )
        return [
            TextSegment(list(ids), sampled=True, ended=ended, log_probs=list(log_probs))
            for ids, ended, log_probs in zip(sampled.token_ids, sampled.ended, sampled.log_probs, strict=True)
            for _ in range(num_copies)
        ]

    def _sources(self, turn: _Turn, grid: tuple[int, int]) -> torch.Tensor:
        """
        Latents `(samples, tokens, channels)` of the image that each sample looks at, which is the last one in its context.
        An image of another size than the painted one is resized to it.
        """
        latents = []
        for context in turn.contexts:
            looked_at = next(segment for segment in reversed(context) if isinstance(segment, ImageSegment))
            if looked_at.grid == grid:
                latents.append(looked_at.latents)
                continue
            height, width = turn.config.size
            pixels = image_to_tensor(looked_at.image.resize((width, height), Image.Resampling.BICUBIC))
            latents.append(self.model.encode_images(pixels[None].to(self.model.device))[0].cpu())
        return torch.stack(latents).repeat_interleave(turn.group_size, dim=0)

    def _paint(
        self,
        cache: Cache,
        grid: tuple[int, int],
        generators: Sequence[torch.Generator],
        config: RolloutConfig,
        sources: torch.Tensor | None = None,
    ) -> list[ImageSegment]:
        """An image per sample, which starts from the latents `sources` of another where there are any."""
        model, denoising = self.model, config.denoising
        num_tokens, channels = grid[0] * grid[1], model.latent_channels
        num_noises = 1 + denoising.num_trained_steps
        noise = torch.stack([torch.randn(num_noises, num_tokens, channels, generator=g) for g in generators]).to(
            model.device
        )
        # Samples that share a thought draw initial noise that they do not use, so that the noise of their transitions
        # is the same as without sharing.
        initial_noise = noise[:: config.branches_per_thought, 0]
        starts = None if sources is None else sources[:: config.branches_per_thought].to(model.device)
        latents, windows = denoise(model, cache, initial_noise, grid, denoising, noise[:, 1:], starts)
        if denoising.forward_times:
            windows = forward_windows(latents, noise[:, 1:], denoising.forward_times)
        pixels = model.decode_latents(latents, grid)
        if is_finite(latents) and not is_finite(pixels):
            raise FloatingPointError(f"the pixels of decoded images are not finite: {_cause(model)}")
        return [
            ImageSegment(latents[i].cpu(), grid, image=tensor_to_image(pixels[i]), sampled=True, window=windows[i])
            for i in range(len(generators))
        ]


def _check_finite(sampled: Sequence[Segment], row: Mapping[str, Any], index: int, model: UnifiedModel) -> None:
    """
    Check what the policy sampled in a turn. All of it is in the memory of the host already.

    Raises:
        `FloatingPointError`: If log-probabilities or latents are NaN or infinite; the message names the row, and the weights
            that are not finite.
    """
    for segment in sampled:
        is_text = isinstance(segment, TextSegment)
        if all(map(math.isfinite, segment.log_probs or ())) if is_text else is_finite(segment.latents):
            continue
        raise FloatingPointError(
            f"the policy sampled {'a text whose log-probabilities' if is_text else 'an image whose latents'} are not finite, "
            f"in row {index} ({prompt_text(row['prompt'])[:80]!r}): {_cause(model)}"
        )


def _cause(model: UnifiedModel) -> str:
    """Why a model's outputs are not finite."""
    weights = names_not_finite(model.named_parameters())
    if not weights:
        return "all weights are finite, so activations overflow: check precision, temperature and guidance"
    return f"these weights are NaN or infinite: {', '.join(weights[:5])}{', ...' if len(weights) > 5 else ''}"
