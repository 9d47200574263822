# SPDX-License-Identifier: Apache-2.0

"""Configurations of Cosmos3: the sizes of the released checkpoints, and values that are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.transformers.transformer_cosmos3 import Cosmos3OmniTransformer

from alphagrpo_ext.models.cosmos3.configuration_cosmos3 import Cosmos3Config, check_cosmos3_values
from alphagrpo_ext.models.cosmos3.modeling_cosmos3 import Cosmos3Model
from models.cosmos3.tiny_cosmos3 import VARIANTS, make_reasoner, tiny_config, vision_state


# Vision towers as released. Edge's configuration has the library's defaults.
TOWERS: dict[str, dict[str, Any]] = {"omni": {"out_hidden_size": 4096}, "edge": {}}
BILLIONS = {"omni": (15.17, 0.58), "edge": (3.37, 0.49)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_released_sizes_have_the_names_and_shapes_of_the_libraries(variant: str) -> None:
    config = Cosmos3Config(variant, vision_config=TOWERS[variant])
    with torch.device("meta"):
        model = Cosmos3Model(config)
        transformer = Cosmos3OmniTransformer(**config.transformer_config)
        autoencoder = AutoencoderKLWan(**config.autoencoder_config)
        tower = vision_state(make_reasoner(config), variant)
    expected = {f"transformer.{name}": tensor for name, tensor in transformer.state_dict().items()}
    expected |= {f"autoencoder.vae.{name}": tensor for name, tensor in autoencoder.state_dict().items()}
    prefix = "vision.visual." if variant == "omni" else "vision."
    expected |= {prefix + name.removeprefix("model."): tensor for name, tensor in tower.items()}
    assert {name: t.shape for name, t in model.state_dict().items()} == {name: t.shape for name, t in expected.items()}
    counts = [
        sum(t.numel() for n, t in expected.items() if n.startswith(part)) for part in ("transformer.", "vision.")
    ]
    assert [round(count / 1e9, 2) for count in counts] == list(BILLIONS[variant])
    assert (model.latent_downsample, model.latent_channels, config.vision_stride) == (32, 192, 32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_configuration_is_read_back(variant: str, tmp_path: Path) -> None:
    config = tiny_config(variant, timestep_shift=5.0, pipeline_config={"default_use_system_prompt": False})
    config.save_pretrained(tmp_path)
    back = Cosmos3Config.from_pretrained(tmp_path)
    assert back.to_dict() == config.to_dict()
    assert config.get_text_config().vocab_size == config.transformer_config["vocab_size"]


REFUSED = {
    "variant": ({"variant": "nano"}, "variant='nano' .* none of omni, edge"),
    "hidden": ({"transformer_config": {"hidden_size": 2.5}}, "hidden_size .* whole number"),
    "huge": ({"transformer_config": {"num_hidden_layers": 10**6}}, "num_hidden_layers"),
    "infinite": ({"transformer_config": {"rope_theta": float("inf")}}, "rope_theta .* finite"),
    "groups": ({"transformer_config": {"num_attention_heads": 30}}, "no multiple of num_key_value_heads=8"),
    "activation": ({"transformer_config": {"hidden_act": "relu2"}}, "does not belong to the variant 'omni'"),
    "tokens": ({"transformer_config": {"patch_latent_dim": 48}}, r"is not latent_channel \* latent_patch_size"),
    "sound": ({"transformer_config": {"sound_gen": True}}, "has sound_gen, but no sound_dim"),
    "latents": ({"autoencoder_config": {"z_dim": 16}}, "z_dim=16 .* latent_channel=48"),
    "means": ({"autoencoder_config": {"latents_mean": [0.0]}}, "latents_mean .* z_dim=48"),
    "stages": ({"autoencoder_config": {"dim_mult": [1, 2]}}, "scale_factor_spatial=16 .* is not the 4"),
    "vision": ({"vision_config": {"patch_size": 0}}, "vision_config.patch_size"),
    "vocabulary": ({"image_token_id": 200_000}, "image_token_id=200000 .* beyond the vocabulary"),
    "shift": ({"timestep_shift": 0.0}, "timestep_shift"),
    "mapping": ({"vision_config": [1]}, "vision_config .* mapping"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_impossible_values_are_refused(kind: str) -> None:
    values, message = REFUSED[kind]
    parts = ("", "transformer_config", "vision_config", "autoencoder_config")
    with pytest.raises(ValueError, match=message):
        check_cosmos3_values(values, dict.fromkeys(parts, Path("config.json")))
