# SPDX-License-Identifier: Apache-2.0

"""
Paint the prompts of a public benchmark into the folders that its own scorer reads, and score the images by questions.

```bash
python recipes/export_benchmark.py --benchmark geneval --prompts geneval/prompts/evaluation_metadata.jsonl \\
    --model_name_or_path ByteDance-Seed/BAGEL-7B-MoT --dtype bfloat16 --height 1024 --width 1024 \\
    --num_timesteps 50 --timestep_shift 3 --cfg_text_scale 4 --max_new_tokens 512 --output_dir runs/geneval
```

Benchmarks are `geneval`, `dpg_bench`, `tiif_bench`, `wise` and `gedit_bench`; `reward_models/benchmarks/` says what each reads
and writes. `<output_dir>/images` is the folder for the benchmark's scorer.

With a judge, images are also scored by yes/no questions: those of the benchmark's metadata, or those of a file that
`recipes/decompose_prompts.py` made of its prompts:

```bash
python recipes/export_benchmark.py --benchmark wise --prompts WISE/data --questions wise_questions.jsonl \\
    --judge openai --judge_base_url http://localhost:8000/v1 --judge_model NAME --output_dir runs/wise
```

An image that is there is not painted again, and no question is asked twice: a run that was stopped or killed goes on where it
was when it is started again.
With `accelerate launch`, several processes share the work.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm
from transformers.processing_utils import ProcessorMixin
from trl import TrlParser

from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.models.fingerprint import checkpoint_fingerprint, model_label
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.rollout import TASKS, RolloutGenerator
from alphagrpo_ext.rollout.arguments import SamplingArguments
from alphagrpo_ext.rollout.generator import sample_generator
from alphagrpo_ext.shapes.scene import IMAGE_SIZE
from reward_models.arguments import RewardArguments
from reward_models.benchmarks import BENCHMARKS, Benchmark, BenchmarkPrompt
from reward_models.dvreward import DVReward, Score
from reward_models.evaluation.kept_scores import KeptScores
from reward_models.evaluation.results import save_results
from reward_models.evaluation.samples import EvaluatedSample, Evaluation
from reward_models.evaluation.scores import NamedEvaluation
from reward_models.evaluation.settings_digest import settings_digest
from reward_models.prompts.questions import PromptRecord, load_records


@dataclass
class ExportArguments(RewardArguments, SamplingArguments):
    """
    Which benchmark is painted by whom; for the rest see [`RewardArguments`] and [`SamplingArguments`].

    Args:
        benchmark (`str`):
            `"geneval"`, `"dpg_bench"`, `"tiif_bench"`, `"wise"`, `"gedit_bench"`, or one that another package registers.
        prompts (`str`):
            The benchmark's own prompts: a file, a folder or a dataset.
        questions (`str`, *optional*):
            Questions of its prompts, see [`~reward_models.prompts.questions.load_records`]; they go before the benchmark's own.
        model_name_or_path (`str`, *optional*, defaults to `"bagel-shapes"`):
            The policy: a checkpoint or an adapter.
        model_label (`str`, *optional*):
            How the benchmark's scorer is to call the model, where a folder bears its name. `None` makes one of
            `model_name_or_path`.
        num_images (`int`, *optional*):
            Images a prompt. `None` takes as many as the benchmark's protocol asks for.
        think (`bool`, *optional*, defaults to `True`):
            Whether an image follows a thought.
        num_rounds (`int`, *optional*, defaults to `0`):
            Rounds of reflection after it; the last image is exported.
        height, width (`int`, *optional*):
            Size of images, in pixels. `None` takes that of the shapes world, and of an edited image the size to which the
            model resizes the original.
        batch_size (`int`, *optional*, defaults to `16`):
            Images at once, rounded to whole prompts.
        seed (`int`, *optional*, defaults to `0`):
            Of all noise.
        judge (`str`, *optional*, defaults to `"none"`):
            Who answers the questions, see [`~reward_models.judges.arguments.JudgeArguments`]; `"none"` for nobody.
        output_dir (`str`, *optional*, defaults to `"runs/export_benchmark"`):
            Where images and scores go.
    """

    benchmark: str = field(
        default="geneval",
        metadata={"help": "'geneval', 'dpg_bench', 'tiif_bench', 'wise', 'gedit_bench', or a registered one."},
    )
    prompts: str | None = field(
        default=None, metadata={"help": "The benchmark's own prompts: file, folder or dataset."}
    )
    questions: str | None = field(default=None, metadata={"help": "Questions of its prompts, as JSON lines."})
    model_name_or_path: str = field(default="bagel-shapes", metadata={"help": "The policy: a name or a folder."})
    model_label: str | None = field(
        default=None, metadata={"help": "How the benchmark's scorer is to call the model."}
    )
    num_images: int | None = field(default=None, metadata={"help": "Images a prompt. Default: the benchmark's own."})
    think: bool = field(default=True, metadata={"help": "Whether an image follows a thought."})
    num_rounds: int = field(default=0, metadata={"help": "Rounds of reflection; the last image is exported."})
    height: int | None = field(
        default=None,
        metadata={"help": "Height of images, in pixels. Default: 24, or of an edited one the original's."},
    )
    width: int | None = field(
        default=None, metadata={"help": "Width of images, in pixels. Default: 24, or of an edited one the original's."}
    )
    batch_size: int = field(default=16, metadata={"help": "Images at once, rounded to whole prompts."})
    seed: int = field(default=0, metadata={"help": "Of all noise."})
    judge: str = field(default="none", metadata={"help": "Who answers questions about the images; 'none' for nobody."})
    output_dir: str = field(default="runs/export_benchmark", metadata={"help": "Where images and scores go."})

    def __post_init__(self) -> None:
        RewardArguments.__post_init__(self)
        SamplingArguments.__post_init__(self)
        if not self.prompts:
            raise ValueError(f"prompts is missing: where the prompts of '{self.benchmark}' are")
        if self.questions and self.judge == "none":
            raise ValueError("questions are answered by a judge: give one, e.g. --judge openai")
        if (self.height is None) != (self.width is None):
            raise ValueError(f"give height and width, or neither, but they are {self.height} and {self.width}")
        for name, least in (("num_images", 1), ("batch_size", 1), ("num_rounds", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, but is {getattr(self, name)}")


@dataclass(frozen=True)
class Job:
    """
    Images of a prompt that are still to be painted.

    Args:
        index (`int`): Place of the prompt.
        prompt ([`BenchmarkPrompt`]): The prompt.
        samples (`list[int]`): Which of its images.
    """

    index: int
    prompt: BenchmarkPrompt
    samples: list[int]


def claim_folder(args: ExportArguments) -> None:
    """
    Note in the output folder how its images are made.

    Raises:
        `ValueError`: If it holds images that were made in another way.
    """
    fingerprint = checkpoint_fingerprint(args.model_name_or_path)
    sampling = [getattr(args, f.name) for f in fields(SamplingArguments)]
    painting = (args.height, args.width, args.think, args.num_rounds, args.num_images, args.seed)
    digest = settings_digest(args.benchmark, args.prompts, args.model_label, fingerprint, sampling, painting)
    path = Path(args.output_dir) / "export.json"
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8"))["digest"] != digest:
            raise ValueError(f"the images in {args.output_dir} were made with other settings: take another output_dir")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"digest": digest, "settings": asdict(args)}, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def load_policy(args: ExportArguments) -> tuple[UnifiedModel, ProcessorMixin]:
    model, processor = load_model(args.model_name_or_path, dtype=args.dtype)
    return model.to(PartialState().device).eval(), processor


def batches(
    benchmark: Benchmark, prompts: Sequence[BenchmarkPrompt], folder: Path, num_images: int, batch_size: int
) -> Iterator[list[Job]]:
    """What this process has to paint, about `batch_size` images at a time."""
    state, batch = PartialState(), []
    for index in range(state.process_index, len(prompts), state.num_processes):
        prompt = prompts[index]
        samples = benchmark.missing(folder, prompt, num_images)
        if batch and sum(len(job.samples) for job in batch) + len(samples) > batch_size:
            yield batch
            batch = []
        if samples:
            batch.append(Job(index, prompt, samples))
    if batch:
        yield batch


def image_size(row: Mapping[str, Any], processor: ProcessorMixin, args: ExportArguments) -> tuple[int, int]:
    """Height and width of the image that is painted for a row."""
    if args.height is not None:
        return args.height, args.width
    if row["image"] is None:
        return IMAGE_SIZE, IMAGE_SIZE
    return processor.resize_image(row["image"]).size[::-1]


def paint(
    painter: RolloutGenerator, refiner: RolloutGenerator, jobs: Sequence[Job], args: ExportArguments
) -> list[dict[int, Image.Image]]:
    """The images of each job, by their number. An image's noise depends on seed, prompt and number alone."""
    sources = [job.prompt.image and job.prompt.image.decode() for job in jobs]
    places = [(place, number) for place, job in enumerate(jobs) for number in job.samples]
    rows: list[dict[str, Any]] = [{"prompt": jobs[p].prompt.prompt, "image": sources[p]} for p, _ in places]
    # Images of one size are painted together.
    groups: dict[tuple[int, int], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(image_size(row, painter.processor, args), []).append(i)
    for size, members in groups.items():
        for turn in range(args.num_rounds + 1):
            generators = [
                sample_generator(f"export-{args.seed}-{number}", turn, jobs[place].index)
                for place, number in (places[i] for i in members)
            ]
            trajectories = (refiner if turn else painter)([rows[i] for i in members], generators, args.rollout(*size))
            for i, trajectory in zip(members, trajectories, strict=True):
                rows[i] = {**rows[i], "image": trajectory.final_image}
    images: list[dict[int, Image.Image]] = [{} for _ in jobs]
    for (place, number), row in zip(places, rows, strict=True):
        images[place][number] = row["image"]
    return images


async def ask(
    images: Sequence[Image.Image], records: Sequence[PromptRecord], reward: DVReward, settings: Any, kept: KeptScores
) -> list[Score]:
    """Scores of images, of which those that are kept are not asked for again."""
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
    """Ask the questions about images that are there, about `batch_size` images at once."""
    folder, num_images = Path(args.output_dir) / "images", args.num_images or benchmark.num_images
    num_prompts, samples = max(1, args.batch_size // num_images), []
    async with aclosing(reward):
        with tqdm(total=len(asked) * num_images, desc="scored") as progress:
            for start in range(0, len(asked), num_prompts):
                batch = asked[start : start + num_prompts]
                images = [image for prompt, _ in batch for image in benchmark.load(folder, prompt, num_images)]
                records = [record for _, record in batch for _ in range(num_images)]
                scores = await ask(images, records, reward, args.answer_settings(), kept)
                for place, result in enumerate(scores):
                    index, number = start + place // num_images, place % num_images
                    prompt = asked[index][0]
                    row = {"prompt": prompt.prompt, "category": prompt.category}
                    sample = EvaluatedSample.from_score(row, index, number, "", None, result)
                    samples.append(replace(sample, image_file=str(folder / benchmark.image_path(prompt, number))))
                progress.update(len(scores))
    return Evaluation(sorted(samples, key=lambda sample: (sample.seed, sample.index)))


def paint_missing(
    benchmark: Benchmark, prompts: Sequence[BenchmarkPrompt], folder: Path, args: ExportArguments
) -> None:
    """Paint every image of this process' share that is not there. The model is loaded if there is one."""
    state, num_images = PartialState(), args.num_images or benchmark.num_images
    share = len(range(state.process_index, len(prompts), state.num_processes)) * num_images
    remaining = batches(benchmark, prompts, folder, num_images, args.batch_size)
    jobs = next(remaining, None)
    if jobs is None:
        return
    model, processor = load_policy(args)
    painter = RolloutGenerator(model, processor, TASKS.get(benchmark.task)(think=args.think))
    refiner = RolloutGenerator(model, processor, TASKS.get("self_reflection")(think=True))
    with tqdm(total=share, desc="painted", disable=not state.is_main_process) as progress:
        while jobs:
            for job, images in zip(jobs, paint(painter, refiner, jobs, args), strict=True):
                benchmark.save(folder, job.prompt, images)
            # Those that were there before are passed over on the way.
            progress.update((jobs[-1].index // state.num_processes + 1) * num_images - progress.n)
            jobs = next(remaining, None)
        progress.update(share - progress.n)


def main(args: ExportArguments) -> None:
    # Processes on a machine without an accelerator find each other only if they are told.
    state = PartialState(cpu=not torch.accelerator.is_available())
    benchmark: Benchmark = BENCHMARKS.get(args.benchmark)(args.model_label or model_label(args.model_name_or_path))
    prompts = benchmark.prompts(args.prompts)
    questions = {str(record.prompt): record for record in load_records(args.questions)} if args.questions else {}
    folder = Path(args.output_dir) / "images"
    if state.is_main_process:
        claim_folder(args)
    state.wait_for_everyone()
    paint_missing(benchmark, prompts, folder, args)
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    print(f"{len(prompts)} prompts are painted: {folder}")
    if args.judge == "none":
        return
    # Without the originals, which the judge does not see.
    asked = [(replace(p, image=None), record) for p in prompts if (record := p.record(questions)) is not None]
    if not asked:
        print("No prompt has questions: make some with recipes/decompose_prompts.py and pass them as --questions.")
        return
    policy = load_policy(args) if args.judge == "policy" else None
    with KeptScores(Path(args.output_dir) / "scores.jsonl") as kept:
        evaluation = asyncio.run(score(benchmark, asked, args.make_reward(policy), args, kept))
    named = NamedEvaluation(args.model_label or args.model_name_or_path, args.benchmark, evaluation)
    settings = {name: value for name, value in asdict(args).items() if name != "output_dir"}
    table = save_results(Path(args.output_dir), [named], [record for _, record in asked], settings)
    print(f"\n{table}\n\n{len(asked)} of {len(prompts)} prompts have questions. Scores: {args.output_dir}")


if __name__ == "__main__":
    (arguments,) = TrlParser((ExportArguments,)).parse_args_and_config()
    main(arguments)
    # Threads of the communication backend that outlive the interpreter may abort the process.
    PartialState().destroy_process_group()
