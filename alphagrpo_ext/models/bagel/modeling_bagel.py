# Copyright 2026 The AlphaGRPO-Ext Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""BAGEL: a Qwen2 decoder with an understanding and a generation expert, a SigLIP tower and a FLUX autoencoder.

Source: Emerging Properties in Unified Multimodal Pretraining (https://huggingface.co/papers/2505.14683).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import GenerationConfig, PreTrainedModel, SiglipVisionConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2MLP,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.bagel.cache_bagel import BagelCache
from alphagrpo_ext.models.bagel.configuration_bagel import LORA_TARGET_MODULES_OF, BagelConfig
from alphagrpo_ext.models.bagel.copies_bagel import (
    NUM_DELIMITERS,
    ContextStates,
    CopyStates,
    PackedLayout,
    additive_mask,
    copy_attention,
)
from alphagrpo_ext.models.bagel.flex_bagel import block_mask_attention, visibility_block_mask
from alphagrpo_ext.models.bagel.generation_bagel import BagelGenerationMixin
from alphagrpo_ext.models.bagel.packing_bagel import (
    PADDING_BLOCK,
    pack_trajectories,
    patchify,
    unpatchify,
    visibility_mask,
)
from alphagrpo_ext.models.token_scores import score_tokens
from alphagrpo_ext.models.unified import MODELS, PackedBatch, PackedOutput, UnifiedModel
from alphagrpo_ext.trajectory import Trajectory


def sinusoidal_time_embedding(timesteps: torch.Tensor, dim: int) -> torch.Tensor:
    """`(...)` times in [0, 1] to `(..., dim)`, cosines first, without the usual factor of 1000."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_position_table(side: int, hidden_size: int) -> torch.Tensor:
    """Two-dimensional table `(side**2, hidden_size)`: columns in the first half of the channels, rows in the second."""
    quarter = hidden_size // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = axis[:, None].expand(side, side, -1)
    columns = axis[None].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(side * side, -1).float()


class BagelAttention(nn.Module):
    """Joint attention of both experts: each projects its own tokens, all tokens attend to each other."""

    def __init__(self, config: BagelConfig, layer_idx: int) -> None:
        super().__init__()
        text_config = config.text_config
        self.config = text_config
        self.layer_idx = layer_idx
        self.num_heads = text_config.num_attention_heads
        self.num_kv_heads = text_config.num_key_value_heads
        self.head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // self.num_heads
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        hidden, eps = text_config.hidden_size, text_config.rms_norm_eps
        for suffix in ("", "_moe_gen"):
            self.add_module(f"q_proj{suffix}", nn.Linear(hidden, self.num_heads * self.head_dim, bias=True))
            self.add_module(f"k_proj{suffix}", nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=True))
            self.add_module(f"v_proj{suffix}", nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=True))
            self.add_module(f"o_proj{suffix}", nn.Linear(self.num_heads * self.head_dim, hidden, bias=False))
            self.add_module(f"q_norm{suffix}", Qwen2RMSNorm(self.head_dim, eps=eps))
            self.add_module(f"k_norm{suffix}", Qwen2RMSNorm(self.head_dim, eps=eps))

    def _project(self, hidden_states: torch.Tensor, expert: str) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values `(batch, tokens, heads, head_dim)` of one expert: `""` or `"_moe_gen"`."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            getattr(self, f"{name}_proj{expert}")(hidden_states).view(shape) for name in ("q", "k", "v")
        )
        return getattr(self, f"q_norm{expert}")(query), getattr(self, f"k_norm{expert}")(key), value

    def forward(
        self,
        und: torch.Tensor,
        gen: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | BlockMask | PackedLayout,
        context: BagelCache | ContextStates | None = None,
        prefill: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(mask, PackedLayout):
            return self._attend_packed(und, gen, position_embeddings, mask)
        states = self._project(und, "")
        if gen is not None:
            states = tuple(torch.cat(pair, dim=1) for pair in zip(states, self._project(gen, "_moe_gen"), strict=True))
        query, key, value = (state.transpose(1, 2) for state in states)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if prefill:
            context.store(self.layer_idx, key, value)
        if context is None or prefill:
            attention = self._attention_function(mask)
            output, _ = attention(self, query, key, value, mask, dropout=0.0, scaling=self.scaling)
        else:
            output = context.attend(self.layer_idx, query, key, value, mask, self.scaling).transpose(1, 2)
        output = output.flatten(2)
        num_und = und.shape[1]
        if gen is None:
            return self.o_proj(output), None
        return self.o_proj(output[:, :num_und]), self.o_proj_moe_gen(output[:, num_und:])

    def _attend_packed(
        self,
        und: torch.Tensor,
        gen: torch.Tensor,
        position_embeddings: tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        layout: PackedLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Contexts among themselves, and copies over contexts and themselves; see [`PackedLayout`]."""
        states = zip(self._project(und, ""), self._project(gen, "_moe_gen"), strict=True)
        # Of query, key and value: the context's part, and that of the copies.
        parts = zip(*(layout.split(*pair) for pair in states), strict=True)
        (query, key, value), copies = (
            # Rotated before heads and tokens change places, so that a copy's tokens stay together in memory.
            [x.transpose(1, 2) for x in (*apply_rotary_pos_emb(q, k, *embeddings, unsqueeze_dim=2), v)]
            for (q, k, v), embeddings in zip(parts, position_embeddings, strict=True)
        )
        output = None
        if layout.states is None:
            attention = self._attention_function(layout.context_mask)
            output, _ = attention(
                self, query, key, value, layout.context_mask[:, None], dropout=0.0, scaling=self.scaling
            )
            output = output.flatten(2)
        else:
            key, value = layout.states.keys[self.layer_idx], layout.states.values[self.layer_idx]
        attend = copy_attention(self.config._attn_implementation)
        copy_query, copy_key, copy_value = copies
        copy_output = attend(CopyStates(copy_query, key, value, copy_key, copy_value), layout, self.scaling)
        und, gen = layout.merge(output, copy_output.transpose(1, 2).flatten(2), und.shape[1])
        return self.o_proj(und), self.o_proj_moe_gen(gen)

    def _attention_function(self, mask: torch.Tensor | BlockMask) -> Callable:
        if isinstance(mask, BlockMask):
            return block_mask_attention
        name = self.config._attn_implementation
        # A prefilled context is short and comes with a mask of all pairs.
        name = "sdpa" if name == "flex_attention" else name
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)


class BagelDecoderLayer(GradientCheckpointingLayer):
    """A Qwen2 layer in which every weight exists twice, for understanding and for generation tokens."""

    def __init__(self, config: BagelConfig, layer_idx: int) -> None:
        super().__init__()
        text_config = config.text_config
        hidden, eps = text_config.hidden_size, text_config.rms_norm_eps
        self.self_attn = BagelAttention(config, layer_idx)
        self.mlp = Qwen2MLP(text_config)
        self.mlp_moe_gen = Qwen2MLP(text_config)
        self.input_layernorm = Qwen2RMSNorm(hidden, eps=eps)
        self.input_layernorm_moe_gen = Qwen2RMSNorm(hidden, eps=eps)
        self.post_attention_layernorm = Qwen2RMSNorm(hidden, eps=eps)
        self.post_attention_layernorm_moe_gen = Qwen2RMSNorm(hidden, eps=eps)

    def forward(
        self, und: torch.Tensor, gen: torch.Tensor | None, **attention: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        und_output, gen_output = self.self_attn(
            self.input_layernorm(und), None if gen is None else self.input_layernorm_moe_gen(gen), **attention
        )
        und = und + und_output
        und = und + self.mlp(self.post_attention_layernorm(und))
        if gen is not None:
            gen = gen + gen_output
            gen = gen + self.mlp_moe_gen(self.post_attention_layernorm_moe_gen(gen))
        return und, gen


class BagelDecoder(nn.Module):
    """Embedding table, decoder layers and the two final norms."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        text_config = config.text_config
        self.config = text_config
        self.embed_tokens = nn.Embedding(text_config.vocab_size, text_config.hidden_size)
        self.layers = nn.ModuleList(BagelDecoderLayer(config, i) for i in range(text_config.num_hidden_layers))
        self.norm = Qwen2RMSNorm(text_config.hidden_size, eps=text_config.rms_norm_eps)
        self.norm_moe_gen = Qwen2RMSNorm(text_config.hidden_size, eps=text_config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(text_config)

    def forward(
        self,
        und: torch.Tensor,
        gen: torch.Tensor | None,
        positions: torch.Tensor,
        mask: torch.Tensor | BlockMask | PackedLayout,
        cache: BagelCache | ContextStates | None = None,
        prefill: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            und (`torch.Tensor` of shape `(batch, und_tokens, hidden)`): Embeddings for the understanding expert.
            gen (`torch.Tensor` of shape `(batch, gen_tokens, hidden)`, *optional*): For the generation expert.
            positions (`torch.Tensor` of shape `(batch, und_tokens + gen_tokens)`): Rotary positions; a layout has its own.
            mask (`torch.Tensor` of shape `(batch, queries, keys)`, `BlockMask` or [`PackedLayout`]): Visibility, bool.
            cache ([`BagelCache`] or [`ContextStates`], *optional*): Context that comes before these tokens.
            prefill (`bool`, *optional*, defaults to `False`): Whether these tokens become the cache's prefix.

        Returns:
            The normed hidden states of both experts' tokens.
        """
        # SDPA would make the same numbers of a bool mask in every layer, and keep each for the backward.
        kind, implementation = und.device.type, self.config._attn_implementation
        computes_in = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else und.dtype
        if isinstance(mask, PackedLayout):
            mask = mask.additive(torch.float32 if implementation == "eager" else computes_in)
            position_embeddings = tuple(
                self.rotary_emb(und, p.flatten(1)) for p in (mask.context_positions, mask.copy_positions)
            )
        else:
            if not isinstance(mask, BlockMask):
                mask = mask[:, None]
            if (cache is not None and not prefill) or implementation == "eager":
                mask = additive_mask(mask)
            elif implementation == "sdpa":
                mask = additive_mask(mask, computes_in)
            position_embeddings = self.rotary_emb(und, positions)
        for layer in self.layers:
            # Transformers takes away what is called a cache under gradient checkpointing.
            und, gen = layer(
                und, gen, position_embeddings=position_embeddings, mask=mask, context=cache, prefill=prefill
            )
        return self.norm(und), None if gen is None else self.norm_moe_gen(gen)


class BagelHead(nn.Linear):
    """
    Language-model head that scores tokens chunk by chunk. It is one call of one module, so that what gathers the weights of
    sharded modules does so once.
    """

    def forward(
        self, hidden_states: torch.Tensor, targets: torch.Tensor | None = None, temperature: float = 1.0
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits `(..., vocabulary)`, or what [`score_tokens`] returns if there are `targets`."""
        if targets is None:
            return super().forward(hidden_states)
        return score_tokens(super().forward, hidden_states, targets, self.out_features, temperature)


class BagelLanguageModel(nn.Module):
    """Decoder and language-model head."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.model = BagelDecoder(config)
        self.lm_head = BagelHead(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)


class BagelTimeEmbedder(nn.Module):
    """Time in [0, 1] to a vector of the decoder's width."""

    sinusoid_dim = 256

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.sinusoid_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        return self.mlp(sinusoidal_time_embedding(timesteps, self.sinusoid_dim).to(self.mlp[0].weight.dtype))


class BagelPositionTable(nn.Module):
    """Frozen two-dimensional sin-cos positions."""

    def __init__(self, side: int, hidden_size: int) -> None:
        super().__init__()
        self.side, self.hidden_size = side, hidden_size
        self.register_buffer("pos_embed", sincos_position_table(side, hidden_size))

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        return self.pos_embed[position_ids]


class BagelConnector(nn.Module):
    """Vision-tower width to decoder width."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.fc1 = nn.Linear(config.vision_config.hidden_size, hidden_size)
        self.activation = ACT2FN[config.connector_hidden_act]
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class BagelVisionEmbeddings(nn.Module):
    """Patches as a linear layer, and learned positions looked up by flattened two-dimensional ids."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding((config.image_size // config.patch_size) ** 2, config.hidden_size)

    def forward(self, patches: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.patch_embedding(patches) + self.position_embedding(position_ids)


class BagelVisionTransformer(nn.Module):
    """SigLIP's encoder over patches of images of any size, without a pooling head."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BagelVisionEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`(images, patches, values)` to `(images, patches, hidden)`; `mask` `(images, patches)` is false on padding."""
        hidden_states = self.embeddings(patches.to(self.embeddings.patch_embedding.weight.dtype), position_ids)
        attention_mask = additive_mask(mask, hidden_states.dtype)[:, None, None].expand(-1, 1, mask.shape[1], -1)
        hidden_states = self.encoder(hidden_states, attention_mask).last_hidden_state
        return self.post_layernorm(hidden_states)


class BagelVisionModel(nn.Module):
    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.vision_model = BagelVisionTransformer(config)


class BagelPreTrainedModel(PreTrainedModel):
    config_class = BagelConfig
    base_model_prefix = "bagel"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BagelDecoderLayer", "SiglipEncoderLayer"]
    # Anchored, because this is searched for in names, and `vae2llm` and `llm2vae` are no part of the autoencoder.
    _keep_in_fp32_modules_strict = [r"^vae\."]
    _supports_sdpa = True
    _supports_flex_attn = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BagelPositionTable):
            init.copy_(module.pos_embed, sincos_position_table(module.side, module.hidden_size))
        elif isinstance(module, BagelModel):
            init.zeros_(module.llm2vae.weight)


@MODELS.register(BagelConfig.model_type)
class BagelModel(BagelPreTrainedModel, BagelGenerationMixin, UnifiedModel):
    """
    BAGEL with all its parts; module names are those of the released checkpoint.

    The forward scores whole trajectories ([`BagelModel.pack`] makes its inputs); `prefill`, `sample_text`,
    `predict_velocity` and `sample_image` generate.

    Args:
        config ([`BagelConfig`]): Sizes of every part.
    """

    def __init__(self, config: BagelConfig) -> None:
        super().__init__(config)
        self._tell_parts_attention()
        hidden_size = config.text_config.hidden_size
        self.language_model = BagelLanguageModel(config)
        self.time_embedder = BagelTimeEmbedder(hidden_size)
        self.vae2llm = nn.Linear(config.latent_channels, hidden_size)
        self.llm2vae = nn.Linear(hidden_size, config.latent_channels)
        self.latent_pos_embed = BagelPositionTable(config.max_latent_size, hidden_size)
        self.vit_model = BagelVisionModel(config.vision_config)
        self.connector = BagelConnector(config)
        self.vit_pos_embed = BagelPositionTable(config.vision_patches_per_side, hidden_size)
        num_levels = len(config.vae_config["block_out_channels"])
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * num_levels,
            up_block_types=("UpDecoderBlock2D",) * num_levels,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **config.vae_config,
        ).requires_grad_(False)
        self.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.eos_token_id
        )
        self.post_init()
        # To which that has added the autoencoder's, some of which are in no autoencoder of ours: FSDP would look for them.
        self._no_split_modules = set(type(self)._no_split_modules)

    def _tell_parts_attention(self) -> None:
        # The parts are plain modules, so nothing else tells them.
        name = self.config._attn_implementation
        self.config.text_config._attn_implementation = name
        # The vision tower sees single images and has no block mask.
        self.config.vision_config._attn_implementation = "sdpa" if name == "flex_attention" else name

    def set_attn_implementation(self, attn_implementation: str, *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        self._tell_parts_attention()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        # Loading replaces the parameters, and with them forgets that these are frozen.
        model.vae.requires_grad_(False)
        return loaded

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.language_model.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.language_model.lm_head = value

    lora_targets = LORA_TARGET_MODULES_OF

    @staticmethod
    def is_generation_parameter(name: str) -> bool:
        return re.search(r"_moe_gen\.|(^|\.)(vae2llm|llm2vae|time_embedder)\.", name) is not None

    def vision_tokens(self, height: int, width: int) -> int:
        patch_size = self.config.vision_config.patch_size
        return (height // patch_size) * (width // patch_size)

    def keeps_fp32(self, name: str) -> bool:
        return name.startswith("vae.")

    def sharded_layers(self) -> Sequence[nn.Module]:
        return [*self.language_model.model.layers, *self.vit_model.vision_model.encoder.layers]

    @property
    def latent_downsample(self) -> int:
        return self.config.latent_downsample

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def max_latent_size(self) -> int:
        return self.config.max_latent_size

    @property
    def max_positions(self) -> int:
        return self.config.text_config.max_position_embeddings

    def freeze_vision_tower(self) -> None:
        """Exclude what only reads images (vision tower and connector) from training."""
        self.vit_model.requires_grad_(False)
        self.connector.requires_grad_(False)

    def encode_images(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(batch, 3, height, width)`): Pixels in [-1, 1].
            noise (`torch.Tensor`, *optional*): Sample the posterior with this noise instead of taking its mean.

        Returns:
            `torch.Tensor` of shape `(batch, tokens, channels)`: Scaled latents, fp32.
        """
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        latents = self.vae.config.scaling_factor * (latents.float() - self.vae.config.shift_factor)
        return patchify(latents, self.config.latent_patch_size)

    def decode_latents(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        latents = unpatchify(latents, grid, self.config.latent_patch_size)
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()

    def embed_latents(
        self, latents: torch.Tensor, position_ids: torch.Tensor, time_embeddings: torch.Tensor
    ) -> torch.Tensor:
        """Latent tokens `(..., channels)` with their table positions and time embeddings, to `(..., hidden)`."""
        embeddings = self.vae2llm(latents.to(self.vae2llm.weight.dtype))
        return embeddings + time_embeddings + self.latent_pos_embed(position_ids).to(embeddings.dtype)

    def embed_patches(
        self, vit_patches: torch.Tensor, vit_position_ids: torch.Tensor, vit_mask: torch.Tensor
    ) -> torch.Tensor:
        """Pixels of images, as patches `(images, patches, values)`, to decoder embeddings."""
        hidden_states = self.vit_model.vision_model(vit_patches, vit_position_ids, vit_mask)
        hidden_states = self.connector(hidden_states)
        return hidden_states + self.vit_pos_embed(vit_position_ids).to(hidden_states.dtype)

    def embed_rows(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings of both experts' tokens, from what [`collate_rows`] gives."""
        und = self.language_model.model.embed_tokens(inputs["input_ids"])
        if "vit_patches" in inputs:
            patches = self.embed_patches(inputs["vit_patches"], inputs["vit_position_ids"], inputs["vit_mask"])
            mask = inputs["vit_mask"]
            flat = und.flatten(0, 1).index_put((inputs["vit_index"][mask],), patches[mask].to(und.dtype))
            und = flat.view_as(und)
        if "latents" not in inputs:
            return und, None
        times = self.time_embedder(inputs["timesteps"])
        index = inputs["timestep_index"][..., None].expand(-1, -1, times.shape[-1])
        gen = self.embed_latents(inputs["latents"], inputs["latent_position_ids"], times.gather(1, index))
        return und, gen

    def pack(self, trajectories: Sequence[Trajectory], guidance: GuidanceConfig) -> PackedBatch:
        return pack_trajectories(trajectories, guidance, self.config)

    def with_all_parts(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if "vit_patches" in inputs:
            return inputs
        vision = self.config.vision_config
        place = torch.zeros(1, 1, dtype=torch.long)
        return {
            **inputs,
            # One patch that is padding: the vision tower runs, and nobody sees what comes of it.
            "vit_patches": torch.zeros(1, 1, vision.num_channels * vision.patch_size**2),
            "vit_position_ids": place,
            "vit_mask": torch.zeros(1, 1, dtype=torch.bool),
            "vit_index": place,
        }

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        blocks: torch.Tensor,
        noised: torch.Tensor,
        score_index: torch.Tensor,
        score_targets: torch.Tensor,
        branches: torch.Tensor | None = None,
        velocity_index: torch.Tensor | None = None,
        copy_mask: torch.Tensor | None = None,
        temperature: float = 1.0,
        context_gradient: str = "exact",
        **images: torch.Tensor,
    ) -> PackedOutput:
        """
        Score whole trajectories; see [`collate_rows`] and [`pack_trajectories`] for the inputs.

        Args:
            score_index (`torch.Tensor` of shape `(scores,)`):
                Places in the flattened `input_ids` whose next token was sampled.
            score_targets (`torch.Tensor` of shape `(scores,)`): The sampled tokens.
            branches (`torch.Tensor` of shape `(batch,)`, *optional*):
                Guidance branch of every row; sampled texts are in rows of branch 0, which come first.
            velocity_index (`torch.Tensor` of shape `(copies, tokens)`, *optional*):
                Places of noised latents in the flattened latents.
            copy_mask (`torch.Tensor` of shape `(batch, copies, tokens)`, *optional*):
                Which of the last latents are noised copies, false on padding.
            temperature (`float`, *optional*, defaults to `1.0`): Temperature at which the tokens were sampled.
            context_gradient (`str`, *optional*, defaults to `"exact"`):
                Whether noised copies have a gradient through their context, or see it `"detached"`.
        """
        if self.work is not None:
            kind = "training" if torch.is_grad_enabled() else "scoring"
            self.work.count(kind, int((blocks != PADDING_BLOCK).sum()), blocks.numel())
        und, gen = self.embed_rows({"input_ids": input_ids, **images})
        if context_gradient == "detached" and copy_mask is not None:
            layout = PackedLayout.of(positions, blocks, und.shape[1], copy_mask)
            und, gen = self._run_detached(
                und, gen, layout, len(und) if branches is None else int((branches == 0).sum()), len(score_index) > 0
            )
        elif copy_mask is not None and self.config.text_config._attn_implementation != "flex_attention":
            layout = PackedLayout.of(positions, blocks, und.shape[1], copy_mask)
            und, gen = self.language_model.model(und, gen, positions, layout)
        else:
            is_flex = self.config.text_config._attn_implementation == "flex_attention"
            mask = (visibility_block_mask if is_flex else visibility_mask)(positions, blocks, noised)
            und, gen = self.language_model.model(und, gen, positions, mask)
        head, scored = self.language_model.lm_head, und.flatten(0, 1)[score_index]
        if isinstance(head, BaseTunerLayer):
            # An adapter around the head can only make logits.
            log_probs, entropies = score_tokens(head, scored, score_targets, head.out_features, temperature)
        else:
            log_probs, entropies = head(scored, score_targets, temperature)
        velocities = None
        if velocity_index is not None:
            velocities = self.llm2vae(gen.flatten(0, 1)[velocity_index]).float()
        return PackedOutput(
            log_probs=log_probs,
            entropies=entropies,
            velocities=velocities,
        )

    def _run_detached(
        self, und: torch.Tensor, gen: torch.Tensor, layout: PackedLayout, num_full: int, has_scores: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Contexts first, and then copies over their keys and values. Of the contexts, only those with sampled texts, the
        first `num_full` rows, have a gradient, which is that of the texts.
        """
        decoder, num_copies = self.language_model.model, layout.num_copies
        num_und = und.shape[1] - NUM_DELIMITERS * num_copies
        num_gen = gen.shape[1] - (layout.copy_tokens - NUM_DELIMITERS) * num_copies
        outputs, states = [], []
        for rows, has_gradient in ((slice(0, num_full), has_scores), (slice(num_full, None), False)):
            context_und, context_gen = und[rows, :num_und], gen[rows, :num_gen]
            if not len(context_und):
                continue
            states.append(ContextStates())
            with torch.set_grad_enabled(has_gradient and torch.is_grad_enabled()):
                output, _ = decoder(
                    context_und,
                    context_gen if num_gen else None,
                    layout.context_positions[rows],
                    layout.context_mask[rows],
                    states[-1],
                    prefill=True,
                )
            outputs.append(output)
        joined = ContextStates.joined(states) if len(states) > 1 else states[0]
        copies = replace(layout, context_positions=layout.context_positions[:, :0], states=joined)
        copy_und, copy_gen = decoder(und[:, num_und:], gen[:, num_gen:], layout.context_positions, copies)
        context_gen = copy_gen.new_zeros(len(gen), num_gen, copy_gen.shape[2])
        return (
            torch.cat([torch.cat(outputs), copy_und], dim=1),
            torch.cat([context_gen, copy_gen], dim=1),
        )
