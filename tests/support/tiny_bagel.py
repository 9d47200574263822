# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.bagel import BagelConfig, BagelModel
from alphagrpo_ext.models.bagel.guidance import BRANCHES, branch_context
from alphagrpo_ext.rollout.denoising import DenoisingConfig, denoise
from alphagrpo_ext.trajectory import ImageSegment, Segment, TextSegment, Trajectory


# Four pixels a latent token, and a vocabulary so small that some sampled texts end by themselves.
TINY_CONFIG: dict[str, Any] = {
    "text_config": {
        "vocab_size": 24,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 20,
        "patch_size": 4,
    },
    "vae_config": {
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
    },
    "max_latent_size": 4,
    "bos_token_id": 20,
    "eos_token_id": 21,
    "image_start_token_id": 22,
    "image_end_token_id": 23,
}


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every weight a size at which it matters: attention is far from uniform, and the velocity is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.startswith("vae."):
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(scale * noise + (1 if name.endswith("norm.weight") else 0))


@pytest.fixture
def make_tiny_bagel() -> Callable[..., BagelModel]:
    """Builds a model with random weights, in fp32 and evaluation mode; keyword arguments go to the configuration."""

    def make(**kwargs: Any) -> BagelModel:
        model = BagelModel(BagelConfig(**TINY_CONFIG, **kwargs))
        randomize(model)
        return model.eval()

    return make


@pytest.fixture
def tiny_bagel(make_tiny_bagel: Callable[..., BagelModel]) -> BagelModel:
    return make_tiny_bagel()


class Rollout:
    """
    Samples trajectories as a trainer does: a prompt's context is prefilled once a group, all guidance branches are in
    one cache, and a thought stays in the cache that the image is then painted from.

    Args:
        model ([`BagelModel`]): Samples.
        config ([`DenoisingConfig`]): How images are painted.
        grid (`tuple[int, int]`): Size of images, in tokens.
        max_new_tokens (`int`): Limit of a thought; 0 for none.
        seed (`int`): Of prompts and samples.
        sampling (`dict[str, Any]`): Options of `sample_text`.
    """

    def __init__(
        self,
        model: BagelModel,
        config: DenoisingConfig,
        grid: tuple[int, int],
        max_new_tokens: int,
        seed: int,
        sampling: dict[str, Any],
    ):
        self.model, self.config, self.grid, self.max_new_tokens = model, config, grid, max_new_tokens
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(seed)

    def text(self, length: int) -> TextSegment:
        return TextSegment(torch.randint(0, 20, (length,), generator=self.generator).tolist())

    def image(self) -> ImageSegment:
        stride = self.model.latent_downsample
        pixels = torch.rand(3, self.grid[0] * stride, self.grid[1] * stride, generator=self.generator) * 2 - 1
        with torch.no_grad():
            return ImageSegment(self.model.encode_images(pixels[None])[0], self.grid, pixels)

    def take_turn(self, contexts: Sequence[list[Segment]], group_size: int) -> list[Trajectory]:
        """Continue every context `group_size` times with a thought and an image."""
        branches = self.branches(contexts)
        num_samples = len(contexts) * group_size
        capacity = self.model.text_slots(self.max_new_tokens) + self.model.image_slots(self.grid)
        cache = self.model.prefill(sum(branches.values(), []), group_size, capacity)
        samples = [Trajectory(list(context)) for context in contexts for _ in range(group_size)]
        if self.max_new_tokens:
            uniforms = torch.rand(num_samples, self.max_new_tokens, generator=self.generator)
            sampled = self.model.sample_text(cache, uniforms, **self.sampling)
            thoughts = zip(sampled.token_ids, sampled.ended, sampled.log_probs, strict=True)
            for sample, (ids, ended, log_probs) in zip(samples, thoughts, strict=True):
                sample.segments.append(TextSegment(ids, sampled=True, ended=ended, log_probs=log_probs))
        shape = (self.grid[0] * self.grid[1], self.model.config.latent_channels)
        noise = torch.randn(num_samples, *shape, generator=self.generator)
        window_noise = torch.randn(num_samples, self.config.window_size, *shape, generator=self.generator)
        latents, windows = denoise(self.model, cache, noise, self.grid, self.config, window_noise)
        pixels = self.model.decode_latents(latents, self.grid).clamp(-1, 1)
        for i, sample in enumerate(samples):
            contexts_of_image = {name: branches[name][i // group_size] for name in BRANCHES[1:]}
            sample.segments.append(
                ImageSegment(
                    latents[i],
                    self.grid,
                    pixels[i],
                    sampled=True,
                    window=windows[i],
                    guidance_contexts=contexts_of_image,
                )
            )
        return samples

    def branches(self, contexts: Sequence[list[Segment]]) -> dict[str, list[list[Segment]]]:
        """What each guidance branch sees before the thought."""
        return {name: [branch_context(name, context) for context in contexts] for name in BRANCHES}


@pytest.fixture
def rollout() -> Callable[..., list[Trajectory]]:
    """
    Samples two groups of trajectories of a task: `"t2i"` (prompt, image), `"think"` (system prompt, prompt, thought,
    image), `"edit"` (image, request, thought, image) or `"two_rounds"` (`"think"`, and then request, thought, image).
    """

    def sample(
        model: BagelModel,
        task: str,
        config: DenoisingConfig | None = None,
        group_size: int = 2,
        grid: tuple[int, int] = (2, 3),
        max_new_tokens: int = 6,
        seed: int = 0,
        **sampling: Any,
    ) -> list[Trajectory]:
        if config is None:
            guidance = GuidanceConfig(text_scale=3.0, image_scale=1.5, interval=(0.0, 1.0))
            config = DenoisingConfig(num_timesteps=7, guidance=guidance, window_start=1, window_size=3)
        turn = Rollout(model, config, grid, 0 if task == "t2i" else max_new_tokens, seed, sampling)
        starts = {
            "t2i": lambda: [],
            "think": lambda: [turn.text(4)],
            "edit": lambda: [turn.image()],
            "two_rounds": lambda: [turn.text(4)],
        }
        # Prompts of different lengths, so that the shorter context is padded.
        samples = turn.take_turn([[*starts[task](), turn.text(3 + 2 * i)] for i in range(2)], group_size)
        if task == "two_rounds":
            samples = turn.take_turn([[*sample.segments, turn.text(5)] for sample in samples], 1)
        return samples

    return sample
