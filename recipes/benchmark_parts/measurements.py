# SPDX-License-Identifier: Apache-2.0

"""What the benchmark measures: each function takes the name of a size and returns tables."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch

from alphagrpo_ext.rollout.denoising import DenoisingConfig, denoise
from alphagrpo_ext.shapes.prompts import build_dataset
from alphagrpo_ext.shapes.scene import IMAGE_SIZE
from alphagrpo_ext.trainer import AlphaGRPOConfig, AlphaGRPOTrainer
from benchmark_parts.adapters import WITHOUT_ADAPTER, rollout_calls
from benchmark_parts.arguments import BenchmarkArguments
from benchmark_parts.breakdown import PHASES, phase_seconds
from benchmark_parts.flops import counted_flops, denoising_flops, training_flops
from benchmark_parts.sizes import Size
from benchmark_parts.structures import (
    CONTRACT_STRUCTURES,
    EXACT,
    PACKED,
    gradient_of,
    relative_difference,
    structures_of,
    token_costs,
    trained_tokens,
)
from benchmark_parts.tables import ResultTable, bars_of, curves
from benchmark_parts.text_overhead import build_trainers, step_seconds
from benchmark_parts.timing import Spread, matmul_functions, peak_bytes, ratio, time_interleaved
from benchmark_parts.updates.attention import attention_calls
from benchmark_parts.updates.split_update import SplitUpdate, peak_memory
from benchmark_parts.updates.update import Update
from benchmark_parts.whole_step.comparison import brightness, compared_steps
from benchmark_parts.whole_step.presets import evaluations_per_image, reflection_trainers
from benchmark_parts.whole_step.trainers import interleaved_step_seconds
from benchmark_parts.workload import GUIDANCE, build_image_processor, build_model, self_reflection_trajectories
from reward_models.dvreward import DVReward


def make_update(size: Size, dtype: torch.dtype) -> Update:
    """Build the model of a size and a micro-batch of trajectories for it."""
    model = build_model(size)
    return Update(model, self_reflection_trajectories(model, size), dtype)


def without_gradients(update: Update, structure: Callable[[Update], object]) -> Callable[[], object]:
    """Wrap a structure as a function that starts without gradients."""

    def run() -> None:
        update.model.zero_grad()
        structure(update)

    return run


def packed_call(update: Update) -> Callable[[], object]:
    """The packed micro-batch as a function that starts without gradients."""
    return without_gradients(update, CONTRACT_STRUCTURES[PACKED])


def compare_structures(update: Update) -> dict[str, list[float]]:
    """Relative difference of each structure's loss from the packed exact one, and of its gradient from the packed one of its kind."""
    losses, differences, references = {}, {}, {}
    for structure in structures_of(update.model):
        losses[structure], gradient = gradient_of(update, structure)
        reference = references.setdefault(structure in EXACT, gradient)
        differences[structure] = relative_difference(gradient, reference)
    first = losses[PACKED]
    return {s: [abs(loss - first) / abs(first), differences[s]] for s, loss in losses.items()}


def measure_structures(name: str, args: BenchmarkArguments) -> list[ResultTable]:
    """Compare the packed micro-batch with one forward per trained step."""
    update = make_update(args.size(name), getattr(torch, args.precision))
    differences = compare_structures(update)
    calls = {
        structure: without_gradients(update, function) for structure, function in structures_of(update.model).items()
    }
    costs, seconds = token_costs(update), time_interleaved(calls, args.repetitions)
    detached = "packed, detached"
    rows = [
        [
            structure,
            Spread.of(seconds[structure]),
            *(
                cell
                for base in (PACKED, detached)
                for cell in (ratio(seconds[structure], seconds[base]), costs[structure] / costs[base])
            ),
            *differences[structure],
        ]
        for structure in calls
    ]
    columns = ["structure", "seconds"]
    columns += [f"{what} to {base}" for base in ("exact", "detached") for what in ("time", "tokens")]
    columns += ["difference of the loss", "of the gradient"]
    note = (
        "Each gradient is compared with that of the packed structure of its kind, exact or detached. Structures with contexts that are "
        "rebuilt or cached are written for BAGEL and measure its sizes alone."
    )
    return [ResultTable(f"Structures: {name}, {args.precision}", columns, rows, note, bars_of("seconds"))]


def measure_utilization(name: str, args: BenchmarkArguments) -> list[ResultTable]:
    """Measure training and denoising as a fraction of the peak of the machine's matrix multiplications."""
    size, dtype = args.size(name), getattr(torch, args.precision)
    update = make_update(size, dtype)
    model = update.model
    grid = model.latent_grid(size.image_size, size.image_size)
    group, num_latents = 4, grid[0] * grid[1]
    steps = DenoisingConfig(num_timesteps=size.num_steps + 1, guidance=GUIDANCE)
    contexts = [update.trajectories[0].segments[:3]]
    contexts += [
        update.trajectories[0].sampled_images[0].guidance_contexts[b] for b in model.guidance(GUIDANCE).branches[1:]
    ]
    with update.autocast():
        cache = model.prefill(contexts, group, model.image_slots(grid))
    noise = torch.randn(group, num_latents, model.latent_channels)

    def paint() -> None:
        with update.autocast():
            denoise(model, cache, noise, grid, steps)

    timed = {"training": packed_call(update), "denoising": paint}
    if size.family == "bagel":
        lengths = cache.prefix_mask.sum(dim=1).repeat_interleave(group).tolist()
        inputs = model.pack(update.trajectories, GUIDANCE).inputs
        flops = {
            "training": training_flops(model, inputs),
            "denoising": denoising_flops(model, lengths, num_latents, size.num_steps),
        }
        counted = "Operations on padding, and on pairs of tokens that do not see each other, do not count."
    else:
        flops = {what: counted_flops(function) for what, function in timed.items()}
        counted = "All matrix multiplications count, those of padding and of masked attention too."
    multiply = {f"matmul {n}": function for n, function in matmul_functions(dtype).items()}
    seconds = time_interleaved({**timed, **multiply}, args.repetitions)
    work = 2 * max(matmul_functions(dtype)) ** 3
    peak = [work / min(values) for values in zip(*(seconds[n] for n in multiply), strict=True)]
    rows = []
    for what in timed:
        rate = [flops[what] / value for value in seconds[what]]
        rows.append(
            [what, Spread.of(seconds[what]), flops[what] / 1e9, Spread.of(rate).scaled(1e-9), ratio(rate, peak)]
        )
    note = (
        f"Peak in {args.precision}, {torch.get_num_threads()} thread(s): {Spread.of(peak).scaled(1e-9)} GFLOP/s, the "
        f"fastest square multiplication of each repetition. {counted}"
    )
    columns = ["what", "seconds", "GFLOP", "GFLOP/s", "of the peak"]
    return [ResultTable(f"Utilization: {name}, {args.precision}", columns, rows, note, bars_of("of the peak"))]


def measure_scaling(name: str, args: BenchmarkArguments) -> list[ResultTable]:
    """Measure time and memory of the packed micro-batch, with one dimension changed at a time."""
    base = replace(args.size(name), released=False)
    stride = build_model(base).latent_downsample
    # Half, once and one and a half times as large, in whole latent tokens.
    sides = [base.image_size // stride * n // 2 for n in (1, 2, 3)]
    variants: dict[str, dict[int, Size]] = {
        "group size": {n: replace(base, num_trajectories=n) for n in (1, 2, 4, 8)},
        "trained steps": {n: replace(base, num_steps=n) for n in (1, 2, 4, 8)},
        "thought tokens": {
            n * base.thought_tokens: replace(base, thought_tokens=n * base.thought_tokens) for n in (1, 2, 4)
        },
        "image tokens": {side**2: replace(base, image_size=side * stride) for side in sides},
        "width": {
            base.hidden_size * n // 2: replace(
                base, hidden_size=base.hidden_size * n // 2, intermediate_size=base.intermediate_size * n // 2
            )
            for n in (1, 2, 4)
        },
    }
    rows = []
    for dimension, sizes in variants.items():
        updates = {value: make_update(size, getattr(torch, args.precision)) for value, size in sizes.items()}
        seconds = time_interleaved(
            {str(value): packed_call(update) for value, update in updates.items()}, args.repetitions
        )
        first, tokens = next(iter(updates)), {}
        for value, update in updates.items():
            update.model.zero_grad()
            memory = peak_bytes(update.model, lambda update=update: CONTRACT_STRUCTURES[PACKED](update))
            tokens[value] = trained_tokens(update, CONTRACT_STRUCTURES[PACKED])
            times = ratio(seconds[str(value)], seconds[str(first)])
            share = tokens[value] / tokens[first]
            rows.append([dimension, value, Spread.of(seconds[str(value)]), times, share, memory / 2**20])
    columns = ["dimension", "value", "seconds", "time to the first", "tokens to the first", "peak MiB of tensors"]
    note = "Random weights. Memory is that of all tensors but the weights, gradients included."
    return [ResultTable(f"Scaling: {name}, {args.precision}", columns, rows, note, curves)]


def measure_text_overhead(name: str, args: BenchmarkArguments) -> list[ResultTable]:
    """Compare a step of this trainer on text alone with one of TRL's."""
    steps = 4
    trainers = build_trainers(args.size(name), args.output_dir, steps, args.precision == "bfloat16")
    seconds: dict[str, list[float]] = {trainer: [] for trainer in trainers}
    for _ in range(args.repetitions):
        for trainer_name, trainer in trainers.items():
            seconds[trainer_name].append(min(step_seconds(trainer)))
    rows = [[trainer, Spread.of(values), ratio(values, seconds["GRPOTrainer"])] for trainer, values in seconds.items()]
    note = (
        "A step on 16 random completions, with rewards and without generation, compared with a Qwen3 of the sizes of the "
        "understanding expert. Of each run of 4 steps, the fastest one after the first counts."
    )
    columns = ["trainer", "seconds per step", "ratio"]
    return [ResultTable(f"Text alone: {name}, {args.precision}", columns, rows, note, bars_of("seconds per step"))]


def make_reflection_trainer(size: Size, reward: Callable, args: BenchmarkArguments) -> AlphaGRPOTrainer:
    """Make a trainer of self-reflection for one micro-batch per step."""
    return AlphaGRPOTrainer(
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
            bf16=args.precision == "bfloat16",
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=build_dataset("train", 64, seed=0),
    )


def measure_breakdown(name: str, args: BenchmarkArguments) -> list[ResultTable]:
    """Measure which phases the time of a training step is spent in."""
    size = args.size(name)
    # The judge of the shapes world takes images of one size only.
    reward = DVReward("shapes") if size.image_size == IMAGE_SIZE else brightness
    trainer = make_reflection_trainer(size, reward, args)
    with phase_seconds(trainer) as seconds:
        totals = step_seconds(trainer)
    whole = sum(totals) * (1 + args.repetitions) / args.repetitions
    parts = {phase: seconds.get(phase, 0.0) for phase in PHASES if phase != "rest"}
    parts["rest"] = max(0.0, whole - sum(parts.values()))
    rows = [[phase, 100 * value / sum(parts.values())] for phase, value in parts.items()]
    note = f"{1 + args.repetitions} steps of self-reflection. Prefill and denoising of initial images count as such."
    title, share = f"Time of a step: {name}, {args.precision}", "share of a step, %"
    return [ResultTable(title, ["phase", share], rows, note, bars_of(share))]


def measure_memory(name: str, args: BenchmarkArguments) -> list[ResultTable]:
    """Measure time and peak memory of an update whose trained steps are split over several forwards."""
    size = args.size(name)
    update = SplitUpdate.of(size, args.precision)
    fixed = [steps for steps in (1, 2, 5) if steps < size.num_steps]
    choices = sorted({*fixed, size.num_steps, update.automatic}, reverse=True)
    calls = {str(steps): functools.partial(update.run, steps) for steps in choices}
    seconds = time_interleaved(calls, args.repetitions, clock=time.process_time)
    best, automatic = min(seconds.values(), key=statistics.median), update.automatic
    del update, calls
    peaks = [peak_memory(size, args.precision, steps) for steps in choices]
    rows = [
        [
            f"{steps}{' (auto)' if steps == automatic else ''}",
            -(-size.num_steps // steps),
            Spread.of(seconds[str(steps)]),
            ratio(seconds[str(steps)], best),
            peak / 2**20,
            peak / peaks[0],
        ]
        for steps, peak in zip(choices, peaks, strict=True)
    ]
    columns = [
        "steps per forward",
        "forwards",
        "CPU seconds",
        "time to the fastest",
        "peak MiB above imports",
        "to all steps",
    ]
    note = (
        f"Text-to-image, {size.num_trajectories} trajectories, K = {size.num_steps}, guidance in all steps, all weights trained, "
        f"{torch.get_num_threads()} thread(s). The first row has all steps in one forward. The peak is that of one update in a "
        "process of its own: weights, gradients and activations."
    )
    return [ResultTable(f"Memory: {name}, {args.precision}", columns, rows, note, bars_of("peak MiB above imports"))]


def measure_adapter(name: str, args: BenchmarkArguments) -> list[ResultTable]:
    """Compare rollouts of a policy with an adapter with those of the policy alone, for each type of weights."""
    rows = []
    for weights in dict.fromkeys(("float32", args.precision)):
        calls = rollout_calls(args.size(name), getattr(torch, weights), args.precision == "bfloat16")
        seconds = time_interleaved(calls, args.repetitions, clock=time.process_time)
        base = seconds[WITHOUT_ADAPTER]
        rows += [
            [f"{what}, {weights} weights", Spread.of(values), ratio(values, base)] for what, values in seconds.items()
        ]
    note = (
        "Text-to-image with 16 points, thoughts and text guidance; LoRA of rank 32 in fp32 on both experts. Seconds of the CPU. "
        "The policy without an adapter trains its weights, of which autocast keeps copies in its type."
    )
    columns = ["rollout", "seconds", "to none"]
    return [ResultTable(f"Adapter: {name}, {args.precision}", columns, rows, note, bars_of("to none"))]


def measure_attention(name: str, args: BenchmarkArguments) -> list[ResultTable]:
    """Compare rollouts and updates with each implementation of attention that a CPU runs uncompiled."""
    size, rows = args.size(name), []
    for what, calls in attention_calls(size, args.precision).items():
        seconds = time_interleaved(calls, args.repetitions, clock=time.process_time)
        best = min(seconds.values(), key=statistics.median)
        rows += [
            [f"{what}, {attention}", Spread.of(values), ratio(values, best)] for attention, values in seconds.items()
        ]
    note = (
        f"Text-to-image, {size.num_trajectories} samples, a thought of {size.thought_tokens} tokens, guidance in all steps: a rollout with "
        f"16 points, and an update with K = {size.num_steps} of all weights. Seconds of the CPU, {torch.get_num_threads()} thread(s). Thoughts "
        "are sampled: where rounding lets one end sooner, the times of rollouts say nothing about attention."
    )
    columns = ["what", "seconds", "to the fastest"]
    return [ResultTable(f"Attention: {name}, {args.precision}", columns, rows, note, bars_of("to the fastest"))]


def measure_presets(name: str, args: BenchmarkArguments) -> list[ResultTable]:
    """Compare whole steps of self-reflection under the presets of sampling."""
    size = args.size(name)
    trainers = reflection_trainers(size, brightness, args.output_dir, args.precision == "bfloat16")
    seconds = interleaved_step_seconds(trainers, args.repetitions)
    rows = [
        [
            preset,
            evaluations_per_image(trainer),
            Spread.of(seconds[preset]),
            ratio(seconds["paper"], seconds[preset]),
        ]
        for preset, trainer in trainers.items()
    ]
    samples = trainers["paper"].args.num_generations
    note = (
        f"A step of self-reflection with 40 points, 5 trained steps and all guidance branches: {samples} samples, one initial image "
        "for every two. Seconds of the CPU, first images and update included; random weights, a reward that takes no time."
    )
    columns = ["preset", "evaluations per image", "seconds per step", "paper's over these"]
    title = f"Presets: {name}, {args.precision}"
    return [ResultTable(title, columns, rows, note, bars_of("paper's over these"))]


def measure_whole_step(name: str, args: BenchmarkArguments) -> Iterator[ResultTable]:
    """Compare whole steps with those of the released code's algorithm, in time and in peak memory."""
    title = f"Whole step: {name}, {args.precision}"
    return compared_steps(title, args.size(name), args.output_dir, args.precision, args.repetitions)


MEASUREMENTS: dict[str, Callable[[str, BenchmarkArguments], Iterable[ResultTable]]] = {
    "structures": measure_structures,
    "utilization": measure_utilization,
    "scaling": measure_scaling,
    "text_overhead": measure_text_overhead,
    "breakdown": measure_breakdown,
    "memory": measure_memory,
    "adapter": measure_adapter,
    "presets": measure_presets,
    "attention": measure_attention,
    "whole_step": measure_whole_step,
}
"""Measurements by the name of the part: each makes one table, which may come again with more rows."""
