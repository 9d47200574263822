# SPDX-License-Identifier: Apache-2.0

"""Training of the shapes world's autoencoder, of its model in stages, and of the vision tower."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from tqdm import trange
from transformers import get_cosine_schedule_with_warmup

from alphagrpo_ext.files import atomic_path
from alphagrpo_ext.models.attention.choice import choose_attention
from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.rollout.settings import TaskSettings
from alphagrpo_ext.shapes.scene import IMAGE_SIZE
from recipe_tools.shapes_pretraining.arguments import PretrainingArguments
from recipe_tools.shapes_pretraining.batches import PretrainingBatch, PretrainingLoss, build_batch, build_trajectory
from recipe_tools.shapes_pretraining.examples import (
    GROUNDING,
    PAINTING,
    PretrainingMixture,
    image_pixels,
    sample_examples,
    sample_random_scene,
    unique_images,
)
from recipe_tools.shapes_pretraining.families import ShapesAutoencoder, ShapesFamily
from recipe_tools.shapes_pretraining.paintings import Painting, load_paintings


SAMPLING = {
    "task": "reasoning_t2i",
    "image_height": IMAGE_SIZE,
    "image_width": IMAGE_SIZE,
    "num_timesteps": 11,
    "timestep_shift": 1.0,
    "cfg_text_scale": 1.0,
    "max_completion_length": 48,
    "temperature": 0.0,
}
"""How the saved model is sampled where nothing else is said."""


@dataclass(frozen=True)
class PretrainingStage:
    """
    Steps of all weights but the autoencoder's, with one mixture of examples.

    Args:
        name (`str`): Name of the stage in its state file and progress bar.
        mixture ([`PretrainingMixture`]): Examples of a batch.
        steps (`int`): Optimizer steps.
        learning_rate (`float`): Peak learning rate.
        paintings (`Sequence[Painting]`, *optional*): Images that the model painted, for the examples that are about such.
    """

    name: str
    mixture: PretrainingMixture
    steps: int
    learning_rate: float
    paintings: Sequence[Painting] = ()


def train_autoencoder(autoencoder: ShapesAutoencoder, args: PretrainingArguments) -> float:
    """
    Train the autoencoder in place and set its statistics, so that latents have mean 0 and variance 1.

    Encoder and decoder are trained together first. Then the decoder alone is trained on latents with some noise, because the
    latents that the model paints are not perfect either.

    Returns:
        `float`: Mean squared error of scenes that were not trained on, for pixels in [-1, 1].
    """
    rng = random.Random(f"vae-{args.seed}")
    generator = torch.Generator().manual_seed(args.seed)
    autoencoder.module.train()

    def train(module: nn.Module, num_steps: int, noise_level: torch.Tensor | float, description: str) -> None:
        module.requires_grad_(True)
        optimizer = torch.optim.AdamW(module.parameters(), lr=args.vae_learning_rate, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, num_steps // 20, num_steps)
        progress = trange(num_steps, desc=description)
        for _ in progress:
            pixels = image_pixels([sample_random_scene(rng) for _ in range(args.vae_batch_size)])
            posterior = autoencoder.posterior(pixels)
            latents = posterior.sample(generator)
            level = noise_level * torch.rand(len(latents), 1, 1, 1, generator=generator)
            latents = latents + level * torch.randn(latents.shape, generator=generator)
            reconstruction = autoencoder.decode(latents)
            error = F.mse_loss(reconstruction, pixels)
            loss = error + F.l1_loss(reconstruction, pixels) + 1e-5 * posterior.kl().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            progress.set_postfix(mse=f"{error.item():.5f}")
        module.requires_grad_(False)

    train(autoencoder.module, args.vae_steps, 0.0, "autoencoder")
    pixels = image_pixels([sample_random_scene(rng) for _ in range(512)])
    with torch.no_grad():
        latents = autoencoder.posterior(pixels).mean
    std = autoencoder.normalize(latents)
    train(autoencoder.decoder, args.decoder_steps, args.decoder_noise * std, "decoder")
    autoencoder.module.eval()
    with torch.no_grad():
        return F.mse_loss(autoencoder.decode(latents), pixels).item()


def train_vision_tower(model: UnifiedModel, processor: UnifiedProcessor, args: PretrainingArguments) -> None:
    """
    Train the modules that only read images alone, on answers and reflections about images.

    Nothing else changes, so a model that is given no image paints exactly as before.
    """
    mixture = PretrainingMixture(
        direct=0, thought=0, answer=args.vision_answers, reflection=args.vision_answers // 4, condition_dropout=0.0,
        noise_copies=0,
    )  # fmt: skip
    model.requires_grad_(False)
    towers = [model.get_submodule(name) for name in model.family.vision_modules]
    parameters = [parameter for tower in towers for parameter in tower.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=args.vision_learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.vision_steps // 20, args.vision_steps)
    loss_module = PretrainingLoss(model).train()
    progress = trange(args.vision_steps, desc="vision tower")
    for step in progress:
        rng = random.Random(f"vision-{args.seed}-{step}")
        batches = sample_batches(rng, torch.Generator(), model, processor, mixture)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss, _ = loss_module(batches)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        progress.set_postfix(text=f"{loss.item():.3f}")


def sample_batches(
    rng: random.Random,
    generator: torch.Generator,
    model: UnifiedModel,
    processor: UnifiedProcessor,
    mixture: PretrainingMixture,
    paintings: Sequence[Painting] = (),
) -> list[PretrainingBatch]:
    """Draw the micro-batches of one step: `rng` draws examples, `generator` draws times and noise."""
    parts = sample_examples(rng, mixture, paintings)
    images = unique_images([example for part in parts for example in part])
    latents = {}
    if images:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            latents = dict(zip(images, model.encode_images(image_pixels(images)), strict=True))
    trajectories = [
        [build_trajectory(example, latents, processor, model, mixture, generator) for example in part]
        for part in parts
    ]
    return [build_batch(part, model) for part in trajectories]


def learning_rate_factor(step: int, num_steps: int, args: PretrainingArguments) -> float:
    """Factor of the learning rate: a linear rise, a plateau, and a linear fall to 0."""
    rise = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
    decay_steps = max(1, int(num_steps * args.decay_fraction))
    return rise * min(1.0, (num_steps - step) / decay_steps)


def save_atomically(path: Path, contents: dict) -> None:
    """Save tensors to a file, which keeps its old contents if the run is killed meanwhile."""
    with atomic_path(path) as temporary:
        torch.save(contents, temporary)


def with_averaged_weights(model: UnifiedModel, average: dict[str, torch.Tensor]) -> UnifiedModel:
    """Copy a model with its averaged weights."""
    result = copy.deepcopy(model)
    result.load_state_dict({**model.state_dict(), **average})
    return result


def export(folder: Path, model: UnifiedModel, processor: UnifiedProcessor, args: PretrainingArguments) -> None:
    """Save a checkpoint in bf16, except what the family keeps in fp32. The model is converted in place."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not model.family.keeps_fp32(name):
            tensor.data = tensor.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.config.sampling = dict(SAMPLING)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    settings = {name: value for name, value in asdict(args).items() if name != "output_dir"}
    settings["mixtures"] = {"painting": asdict(PAINTING), "grounding": asdict(GROUNDING)}
    (folder / "pretraining.json").write_text(json.dumps(settings, indent=2) + "\n")


def train_stage(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    stage: PretrainingStage,
    accelerator: Accelerator,
    args: PretrainingArguments,
) -> UnifiedModel:
    """
    Train all weights but the autoencoder's. If the stage has a state file, training continues from it.

    Returns:
        [`UnifiedModel`]: A copy of the model with averaged weights.
    """
    output_dir = Path(args.output_dir)
    state_path = output_dir / f"{stage.name}.pt"
    model.requires_grad_(True)
    for name in model.family.frozen_modules:
        model.get_submodule(name).requires_grad_(False)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=stage.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    average = {name: p.detach().clone() for name, p in parameters.items()}
    start = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        start, average = state["step"], state["average"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    loss_module = accelerator.prepare_model(PretrainingLoss(model).train())
    progress = trange(
        start,
        stage.steps,
        initial=start,
        total=stage.steps,
        desc=stage.name,
        disable=not accelerator.is_main_process,
    )
    for step in progress:
        key = f"{stage.name}-{args.seed}-{step}-{accelerator.process_index}"
        rng, generator = random.Random(key), torch.Generator().manual_seed(random.Random(key).getrandbits(62))
        batches = sample_batches(rng, generator, model, processor, stage.mixture, stage.paintings)
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * learning_rate_factor(step, stage.steps, args)
        with accelerator.autocast():
            text_loss, image_loss = loss_module(batches)
        accelerator.backward(args.text_weight * text_loss + image_loss)
        accelerator.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(args.ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, parameter in parameters.items():
                average[name].lerp_(parameter, 1 - decay)
        progress.set_postfix(text=f"{text_loss.item():.3f}", image=f"{image_loss.item():.4f}")
        if accelerator.is_main_process and ((step + 1) % args.save_steps == 0 or step + 1 == stage.steps):
            state = {"model": model.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
            save_atomically(state_path, {"step": step + 1, **state})
            export(output_dir / "checkpoint", with_averaged_weights(model, average), processor, args)
    return with_averaged_weights(model, average)


def own_paintings(
    stage: str, model: UnifiedModel, processor: UnifiedProcessor, accelerator: Accelerator, args: PretrainingArguments
) -> list[Painting]:
    """Images of this process that the model paints now, or that it painted when the stage of this name began."""
    name = f"{stage}_{accelerator.process_index}"
    return load_paintings(
        Path(args.output_dir) / f"{name}.npy",
        args.num_paintings,
        f"{args.seed}-{name}",
        model.eval(),
        processor,
        TaskSettings(**{name: value for name, value in SAMPLING.items() if name != "task"}),
        show_progress=accelerator.is_main_process,
    )


def load_autoencoder(autoencoder: ShapesAutoencoder, accelerator: Accelerator, args: PretrainingArguments) -> None:
    """Load the autoencoder in the output folder into the model. If there is none, the main process trains it first."""
    path = Path(args.output_dir) / "autoencoder.pt"
    if accelerator.is_main_process and not path.exists():
        # The other processes wait, so this one can use their cores.
        num_threads = torch.get_num_threads()
        torch.set_num_threads(accelerator.num_processes * num_threads)
        error = train_autoencoder(autoencoder, args)
        torch.set_num_threads(num_threads)
        state = autoencoder.module.state_dict()
        save_atomically(path, {"vae": state, "config": autoencoder.settings, "mse": error})
    accelerator.wait_for_everyone()
    saved = torch.load(path, weights_only=True)
    autoencoder.load_settings(saved["config"])
    autoencoder.module.load_state_dict(saved["vae"])


def train_painter(
    family: ShapesFamily, processor: UnifiedProcessor, accelerator: Accelerator, args: PretrainingArguments
) -> UnifiedModel:
    """Train a model to paint, and then its vision tower."""
    model = family.build_model(processor)
    model.set_attn_implementation(choose_attention(model.family, accelerator.device.type).name)
    load_autoencoder(family.autoencoder(model), accelerator, args)
    model = train_stage(
        model, processor, PretrainingStage("painting", PAINTING, args.steps, args.learning_rate), accelerator, args
    )
    path = Path(args.output_dir) / "vision.pt"
    if accelerator.is_main_process and not path.exists():
        train_vision_tower(model, processor, args)
        save_atomically(path, model.state_dict())
    accelerator.wait_for_everyone()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model
