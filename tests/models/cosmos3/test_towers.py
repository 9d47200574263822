# SPDX-License-Identifier: Apache-2.0

"""Sizes that the vision tower and the autoencoder of Cosmos3 take."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from transformers.models.cosmos3_edge.image_processing_pil_cosmos3_edge import Cosmos3EdgeImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from alphagrpo_ext.models.cosmos3.autoencoder import Cosmos3Autoencoder
from alphagrpo_ext.models.cosmos3.vision import Cosmos3Vision, smart_size
from models.cosmos3.tiny_cosmos3 import AUTOENCODER, VARIANTS, randomize, tiny_config


SIZES = ((256, 256), (24, 24), (20, 300), (640, 480), (511, 1025), (33, 47), (1000, 3000))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("areas", [(65536, 4096 * 4096), (1024, 300_000)])
def test_sizes_and_tokens_are_those_of_the_image_processor(variant: str, areas: tuple[int, int]) -> None:
    config = tiny_config(variant)
    size = {"shortest_edge": areas[0], "longest_edge": areas[1]}
    processor = (
        Qwen2VLImageProcessorPil(patch_size=16, size=size)
        if variant == "omni"
        else Cosmos3EdgeImageProcessorPil(size=size)
    )
    for height, width in SIZES:
        image = Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8))
        grid = processor([image], return_tensors="pt")["image_grid_thw"][0].tolist()
        resized = smart_size(config, height, width, *areas)
        assert [resized[0] // 16, resized[1] // 16] == grid[1:]
        assert resized[0] * resized[1] // config.vision_stride**2 == grid[1] * grid[2] // 4


def test_a_tower_refuses_a_size_that_is_no_whole_number_of_tokens() -> None:
    tower = Cosmos3Vision(tiny_config("edge"))
    with pytest.raises(ValueError, match="64 x 40 pixels: both sides must be multiples of 32"):
        tower([torch.zeros(3, 32, 32), torch.zeros(3, 64, 40)])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_images_of_one_call_do_not_see_each_other(variant: str) -> None:
    tower = randomize(Cosmos3Vision(tiny_config(variant)))
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator) * 2 - 1 for size in ((64, 96), (32, 32), (96, 32))]
    features, deepstack = tower(images)
    alone = [tower([image]) for image in images]
    assert (features - torch.cat([one for one, _ in alone])).abs().max() < 1e-5
    assert len(deepstack) == (2 if variant == "omni" else 0)
    for i, layer in enumerate(deepstack):
        assert (layer - torch.cat([more[i] for _, more in alone])).abs().max() < 1e-5


@pytest.mark.parametrize("patch_size", [None, 1])
@torch.no_grad()
def test_an_autoencoder_of_eight_pixels_a_token(patch_size: int | None) -> None:
    """Smaller than the released ones, as for a tiny model that is trained on a CPU."""
    sizes = {"dim_mult": [1, 2, 2], "temperal_downsample": [False, True], "scale_factor_spatial": 4}
    sizes |= {"in_channels": 3, "out_channels": 3, "patch_size": patch_size}
    config = tiny_config("edge", autoencoder_config={**AUTOENCODER, **sizes})
    assert config.latent_downsample == 8
    autoencoder = randomize(Cosmos3Autoencoder(config))
    assert isinstance(autoencoder.vae, AutoencoderKLWan)
    images = torch.rand(2, 3, 24, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = autoencoder.encode(images)
    assert tokens.shape == (2, 6, 64)
    assert (autoencoder.encode(images[1:]) - tokens[1:]).abs().max() < 1e-5
    decoded = autoencoder.decode(tokens, (3, 2))
    assert decoded.shape == images.shape and decoded.abs().max() <= 1
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())


@pytest.mark.parametrize("residual", [False, True])
@torch.no_grad()
def test_a_frame_goes_through_convolutions_of_two_dimensions(residual: bool) -> None:
    """The library's own autoencoder computes the same, with zeros for the frames before."""
    settings = AUTOENCODER if residual else {**AUTOENCODER, "is_residual": False}
    autoencoder = randomize(Cosmos3Autoencoder(tiny_config("edge", autoencoder_config=settings)))
    library = AutoencoderKLWan.from_config(autoencoder.vae.config)
    library.load_state_dict(autoencoder.vae.state_dict())
    frames = torch.rand(2, 3, 1, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posteriors = [vae.encode(frames).latent_dist.parameters for vae in (autoencoder.vae, library)]
    torch.testing.assert_close(*posteriors, atol=1e-5, rtol=1e-5)
    latents = posteriors[0].chunk(2, dim=1)[0]
    decoded = [vae.decode(latents).sample for vae in (autoencoder.vae, library)]
    torch.testing.assert_close(*decoded, atol=1e-5, rtol=1e-5)
    assert decoded[0].std() > 0.01
