# SPDX-License-Identifier: Apache-2.0

"""Images of a public benchmark: which of them are missing, how they are painted, and how a judge scores them."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm
from transformers.processing_utils import ProcessorMixin

from alphagrpo_ext.files import write_text
from alphagrpo_ext.models.fingerprint import checkpoint_fingerprint
from alphagrpo_ext.rollout.arguments import SamplingArguments
from alphagrpo_ext.rollout.generator import RolloutGenerator, sample_generator
from alphagrpo_ext.rollout.readable_prompts import check_prompt_room
from alphagrpo_ext.rollout.task import REFLECTION_TASK, TASKS
from alphagrpo_ext.shapes.scene import IMAGE_SIZE
from recipe_tools.benchmark_export.arguments import ExportArguments
from recipe_tools.input_errors import checking_input
from recipe_tools.processes import load_policy
from reward_models.benchmarks import Benchmark, BenchmarkPrompt
from reward_models.dvreward import DVReward, Score
from reward_models.evaluation.kept_scores import KeptScores
from reward_models.evaluation.samples import EvaluatedSample, Evaluation
from reward_models.evaluation.settings_digest import settings_digest
from reward_models.prompts.questions import PromptRecord


@dataclass(frozen=True)
class MissingImages:
    """
    Images of a prompt that are still to be painted.

    Args:
        index (`int`): Position of the prompt in the benchmark.
        prompt ([`BenchmarkPrompt`]): The prompt.
        samples (`list[int]`): Numbers of its images that do not exist yet, or are damaged.
    """

    index: int
    prompt: BenchmarkPrompt
    samples: list[int]


def claim_folder(
    args: ExportArguments, benchmark: Benchmark, prompts: Sequence[BenchmarkPrompt], left_out: Container[int] = ()
) -> None:
    """
    Write into the output folder with which settings, and of which prompts, its images are made.

    Args:
        args ([`ExportArguments`]): Settings of the export.
        benchmark ([`Benchmark`]): Knows which images there are.
        prompts (`Sequence[BenchmarkPrompt]`): The prompts; those with the indices `left_out` are not read.
        left_out (`Container[int]`, *optional*): Indices of prompts that are not painted.

    Raises:
        `ValueError`: If it holds images that were made with other settings, or of another prompt with the same key.
    """
    fingerprint = checkpoint_fingerprint(args.model_name_or_path)
    sampling = [getattr(args, f.name) for f in fields(SamplingArguments)]
    painting = (args.height, args.width, args.think, args.num_rounds, args.num_images, args.seed)
    digest = settings_digest(args.benchmark, args.model_label, fingerprint, sampling, painting)
    path, folder = Path(args.output_dir) / "export.json", Path(args.output_dir) / "images"
    num_images = args.num_images or benchmark.num_images
    has_images = any(file.is_file() for file in folder.rglob("*"))
    claim = json.loads(path.read_text(encoding="utf-8")) if has_images and path.exists() else {"digest": digest}
    if claim["digest"] != digest:
        raise ValueError(f"the images in {args.output_dir} were made with other settings: take another output_dir")
    painted = claim.get("prompts", {})
    for index in range(len(prompts)):
        if index in left_out:
            continue
        prompt = prompts[index]
        content = settings_digest(prompt.prompt, prompt.metadata, prompt.image and prompt.image.data)
        is_painted = any((folder / benchmark.image_path(prompt, sample)).exists() for sample in range(num_images))
        if is_painted and painted.get(prompt.key, content) != content:
            raise ValueError(
                f"the images of {prompt.key!r} in {args.output_dir} are of another prompt than the one that {args.prompts} has now: "
                f"take another output_dir, or remove them"
            )
        painted[prompt.key] = content
    record = {"digest": digest, "prompts": painted, "settings": asdict(args)}
    write_text(path, json.dumps(record, indent=2) + "\n")


def find_broken_rows(prompts: Sequence[BenchmarkPrompt]) -> dict[int, str]:
    """
    Read all prompts of a benchmark with their images. Several processes share the work.

    Returns:
        `dict[int, str]`: By the indices of prompts that cannot be read, what is wrong, in every process.
    """
    state, broken = PartialState(), {}
    places = range(state.process_index, len(prompts), state.num_processes)
    for index in tqdm(places, desc="read", delay=5, disable=not state.is_main_process):
        where = f"row {index}"
        try:
            prompt = prompts[index]
            where = f"row {index} ({prompt.key})"
            for image in (prompt.image, prompt.original):
                if image is not None:
                    image.decode()
        except (OSError, ValueError) as error:
            broken[index] = str(error) if where in str(error) else f"{where}: {error}"
    shares = gather_object([broken]) if state.num_processes > 1 else [broken]
    return dict(sorted((index, error) for share in shares for index, error in share.items()))


def missing_batches(
    benchmark: Benchmark,
    prompts: Sequence[BenchmarkPrompt],
    folder: Path,
    num_images: int,
    batch_size: int,
    left_out: Container[int] = (),
) -> Iterator[list[MissingImages]]:
    """
    Yield what this process still has to paint, about `batch_size` images at a time. Prompts with the indices `left_out` are not
    painted.
    """
    state, batch = PartialState(), []
    for index in range(state.process_index, len(prompts), state.num_processes):
        if index in left_out:
            continue
        prompt = prompts[index]
        samples = benchmark.missing(folder, prompt, num_images)
        if batch and sum(len(job.samples) for job in batch) + len(samples) > batch_size:
            yield batch
            batch = []
        if samples:
            batch.append(MissingImages(index, prompt, samples))
    if batch:
        yield batch


def image_size(row: Mapping[str, Any], processor: ProcessorMixin, args: ExportArguments) -> tuple[int, int]:
    """Height and width, in pixels, of the image that is painted for a row."""
    if args.height is not None:
        return args.height, args.width
    if row["image"] is None:
        return IMAGE_SIZE, IMAGE_SIZE
    return processor.resize_image(row["image"]).size[::-1]


def paint(
    painter: RolloutGenerator,
    task: str,
    refiner: RolloutGenerator,
    jobs: Sequence[MissingImages],
    args: ExportArguments,
) -> list[dict[int, Image.Image]]:
    """
    Paint the missing images of some prompts. The noise of an image depends on seed, prompt and number alone.

    Args:
        painter, refiner ([`RolloutGenerator`]): The policy, for first images and for rounds of reflection.
        task (`str`): Name of the task of first images.
        jobs (`Sequence[MissingImages]`): What to paint.
        args ([`ExportArguments`]): Size, sampling and number of rounds.

    Returns:
        `list[dict[int, PIL.Image.Image]]`: The images of each prompt by their number.
    """
    sources = [job.prompt.image and job.prompt.image.decode() for job in jobs]
    places = [(place, number) for place, job in enumerate(jobs) for number in job.samples]
    rows: list[dict[str, Any]] = [{"prompt": jobs[p].prompt.prompt, "image": sources[p]} for p, _ in places]
    # Images of the same size are painted together.
    groups: dict[tuple[int, int], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(image_size(row, painter.processor, args), []).append(i)
    for size, members in groups.items():
        for turn in range(args.num_rounds + 1):
            generators = [
                sample_generator(f"export-{args.seed}-{number}", turn, jobs[place].index)
                for place, number in (places[i] for i in members)
            ]
            generate, name = (refiner, REFLECTION_TASK) if turn else (painter, task)
            trajectories = generate([rows[i] for i in members], generators, args.rollout(*size, name))
            for i, trajectory in zip(members, trajectories, strict=True):
                rows[i] = {**rows[i], "image": trajectory.final_image}
    images: list[dict[int, Image.Image]] = [{} for _ in jobs]
    for (place, number), row in zip(places, rows, strict=True):
        images[place][number] = row["image"]
    return images


async def score_new(
    images: Sequence[Image.Image], records: Sequence[PromptRecord], reward: DVReward, settings: Any, kept: KeptScores
) -> list[Score]:
    """Score images. The judge is not asked about images whose scores were kept by an earlier run."""
    keys = [settings_digest(settings, record, image) for image, record in zip(images, records, strict=True)]
    new = [place for place, key in enumerate(keys) if kept.get(key) is None]
    answers = await reward.score([images[place] for place in new], [records[place] for place in new])
    for place, answer in zip(new, answers, strict=True):
        kept.keep(keys[place], answer)
    reward.check_failures(answers)
    answered = dict(zip(new, answers, strict=True))
    return [answered.get(place) or kept.get(key) for place, key in enumerate(keys)]


async def score(
    benchmark: Benchmark,
    asked: Sequence[tuple[BenchmarkPrompt, PromptRecord]],
    reward: DVReward,
    args: ExportArguments,
    kept: KeptScores,
) -> Evaluation:
    """Let the judge answer the questions about all images, about `batch_size` images at a time."""
    folder, num_images = Path(args.output_dir) / "images", args.num_images or benchmark.num_images
    num_prompts, samples = max(1, args.batch_size // num_images), []
    async with aclosing(reward):
        with tqdm(total=len(asked) * num_images, desc="scored") as progress:
            for start in range(0, len(asked), num_prompts):
                batch = asked[start : start + num_prompts]
                images = [image for prompt, _ in batch for image in benchmark.load(folder, prompt, num_images)]
                records = [record for _, record in batch for _ in range(num_images)]
                scores = await score_new(images, records, reward, args.answer_settings(), kept)
                for place, result in enumerate(scores):
                    index, number = start + place // num_images, place % num_images
                    prompt = asked[index][0]
                    row = {"prompt": prompt.prompt, "category": prompt.category}
                    sample = EvaluatedSample.from_score(row, index, number, "", None, result)
                    samples.append(replace(sample, image_file=str(folder / benchmark.image_path(prompt, number))))
                progress.update(len(scores))
    return Evaluation(sorted(samples, key=lambda sample: (sample.seed, sample.index)))


def paint_missing(
    benchmark: Benchmark, prompts: Sequence[BenchmarkPrompt], args: ExportArguments, left_out: Container[int] = ()
) -> None:
    """
    Paint the missing images among this process' share, except for the prompts with the indices `left_out`. The model is loaded
    only if there are any.
    """
    state, num_images = PartialState(), args.num_images or benchmark.num_images
    folder = Path(args.output_dir) / "images"
    share = len(range(state.process_index, len(prompts), state.num_processes)) * num_images
    remaining = missing_batches(benchmark, prompts, folder, num_images, args.batch_size, left_out)
    jobs = next(remaining, None)
    if jobs is None:
        return
    model, processor = load_policy(args.model_name_or_path, args.dtype)
    painting, reflection = TASKS.get(benchmark.task)(think=args.think), TASKS.get(REFLECTION_TASK)(think=True)
    # Edited images may be of many sizes, and are checked as they are painted unless one is given for all.
    size = args.height or IMAGE_SIZE, args.width or IMAGE_SIZE
    used = [(benchmark.task, painting), *([(REFLECTION_TASK, reflection)] if args.num_rounds else [])]
    indices = [index for index in range(len(prompts)) if index not in left_out]
    with checking_input():
        for name, task in used:
            named = ((f"prompt {prompts[i].key!r}", {"prompt": prompts[i].prompt}) for i in indices)
            check_prompt_room(named, task, processor, model, args.rollout(*size, name))
    painter, refiner = (RolloutGenerator(model, processor, task) for task in (painting, reflection))
    with tqdm(total=share, desc="painted", disable=not state.is_main_process) as progress:
        while jobs:
            for job, images in zip(jobs, paint(painter, benchmark.task, refiner, jobs, args), strict=True):
                benchmark.save(folder, job.prompt, images)
            # Images that existed before count as done when the loop passes them.
            progress.update((jobs[-1].index // state.num_processes + 1) * num_images - progress.n)
            jobs = next(remaining, None)
        progress.update(share - progress.n)
