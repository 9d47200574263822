# SPDX-License-Identifier: Apache-2.0

"""
Cosmos3 in the shapes world, in Nano's form but for its sizes.

Nano's form, because its chat template opens a reply without `<think>`, so that a question is answered after the same header in
training and when a judge asks it, and because its normalised queries and keys allow a high learning rate.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResidualBlock,
    unpatchify,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from alphagrpo_ext.models.cosmos3.chat_template import chat_pieces
from alphagrpo_ext.models.cosmos3.configuration_cosmos3 import Cosmos3Config
from alphagrpo_ext.models.cosmos3.modeling_cosmos3 import Cosmos3Model
from alphagrpo_ext.models.cosmos3.processing_cosmos3 import (
    NEGATIVE_RESOLUTION_SENTENCE,
    RESOLUTION_SENTENCE,
    Cosmos3Processor,
)
from alphagrpo_ext.shapes.scene import IMAGE_SIZE
from alphagrpo_ext.shapes.text import (
    GENERATION_SYSTEM_PROMPT,
    KEEP_VERDICT,
    REFLECTION_PROMPT,
    REPAINT_VERDICT,
    vocabulary,
)
from recipe_tools.shapes_pretraining.families import SHAPES_FAMILIES, ShapesAutoencoder, ShapesFamily


_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
HIDDEN_SIZE = 128
LATENT_CHANNELS = 8
AUTOENCODER_PATCH_SIZE = 2
TOKEN_SIZE = 4
"""Pixels per side of a latent token, so that it has 32 values, a quarter of the width. One of 128 values leaves no room."""
VISION_PATCH_SIZE = 4


def build_cosmos3_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word and per full stop, and a chat template of Nano's form."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    sentences = [text.format(**size) for text in (RESOLUTION_SENTENCE, NEGATIVE_RESOLUTION_SENTENCE)]
    framing = sorted({word.rstrip(".") for sentence in sentences for word in sentence.split()})
    known = vocabulary()
    new = [word for word in ("system", "user", "assistant", *framing) if word not in known]
    words = ["<unk>", *_SPECIAL_TOKENS, *known, *new]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\."), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[token for token in _SPECIAL_TOKENS if token not in ("<|endoftext|>", "<|im_end|>")],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_cosmos3_config(tokenizer: PreTrainedTokenizerFast) -> Cosmos3Config:
    """
    Make a configuration with about 3 million parameters. A latent token is a square of 4 pixels, as in BAGEL's.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): Tokenizer with the vocabulary and the chat template.
    """
    token_ids = tokenizer.get_vocab()
    latent_patch_size = TOKEN_SIZE // AUTOENCODER_PATCH_SIZE
    return Cosmos3Config(
        variant="omni",
        transformer_config={
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 2 * HIDDEN_SIZE,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "rope_axes_dim": [6, 5, 5],
            "rope_theta": 10000.0,
            "latent_channel": LATENT_CHANNELS,
            "latent_patch_size": latent_patch_size,
            "patch_latent_dim": LATENT_CHANNELS * latent_patch_size**2,
            "action_gen": False,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": VISION_PATCH_SIZE,
            "spatial_merge_size": 1,
            "out_hidden_size": HIDDEN_SIZE,
            "num_position_embeddings": (IMAGE_SIZE // VISION_PATCH_SIZE) ** 2,
            "deepstack_visual_indexes": [0],
        },
        autoencoder_config={
            "base_dim": 48,
            "decoder_base_dim": 48,
            "z_dim": LATENT_CHANNELS,
            "dim_mult": [1],
            "num_res_blocks": 1,
            "temperal_downsample": [],
            "is_residual": True,
            "in_channels": 3 * AUTOENCODER_PATCH_SIZE**2,
            "out_channels": 3 * AUTOENCODER_PATCH_SIZE**2,
            "patch_size": AUTOENCODER_PATCH_SIZE,
            "scale_factor_spatial": AUTOENCODER_PATCH_SIZE,
            "latents_mean": [0.0] * LATENT_CHANNELS,
            "latents_std": [1.0] * LATENT_CHANNELS,
        },
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=16384,
        timestep_shift=1.0,
        chat_pieces=chat_pieces(tokenizer),
    )


def initialize_autoencoder(vae: AutoencoderKLWan) -> None:
    """
    Random weights from which a small autoencoder learns in a thousand steps. PyTorch's defaults stay for as long with images of
    one color.

    A frame that stands alone meets one of the three frames of a kernel, so the variance is that of one. Residual branches begin
    at 0, and the noise of the posterior is small.
    """
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            fan_in = module.weight[0].numel() / module.kernel_size[0]
            nn.init.normal_(module.weight, std=fan_in**-0.5)
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, WanAttentionBlock):
            nn.init.zeros_(module.proj.weight)
    log_variance = slice(vae.config.z_dim, None)
    with torch.no_grad():
        vae.quant_conv.weight[log_variance] *= 0.1
        vae.quant_conv.bias[log_variance] = -4.0


class _Autoencoder(ShapesAutoencoder):
    """Diffusers' `AutoencoderKLWan` for images of one frame, with statistics for each channel."""

    def __init__(self, model: Cosmos3Model) -> None:
        self.config, self.module = model.config, model.autoencoder.vae
        self.decoder = nn.ModuleList([self.module.post_quant_conv, self.module.decoder])

    def posterior(self, pixels: torch.Tensor) -> Any:
        distribution = self.module.encode(pixels[:, :, None]).latent_dist
        return type(distribution)(distribution.parameters.squeeze(2))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        # As the library decodes a single frame, but without its clamp to [-1, 1], beyond which there is no gradient.
        vae = self.module
        vae.clear_cache()
        states = vae.post_quant_conv(latents[:, :, None])
        pixels = vae.decoder(states, feat_cache=vae._feat_map, feat_idx=[0], first_chunk=True)
        vae.clear_cache()
        return unpatchify(pixels, vae.config.patch_size).squeeze(2)

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = (values.flatten() for values in (latents.mean((0, 2, 3)), latents.std((0, 2, 3))))
        self.load_settings({"latents_mean": mean.tolist(), "latents_std": std.tolist()})
        return std[:, None, None]

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.config.autoencoder_config)

    def load_settings(self, settings: dict[str, Any]) -> None:
        self.config.autoencoder_config.update(settings)
        names = ("latents_mean", "latents_std")
        self.module.register_to_config(**{name: self.config.autoencoder_config[name] for name in names})


@SHAPES_FAMILIES.register("cosmos3")
class Cosmos3Shapes(ShapesFamily):
    """Two streams of 6 layers and width 128, Qwen3-VL's vision tower and a small `AutoencoderKLWan`."""

    def build_processor(self) -> Cosmos3Processor:
        return Cosmos3Processor(
            tokenizer=build_cosmos3_tokenizer(),
            use_system_prompt=False,
            thinking_prompt=GENERATION_SYSTEM_PROMPT,
            reflection_prompt=REFLECTION_PROMPT,
            verdict_request="",
            keep_verdict=KEEP_VERDICT,
            repaint_verdict=REPAINT_VERDICT,
            min_pixels=IMAGE_SIZE**2,
            max_pixels=IMAGE_SIZE**2,
            max_image_size=IMAGE_SIZE,
            image_stride=TOKEN_SIZE,
            vision_stride=VISION_PATCH_SIZE,
        )

    def build_model(self, processor: Cosmos3Processor) -> Cosmos3Model:
        model = Cosmos3Model._from_config(build_cosmos3_config(processor.tokenizer))
        initialize_autoencoder(model.autoencoder.vae)
        return model

    def autoencoder(self, model: Cosmos3Model) -> ShapesAutoencoder:
        return _Autoencoder(model)
