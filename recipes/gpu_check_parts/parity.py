# SPDX-License-Identifier: Apache-2.0

"""Whether a device computes what a CPU computes: scores and the first update in fp32, and the on-policy ratio in bf16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.flow.transitions import transition
from alphagrpo_ext.models.attention.choice import attention_implementations
from alphagrpo_ext.models.contract import PackedOutput, UnifiedModel, UnifiedProcessor
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.objectives import OBJECTIVES, ImageScores, ObjectiveConfig
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.rollout.generator import sample_generator
from alphagrpo_ext.trajectory import Trajectory
from benchmark_parts.tables import ResultTable
from gpu_check_parts.arguments import IMAGE_SIZES
from gpu_check_parts.results import PartResult
from recipe_tools.shapes_pretraining.families import SHAPES_FAMILIES


PARITY_GUIDANCE = GuidanceConfig(text_scale=3.0, image_scale=1.5, interval=(0.0, 1.0))
NOISE_LEVEL = 0.7
LEARNING_RATE = 1e-3
BOUNDS = {
    "log-probability": 2e-4,
    "velocity": 5e-4,
    "gradient norm": 1e-3,
    "first update": 5e-3,
    "text ratio": 0.15,
    "image ratio": 0.03,
}
"""
Largest differences that pass. In fp32, sums are taken in another order, and guidance multiplies what differs; AdamW's first step
depends on little more than the sign of a gradient, which rounding changes where a gradient is almost 0. In bf16, the packed forward
rounds other intermediate results than sampling with a cache. All are at least five times what was seen on a CPU.
"""


@dataclass(frozen=True)
class Scores:
    """
    What a packed forward, its backward and an optimizer step give, on the CPU.

    Args:
        log_probs (`torch.Tensor` of shape `(scores,)`): Log-probability of every sampled token.
        velocities (`torch.Tensor` of shape `(images, K, tokens, channels)`): Guided velocities.
        gradient_norm (`float`): Norm of the gradient of one update's loss.
        update (`torch.Tensor` of shape `(parameters,)`): Change of all trained weights by AdamW's first step.
    """

    log_probs: torch.Tensor
    velocities: torch.Tensor
    gradient_norm: float
    update: torch.Tensor


def build_tiny(name: str, attention: str) -> tuple[UnifiedModel, UnifiedProcessor]:
    """The packaged BAGEL, or a tiny Cosmos3 with random weights, always the same, in fp32 on the CPU."""
    if name == "bagel-shapes":
        model, processor = load_model(name, dtype="float32", attn_implementation=attention)
    else:
        torch.manual_seed(0)
        family = SHAPES_FAMILIES.get("cosmos3")()
        processor = family.build_processor()
        model = family.build_model(processor).eval()
        model.set_attn_implementation(attention)
    model.family.freeze_vision_tower(model)
    return model, processor


def sample(model: UnifiedModel, processor: UnifiedProcessor, size: int) -> list[Trajectory]:
    """Four trajectories of two prompts, with a thought and three trained steps each."""
    denoising = DenoisingConfig(6, 1.0, PARITY_GUIDANCE, noise_level=NOISE_LEVEL, window_start=1, window_size=3)
    prompts = ("draw a red circle", "draw two blue squares")
    rows = [{"prompt": prompt} for prompt in prompts for _ in range(2)]
    generate = RolloutGenerator(model, processor, TASKS.get("reasoning_t2i")(think=True))
    generators = [sample_generator(0, 0, index) for index in range(len(rows))]
    return generate(rows, generators, RolloutConfig(size, size, max_new_tokens=24, denoising=denoising))


def packed_scores(model: UnifiedModel, trajectories: Sequence[Trajectory]) -> tuple[PackedOutput, ImageScores]:
    """A packed forward on the model's device."""
    batch = model.pack(trajectories, PARITY_GUIDANCE)
    output = model(**{name: tensor.to(model.device) for name, tensor in batch.inputs.items()})
    return output, ImageScores.from_packed(trajectories, batch, output)


def policy_loss(output: PackedOutput, scores: ImageScores) -> torch.Tensor:
    """Flow-GRPO with advantages that differ, and the mean log-probability of the texts."""
    objective = OBJECTIVES.get("flow_grpo")(ObjectiveConfig())
    advantages = torch.linspace(-1, 2, len(scores.velocities), device=scores.velocities.device)
    return objective(scores, advantages).loss.mean() - output.log_probs.mean()


def flattened(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """All elements of tensors, on the CPU."""
    return torch.cat([tensor.detach().flatten().cpu() for tensor in tensors])


def scores_and_update(model: UnifiedModel, trajectories: Sequence[Trajectory]) -> Scores:
    """Scores of trajectories, and the first update with them, after which the model has new weights and no gradients."""
    output, scores = packed_scores(model, trajectories)
    policy_loss(output, scores).backward()
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.stack([parameter.grad.norm() for parameter in trained]).norm().item()
    before = flattened(trained)
    torch.optim.AdamW(trained, lr=LEARNING_RATE).step()
    model.zero_grad()
    return Scores(output.log_probs.detach().cpu(), scores.velocities.detach().cpu(), norm, flattened(trained) - before)


def largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()


def relative_distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected: 0 only for the same norm and direction."""
    return (torch.dist(actual.float(), expected.float()) / expected.float().norm()).item()


def fp32_differences(actual: Scores, expected: Scores) -> dict[str, float]:
    """Largest differences; those of the gradient's norm and of the update are relative."""
    return {
        "log-probability": largest(actual.log_probs - expected.log_probs),
        "velocity": largest(actual.velocities - expected.velocities),
        "gradient norm": abs(actual.gradient_norm / expected.gradient_norm - 1),
        "first update": relative_distance(actual.update, expected.update),
    }


@torch.no_grad()
def on_policy_differences(model: UnifiedModel, processor: UnifiedProcessor, size: int) -> dict[str, float]:
    """How far ratios of the packed forward to the policy that sampled, the same weights with a cache, are from 1."""
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        trajectories = sample(model, processor, size)
        output, scores = packed_scores(model, trajectories)
    sampled = [p for t in trajectories for text in t.sampled_texts for p in text.log_probs]
    replayed = transition(
        "flow_sde",
        scores.latents,
        scores.velocities,
        scores.t,
        scores.t_next,
        NOISE_LEVEL,
        next_latents=scores.next_latents,
    )
    recorded = torch.stack([image.window.log_probs for t in trajectories for image in t.sampled_images])
    return {
        "text ratio": largest(torch.expm1(output.log_probs.cpu() - torch.tensor(sampled))),
        "image ratio": largest(torch.expm1(replayed.log_prob.cpu() - recorded.cpu())),
    }


def to_bf16(model: UnifiedModel) -> UnifiedModel:
    """Cast weights to bf16, except those that the family keeps in fp32."""
    for name, parameter in model.named_parameters():
        if not model.family.keeps_fp32(name):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def check_parity(name: str, device: torch.device) -> Iterator[PartResult]:
    """
    Compare a tiny model on a device with the same model on the CPU, for each attention that it has.

    Args:
        name (`str`): One of `TINY_SIZES`.
        device (`torch.device`): The device to check.

    Returns:
        `Iterator[PartResult]`: What is known after each attention.
    """
    model, processor = build_tiny(name, "eager")
    size = IMAGE_SIZES[name]
    trajectories = sample(model, processor, size)
    expected = scores_and_update(model, trajectories)
    columns = ["attention", "precision", "difference in", "largest", "bound", "verdict"]
    note = (
        "fp32: against the CPU with eager attention, for trajectories that the CPU sampled. bf16: ratio of the packed forward to the "
        "rollout, both on the device, minus 1."
    )
    rows = []
    for attention in attention_implementations(model.family):
        on_device = build_tiny(name, attention)[0].to(device)
        # TensorFloat-32 is on by default in convolutions.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = fp32_differences(scores_and_update(on_device, trajectories), expected)
        found |= on_policy_differences(to_bf16(on_device), processor, size)
        for what, value in found.items():
            # NaN does not pass.
            verdict = "pass" if value <= BOUNDS[what] else "FAIL"
            rows.append([attention, "bf16" if "ratio" in what else "fp32", what, value, BOUNDS[what], verdict])
        passed = all(row[-1] == "pass" for row in rows)
        yield PartResult(ResultTable(f"Parity: {name}", columns, list(rows), note), passed)
