# SPDX-License-Identifier: Apache-2.0

"""
Measure what a step costs: against other ways to compute the same, against the machine, and by its parts.

```bash
OMP_NUM_THREADS=1 python recipes/benchmark.py
```

measures the packaged `bagel-shapes` in a few minutes; a random model of 100 million parameters takes longer:

```bash
OMP_NUM_THREADS=1 python recipes/benchmark.py --sizes bagel-shapes 100m --precision bfloat16 --repetitions 3
```

All parts run in one process. What is compared is run in turn, repetition by repetition, and ratios are taken within a
repetition, so that they hold on a machine that is busy with other work. Tables are printed; `benchmark.json` and, with
`pip install "alphagrpo-ext[report]"`, plots go to `--output_dir`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from alphagrpo_ext.rollout.denoising import DenoisingConfig, denoise
from alphagrpo_ext.shapes import build_dataset
from alphagrpo_ext.trainer import AlphaGRPOConfig, AlphaGRPOTrainer
from benchmark_parts.breakdown import PHASES, phases_of
from benchmark_parts.flops import denoising_flops, training_flops
from benchmark_parts.structures import (
    EXACT,
    STRUCTURES,
    Update,
    gradient_of,
    relative_difference,
    token_costs,
)
from benchmark_parts.tables import Table, bars_of, curves
from benchmark_parts.text_overhead import build_trainers, step_seconds
from benchmark_parts.timing import (
    Spread,
    keep_freed_memory,
    matmul_functions,
    peak_bytes,
    ratio,
    time_interleaved,
)
from benchmark_parts.workload import (
    GUIDANCE,
    SIZES,
    Size,
    build_image_processor,
    build_model,
    self_reflection_trajectories,
)


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class ScriptArguments:
    """
    Arguments of the benchmark.

    Args:
        parts (`list[str]`): What to measure; all parts by default.
        sizes (`list[str]`): Models to measure, of `SIZES`.
        precision (`str`): `"float32"`, or `"bfloat16"` by autocast.
        repetitions (`int`): Of everything that is timed.
        num_trajectories (`int`, *optional*): Of a micro-batch, in place of the size's own number.
        output_dir (`str`): For `benchmark.json` and plots.
    """

    parts: list[str] = field(
        default_factory=lambda: list(PARTS), metadata={"help": "What to measure; all parts by default."}
    )
    sizes: list[str] = field(
        default_factory=lambda: ["bagel-shapes"], metadata={"help": "Models: 'bagel-shapes' and '100m'."}
    )
    precision: str = field(default="float32", metadata={"help": "'float32', or 'bfloat16' by autocast."})
    repetitions: int = field(default=5, metadata={"help": "Of everything that is timed."})
    num_trajectories: int | None = field(
        default=None, metadata={"help": "Trajectories of a micro-batch; the size's own number by default."}
    )
    output_dir: str = field(default="runs/benchmark", metadata={"help": "For benchmark.json and plots."})

    def __post_init__(self) -> None:
        for name, values, known in (
            ("parts", self.parts, PARTS),
            ("sizes", self.sizes, SIZES),
            ("precision", [self.precision], PRECISIONS),
        ):
            if unknown := [value for value in values if value not in known]:
                raise ValueError(f"{name}: unknown {', '.join(unknown)}; available: {', '.join(known)}")
        if self.repetitions < 1:
            raise ValueError(f"repetitions must be at least 1, but is {self.repetitions}")
        if self.num_trajectories is not None and self.num_trajectories < 1:
            raise ValueError(f"num_trajectories must be at least 1, but is {self.num_trajectories}")

    @property
    def dtype(self) -> torch.dtype:
        """What matrices are multiplied in."""
        return PRECISIONS[self.precision]

    def size(self, name: str) -> Size:
        """The size of this name, with the micro-batch that was asked for."""
        size = SIZES[name]
        return size if self.num_trajectories is None else replace(size, num_trajectories=self.num_trajectories)


def make_update(size: Size, dtype: torch.dtype) -> Update:
    model = build_model(size)
    return Update(model, self_reflection_trajectories(model, size), dtype)


def calls(update: Update) -> dict[str, Callable[[], object]]:
    """Each structure as a call that begins without gradients."""

    def call(name: str) -> Callable[[], object]:
        def run() -> None:
            update.model.zero_grad()
            STRUCTURES[name](update)

        return run

    return {name: call(name) for name in STRUCTURES}


def compare_structures(update: Update) -> dict[str, list[float]]:
    """How far each structure's loss is from that of the packed exact one, and its gradient from that of its own kind."""
    losses, differences, references = {}, {}, {}
    for structure in STRUCTURES:
        losses[structure], gradient = gradient_of(update, structure)
        reference = references.setdefault(structure in EXACT, gradient)
        differences[structure] = relative_difference(gradient, reference)
    first = losses["packed, exact"]
    return {s: [abs(loss - first) / abs(first), differences[s]] for s, loss in losses.items()}


def measure_structures(name: str, args: ScriptArguments) -> list[Table]:
    """The packed micro-batch against one forward a trained step."""
    update = make_update(args.size(name), args.dtype)
    differences = compare_structures(update)
    costs, seconds = token_costs(update), time_interleaved(calls(update), args.repetitions)
    exact, detached = "packed, exact", "packed, detached"
    rows = [
        [
            structure,
            Spread.of(seconds[structure]),
            *(
                cell
                for base in (exact, detached)
                for cell in (ratio(seconds[structure], seconds[base]), costs[structure] / costs[base])
            ),
            *differences[structure],
        ]
        for structure in STRUCTURES
    ]
    columns = ["structure", "seconds"]
    columns += [f"{what} to {base}" for base in ("exact", "detached") for what in ("time", "tokens")]
    columns += ["difference of the loss", "of the gradient"]
    note = (
        "Gradients are compared where the mathematics is the same: with the packed exact, or the packed detached one."
    )
    return [Table(f"Structures: {name}, {args.precision}", columns, rows, note, bars_of("seconds"))]


def measure_utilization(name: str, args: ScriptArguments) -> list[Table]:
    """Training and denoising as a fraction of the matrix multiplications that the machine can do."""
    size, dtype = args.size(name), args.dtype
    update = make_update(size, dtype)
    model = update.model
    inputs = model.pack(update.trajectories, GUIDANCE).inputs
    group, num_latents = 4, size.grid[0] * size.grid[1]
    steps = DenoisingConfig(num_timesteps=size.num_steps + 1, guidance=GUIDANCE)
    contexts = [update.trajectories[0].segments[:3]]
    contexts += [
        update.trajectories[0].sampled_images[0].guidance_contexts[b] for b in model.guidance(GUIDANCE).branches[1:]
    ]
    with update.autocast():
        cache = model.prefill(contexts, group, model.image_slots(size.grid))
    noise = torch.randn(group, num_latents, model.latent_channels)

    def paint() -> None:
        with update.autocast():
            denoise(model, cache, noise, size.grid, steps)

    lengths = cache.prefix_mask.sum(dim=1).repeat_interleave(group).tolist()
    flops = {
        "packed, exact": training_flops(model, inputs),
        "denoising": denoising_flops(model, lengths, num_latents, size.num_steps),
    }
    multiply = {f"matmul {n}": function for n, function in matmul_functions(dtype).items()}
    timed = {"packed, exact": calls(update)["packed, exact"], "denoising": paint}
    seconds = time_interleaved({**timed, **multiply}, args.repetitions)
    work = 2 * max(matmul_functions(dtype)) ** 3
    peak = [work / min(values) for values in zip(*(seconds[n] for n in multiply), strict=True)]
    rows = []
    for title, key in (("training", "packed, exact"), ("denoising", "denoising")):
        rate = [flops[key] / value for value in seconds[key]]
        rows.append(
            [title, Spread.of(seconds[key]), flops[key] / 1e9, Spread.of(rate).scaled(1e-9), ratio(rate, peak)]
        )
    note = (
        f"Peak in {args.precision}, {torch.get_num_threads()} thread(s): {Spread.of(peak).scaled(1e-9)} GFLOP/s, the "
        "fastest square multiplication of each repetition."
    )
    columns = ["what", "seconds", "GFLOP", "GFLOP/s", "of the peak"]
    return [Table(f"Utilization: {name}, {args.precision}", columns, rows, note, bars_of("of the peak"))]


def measure_scaling(name: str, args: ScriptArguments) -> list[Table]:
    """Time and memory of the packed micro-batch, one dimension at a time."""
    base = replace(args.size(name), released=False)
    variants: dict[str, dict[int, Size]] = {
        "group size": {n: replace(base, num_trajectories=n) for n in (1, 2, 4, 8)},
        "trained steps": {n: replace(base, num_steps=n) for n in (1, 2, 4, 8)},
        "thought tokens": {
            n * base.thought_tokens: replace(base, thought_tokens=n * base.thought_tokens) for n in (1, 2, 4)
        },
        "image tokens": {
            (n * base.grid[0]) ** 2 // 4: replace(base, image_size=base.image_size * n // 2) for n in (1, 2, 3)
        },
        "width": {
            base.hidden_size * n // 2: replace(
                base, hidden_size=base.hidden_size * n // 2, intermediate_size=base.intermediate_size * n // 2
            )
            for n in (1, 2, 4)
        },
    }
    rows = []
    for dimension, sizes in variants.items():
        updates = {value: make_update(size, args.dtype) for value, size in sizes.items()}
        seconds = time_interleaved(
            {str(value): calls(update)["packed, exact"] for value, update in updates.items()}, args.repetitions
        )
        first = next(iter(updates))
        for value, update in updates.items():
            update.model.zero_grad()
            memory = peak_bytes(update.model, lambda update=update: STRUCTURES["packed, exact"](update))
            costs = [token_costs(updates[v])["packed, exact"] for v in (value, first)]
            times = ratio(seconds[str(value)], seconds[str(first)])
            rows.append([dimension, value, Spread.of(seconds[str(value)]), times, costs[0] / costs[1], memory / 2**20])
    columns = ["dimension", "value", "seconds", "time to the first", "tokens to the first", "peak MiB of tensors"]
    note = "Random weights; memory is that of tensors beside weights, gradients included."
    return [Table(f"Scaling: {name}, {args.precision}", columns, rows, note, curves)]


def measure_text_overhead(name: str, args: ScriptArguments) -> list[Table]:
    """A step of this trainer on text alone against one of TRL's."""
    steps = 4
    trainers = build_trainers(args.size(name), args.output_dir, steps, args.dtype == torch.bfloat16)
    seconds: dict[str, list[float]] = {trainer: [] for trainer in trainers}
    for _ in range(args.repetitions):
        for trainer_name, trainer in trainers.items():
            seconds[trainer_name].append(min(step_seconds(trainer)))
    rows = [[trainer, Spread.of(values), ratio(values, seconds["GRPOTrainer"])] for trainer, values in seconds.items()]
    note = (
        "A step on 16 made-up completions, without generation, rewards included, against a Qwen3 of the sizes of the "
        "understanding expert. Of each run of 4 steps the fastest but the first counts."
    )
    columns = ["trainer", "seconds a step", "ratio"]
    return [Table(f"Text alone: {name}, {args.precision}", columns, rows, note, bars_of("seconds a step"))]


def brightness(images: list[Any], **kwargs: Any) -> list[float]:
    """A reward that takes no time worth speaking of; with a real judge, add its own."""
    return [sum(image.convert("L").histogram()[128:]) / (image.width * image.height) for image in images]


def measure_breakdown(name: str, args: ScriptArguments) -> list[Table]:
    """Where the time of a step of the whole trainer goes."""
    size = args.size(name)
    if size.released:
        # The judge of the shapes world looks at images of its own size.
        from reward_models import DVReward

        reward = DVReward("shapes")
    else:
        reward = brightness
    trainer = AlphaGRPOTrainer(
        model=build_model(size),
        processing_class=build_image_processor(size),
        reward_funcs=reward,
        args=AlphaGRPOConfig(
            output_dir=args.output_dir,
            task="self_reflection",
            image_height=size.image_size,
            image_width=size.image_size,
            max_completion_length=size.thought_tokens,
            num_timesteps=2 * size.num_steps + 1,
            sde_window_size=size.num_steps,
            sde_window_range=[0, 2 * size.num_steps],
            cfg_text_scale=GUIDANCE.text_scale,
            cfg_img_scale=GUIDANCE.image_scale,
            cfg_interval=list(GUIDANCE.interval),
            cfg_renorm_type=GUIDANCE.renorm_type,
            per_device_train_batch_size=max(2, size.num_trajectories),
            num_generations=max(2, size.num_trajectories),
            max_steps=1 + args.repetitions,
            bf16=args.dtype == torch.bfloat16,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=build_dataset("train", 64, seed=0),
    )
    with phases_of(trainer) as seconds:
        totals = step_seconds(trainer)
    whole = sum(totals) * (1 + args.repetitions) / args.repetitions
    parts = {phase: seconds.get(phase, 0.0) for phase in PHASES if phase != "rest"}
    parts["rest"] = max(0.0, whole - sum(parts.values()))
    rows = [[phase, 100 * value / sum(parts.values())] for phase, value in parts.items()]
    note = f"{1 + args.repetitions} steps of self-reflection; the initial image's prefill and denoising are counted as such."
    title, share = f"Where a step's time goes: {name}, {args.precision}", "share of a step, %"
    return [Table(title, ["phase", share], rows, note, bars_of(share))]


PARTS: dict[str, Callable[[str, ScriptArguments], list[Table]]] = {
    "structures": measure_structures,
    "utilization": measure_utilization,
    "scaling": measure_scaling,
    "text_overhead": measure_text_overhead,
    "breakdown": measure_breakdown,
}


def save(tables: list[Table], args: ScriptArguments, path: Path) -> None:
    """All tables, with what they were measured on."""
    result = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "arguments": asdict(args),
        "tables": [table.to_json() for table in tables],
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, path)


def main(args: ScriptArguments) -> list[Table]:
    keep_freed_memory()
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    tables: list[Table] = []
    for name in args.sizes:
        for part in args.parts:
            for table in PARTS[part](name, args):
                tables.append(table)
                print(table, flush=True)
            # What is measured already is not lost with the parts that follow.
            save(tables, args, output_dir / "benchmark.json")
    pictures = [table.save_picture(output_dir) for table in tables]
    print(f"benchmark.json{' and plots' if any(pictures) else ''}: {output_dir}")
    return tables


if __name__ == "__main__":
    main(*HfArgumentParser(ScriptArguments).parse_args_into_dataclasses())
