# SPDX-License-Identifier: Apache-2.0

"""How fast a model with random weights samples and trains on a device, and how much memory an update takes there."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace

import torch
from peft.helpers import disable_input_dtype_casting
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from alphagrpo_ext.models.attention.choice import attention_implementations
from alphagrpo_ext.models.contract import FAMILIES, UnifiedModel, UnifiedProcessor
from alphagrpo_ext.objectives import ImageScores
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.rollout.generator import sample_generator
from alphagrpo_ext.trajectory import Trajectory
from benchmark_parts.families import BENCHMARK_FAMILIES
from benchmark_parts.flops import counted_flops
from benchmark_parts.tables import ResultTable
from benchmark_parts.timing import matmul_functions, time_interleaved
from gpu_check_parts.arguments import IMAGE_SIZES, GPUCheckArguments
from gpu_check_parts.candidates import waiting
from gpu_check_parts.parity import build_tiny, policy_loss
from gpu_check_parts.results import PartResult
from recipe_tools.memory import (
    build_policy,
    estimate_memory,
    example_trajectories,
    leave_meta,
    prepare_policy,
    released_config,
)
from recipe_tools.memory_settings import MemorySettings
from recipe_tools.shapes_pretraining.families import SHAPES_FAMILIES


PEAK_SIZES = {"cpu": (256, 512)}
LARGE_PEAK_SIZES = (4096, 8192)
"""Sides of the matrices whose multiplication is the peak of a device."""
NUM_TIMESTEPS = 16
"""Points of the schedule in training."""


def size_config(name: str) -> PreTrainedConfig:
    """The configuration of a size."""
    config = released_config(name)
    return build_tiny(name, "eager")[0].config if config is None else config


def build_on_device(config: PreTrainedConfig, attention: str, device: torch.device | str) -> UnifiedModel:
    """
    A model with random weights that are drawn on the device and never held by the host: bf16, but for what the family
    keeps in fp32.
    """
    family = FAMILIES.get(config.model_type)()
    with torch.device(device):
        model = family.model_class._from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            if family.keeps_fp32(name):
                parameter.data = parameter.data.float()
        BENCHMARK_FAMILIES[config.model_type].initialize(model)
    # Tables that are computed by NumPy.
    return model.to(device)


def update_settings(name: str, num_steps: int, attention: str, args: GPUCheckArguments) -> MemorySettings:
    """An update of one trajectory."""
    side = IMAGE_SIZES[name]
    return MemorySettings(
        lora_rank=args.lora_rank,
        batch_size=1,
        prompt_tokens=args.prompt_tokens,
        thought_tokens=args.thought_tokens,
        height=side,
        width=side,
        sde_window_size=num_steps,
        image_steps_per_forward="all",
        attn_implementation=attention,
    )


def update(model: UnifiedModel, policy: torch.nn.Module, settings: MemorySettings) -> None:
    """Pack one trajectory, and run forward and backward."""
    trajectories = example_trajectories(model, settings)
    batch = model.pack(trajectories, settings.guidance)
    inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs.items()}
    with (
        torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=settings.autocast),
        disable_input_dtype_casting(policy, active=settings.autocast),
    ):
        output = policy(**inputs)
    policy_loss(output, ImageScores.from_packed(trajectories, batch, output)).backward()


def update_flops(config: PreTrainedConfig, settings: MemorySettings) -> int:
    """Operations of all matrix multiplications and convolutions of an update, counted on tensors without contents."""
    settings = replace(settings, attn_implementation="eager", dtype="float32", autocast=False)
    with torch.device("meta"):
        model, policy = build_policy(config, settings)
    batch = model.pack(example_trajectories(model, settings), settings.guidance)
    with FakeTensorMode() as fake:
        leave_meta(policy)
        # A fake tensor has no values to read.
        numbers = model.family.number_inputs
        inputs = {name: t if name in numbers else fake.from_tensor(t) for name, t in batch.inputs.items()}

        def forward_and_backward() -> None:
            output = policy(**inputs)
            # The loss of training reads where branches are, and multiplies no matrices.
            (output.velocities.sum() + output.log_probs.sum()).backward()

        return counted_flops(forward_and_backward)


def rollout(
    model: UnifiedModel, processor: UnifiedProcessor, settings: MemorySettings, num_samples: int
) -> list[Trajectory]:
    """Samples of one prompt with the settings of an update."""
    denoising = DenoisingConfig(
        NUM_TIMESTEPS, guidance=settings.guidance, window_start=0, window_size=settings.sde_window_size
    )
    config = RolloutConfig(
        settings.height, settings.width, max_new_tokens=settings.thought_tokens, denoising=denoising
    )
    generate = RolloutGenerator(model, processor, TASKS.get("reasoning_t2i")(think=True))
    generators = [sample_generator(0, 0, index) for index in range(num_samples)]
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        return generate([{"prompt": "draw a red circle"}] * num_samples, generators, config)


def matmul_peak(device: torch.device, repetitions: int) -> float:
    """Operations per second of the fastest bf16 multiplication of square matrices."""
    sizes = PEAK_SIZES.get(device.type, LARGE_PEAK_SIZES)
    functions = matmul_functions(torch.bfloat16, device, sizes)
    seconds = time_interleaved({str(size): waiting(f, device) for size, f in functions.items()}, repetitions)
    return 2 * max(sizes) ** 3 / min(value for values in seconds.values() for value in values)


def measure_steps(
    model: UnifiedModel,
    policy: torch.nn.Module,
    settings: MemorySettings,
    peak: float,
    args: GPUCheckArguments,
) -> list[int | float | str]:
    """The row of one number of trained steps."""
    device = model.device
    processor = SHAPES_FAMILIES.get(model.config.model_type)().build_processor()
    has_memory = device.type == "cuda"
    calls = {
        "rollout": lambda: rollout(model, processor, settings, args.num_samples),
        "update": lambda: update(model, policy, settings),
    }
    seconds, gib = {}, {}
    for name, function in calls.items():
        # Training gathers gradients in the same tensors, so those of the update before stay.
        policy.train(name == "update")
        if has_memory:
            torch.cuda.reset_peak_memory_stats(device)
        timed = time_interleaved({name: waiting(function, device)}, args.repetitions)[name]
        seconds[name] = statistics.median(timed)
        gib[name] = torch.cuda.max_memory_allocated(device) / 2**30 if has_memory else "-"
    estimate = estimate_memory(model.config, settings)
    # The check takes no optimizer step.
    estimated = (estimate.total - estimate.optimizer) / 2**30
    rate = update_flops(model.config, settings) / seconds["update"]
    per_second = args.num_samples / (seconds["rollout"] + args.num_samples * seconds["update"])
    return [
        settings.sde_window_size,
        seconds["rollout"],
        seconds["update"],
        per_second,
        rate / 1e12,
        rate / peak,
        gib["rollout"],
        gib["update"],
        estimated,
    ]


def check_speed(name: str, device: torch.device, args: GPUCheckArguments) -> Iterator[PartResult]:
    """
    Measure rollouts and updates of a model with an adapter.

    Args:
        name (`str`): Name of a size.
        device (`torch.device`): The device to check.
        args ([`GPUCheckArguments`]): Numbers and lengths.

    Returns:
        `Iterator[PartResult]`: What is known after each number of trained steps.
    """
    config = size_config(name)
    family = FAMILIES.get(config.model_type)()
    attention = attention_implementations(family)[0]
    settings = [update_settings(name, num_steps, attention, args) for num_steps in args.trained_steps]
    peak = matmul_peak(device, args.repetitions)
    torch.manual_seed(0)
    model = build_on_device(config, attention, device)
    with torch.device(device):
        policy = prepare_policy(model, settings[0])
    columns = [
        "K",
        "rollout, s",
        "update, s",
        "samples/s",
        "TFLOP/s of the update",
        "of the peak",
        "peak of the rollout, GiB",
        "peak of the update, GiB",
        "its estimate, GiB",
    ]
    note = (
        f"Random weights in bf16, LoRA of rank {args.lora_rank}, {IMAGE_SIZES[name]} pixels, {attention}. A rollout has "
        f"{args.num_samples} samples with thoughts of at most {args.thought_tokens} tokens and {NUM_TIMESTEPS - 1} steps; an update has "
        f"one of them, so that samples/s counts an update for each. Operations that the backward repeats count, and so does masked "
        f"attention that a kernel may skip. Peak: {peak / 1e12:.3g} TFLOP/s, of bf16 square matrices."
    )
    rows = []
    for own_settings in settings:
        rows.append(measure_steps(model, policy, own_settings, peak, args))
        yield PartResult(ResultTable(f"Speed: {name}", columns, list(rows), note), passed=True)
