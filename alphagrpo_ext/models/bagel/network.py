# SPDX-License-Identifier: Apache-2.0

"""Parts of BAGEL: a Qwen2 decoder with an understanding and a generation expert, a SigLIP tower and a FLUX autoencoder.

Source: Emerging Properties in Unified Multimodal Pretraining (https://huggingface.co/papers/2505.14683).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import GenerationConfig, PreTrainedModel, SiglipVisionConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from alphagrpo_ext.models.bagel.attention import (
    CopyStates,
    PackedLayout,
    additive_mask,
    block_mask_attention,
    copy_attention,
)
from alphagrpo_ext.models.bagel.cache import BagelCache
from alphagrpo_ext.models.bagel.configuration_bagel import BagelConfig
from alphagrpo_ext.models.layers.recomputed import GatedMLP, RMSNorm, round_once
from alphagrpo_ext.models.token_scores import score_tokens
from alphagrpo_ext.models.work import WorkCounter


def sinusoidal_time_embedding(timesteps: torch.Tensor, dim: int) -> torch.Tensor:
    """`(...)` times in [0, 1] to `(..., dim)`, cosines first, without the usual factor of 1000."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_position_table(side: int, hidden_size: int) -> torch.Tensor:
    """
    Two-dimensional table `(side**2, hidden_size)`: columns in the first half of the channels, rows in the second.
    """
    quarter = hidden_size // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = axis[:, None].expand(side, side, -1)
    columns = axis[None].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(side * side, -1).float()


def make_qwen_norm(size: int, eps: float) -> RMSNorm:
    """Qwen2's norm, which rounds to the type of its input before it multiplies by the weight."""
    return RMSNorm(size, eps, _multiply_rounded)


def _multiply_rounded(normed: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight * normed.to(dtype)


class BagelAttention(nn.Module):
    """Joint attention of both experts. Each expert projects its own tokens, and all tokens attend to each other."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        text_config = config.text_config
        self.config = text_config
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
            self.add_module(f"q_norm{suffix}", make_qwen_norm(self.head_dim, eps))
            self.add_module(f"k_norm{suffix}", make_qwen_norm(self.head_dim, eps))

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
        *context_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | BlockMask | PackedLayout,
        context: BagelCache | None = None,
        prefill: bool = False,
    ) -> tuple[torch.Tensor | None, ...]:
        if isinstance(mask, PackedLayout):
            return self._attend_packed(und, gen, context_states, position_embeddings, mask)
        states = self._project(und, "")
        if gen is not None:
            states = tuple(torch.cat(pair, dim=1) for pair in zip(states, self._project(gen, "_moe_gen"), strict=True))
        query, key, value = (state.transpose(1, 2) for state in states)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if context is None:
            attention = self._attention_function(mask)
            output, _ = attention(self, query, key, value, mask, dropout=0.0, scaling=self.scaling)
        else:
            output = context.attend(query, key, value, mask, self.scaling).transpose(1, 2)
        kept = (key, value) if prefill else ()
        # Of inputs with gaps between samples, PyTorch multiplies each sample with a copy of a frozen weight.
        parts = [part.flatten(2).contiguous() for part in (output[:, : und.shape[1]], output[:, und.shape[1] :])]
        return self.o_proj(parts[0]), self.o_proj_moe_gen(parts[1]) if gen is not None else None, *kept

    def _attend_packed(
        self,
        und: torch.Tensor,
        gen: torch.Tensor | None,
        context_states: Sequence[torch.Tensor],
        position_embeddings: tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        layout: PackedLayout,
    ) -> tuple[torch.Tensor | None, ...]:
        """
        Attention of contexts to themselves, and of copies to contexts and themselves; see [`PackedLayout`].

        Returns:
            The outputs of both experts, and for a layout without copies the keys and values of every bucket's contexts,
            which `context_states` gives back to a layout without contexts.
        """
        states = [self._project(und, "")] + ([] if gen is None else [self._project(gen, "_moe_gen")])
        # Rotated before heads and tokens are transposed, so that the tokens of a copy stay contiguous in memory.
        states = [
            (*apply_rotary_pos_emb(query, key, *embeddings, unsqueeze_dim=2), value)
            for (query, key, value), embeddings in zip(states, position_embeddings, strict=False)
        ]
        query, key, value = (layout.split(*expert_states) for expert_states in zip(*states, strict=True))
        contexts, copies, kept = [], [], []
        for i, masks in enumerate(layout.buckets):
            if layout.has_contexts:
                context_query, context_key, context_value = (
                    part[0][i].transpose(1, 2) for part in (query, key, value)
                )
                mask = masks.context_mask
                output, _ = self._attention_function(mask)(
                    *(self, context_query, context_key, context_value, mask[:, None]),
                    dropout=0.0,
                    scaling=self.scaling,
                )
                contexts.append(output.flatten(2))
                if not layout.has_copies:
                    kept += [context_key, context_value]
            else:
                context_key, context_value = context_states[2 * i : 2 * i + 2]
            if layout.has_copies and masks.bucket.copies:
                own_query, own_key, own_value = (
                    part[1][i].flatten(1, 2).transpose(1, 2) for part in (query, key, value)
                )
                copy_states = CopyStates(own_query, context_key, context_value, own_key, own_value)
                output = copy_attention(self.config._attn_implementation)(copy_states, masks, self.scaling)
                copies.append(output.transpose(1, 2).flatten(2).unflatten(1, (masks.bucket.copies, -1)))
        und, gen = layout.merge(contexts, copies)
        return self.o_proj(und), self.o_proj_moe_gen(gen) if gen.shape[1] else None, *kept

    def _attention_function(self, mask: torch.Tensor | BlockMask) -> Callable:
        if isinstance(mask, BlockMask):
            return block_mask_attention
        name = self.config._attn_implementation
        # A prefilled context is short, and its mask covers all pairs.
        name = "sdpa" if name == "flex_attention" else name
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)


class BagelDecoderLayer(GradientCheckpointingLayer):
    """A Qwen2 layer in which every weight exists twice, for understanding and for generation tokens."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        text_config = config.text_config
        hidden, eps = text_config.hidden_size, text_config.rms_norm_eps
        self.self_attn = BagelAttention(config)
        self.mlp = GatedMLP(hidden, text_config.intermediate_size)
        self.mlp_moe_gen = GatedMLP(hidden, text_config.intermediate_size)
        self.input_layernorm = make_qwen_norm(hidden, eps)
        self.input_layernorm_moe_gen = make_qwen_norm(hidden, eps)
        self.post_attention_layernorm = make_qwen_norm(hidden, eps)
        self.post_attention_layernorm_moe_gen = make_qwen_norm(hidden, eps)

    # Keys and values of contexts are arguments and results, because reentrant checkpointing follows no other gradients, and
    # FSDP gathers a layer's weights for the backward where the gradient of a result arrives.
    def forward(
        self, und: torch.Tensor, gen: torch.Tensor | None, *context_states: torch.Tensor, **attention: Any
    ) -> tuple[torch.Tensor | None, ...]:
        """
        States of both experts' tokens after the layer, and what [`PackedLayout`] says that layers return; in a prefill,
        all keys and values.
        """
        normed_und = round_once(self.input_layernorm(und))
        normed_gen = None if gen is None else round_once(self.input_layernorm_moe_gen(gen))
        und_output, gen_output, *kept = self.self_attn(normed_und, normed_gen, *context_states, **attention)
        und = und + und_output
        und = und + self.mlp(round_once(self.post_attention_layernorm(und)))
        if gen is not None:
            gen = gen + gen_output
            gen = gen + self.mlp_moe_gen(round_once(self.post_attention_layernorm_moe_gen(gen)))
        return und, gen, *kept


class BagelDecoder(nn.Module):
    """Embedding table, decoder layers and the two final norms."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        text_config = config.text_config
        self.config = text_config
        self.embed_tokens = nn.Embedding(text_config.vocab_size, text_config.hidden_size)
        self.layers = nn.ModuleList(BagelDecoderLayer(config) for _ in range(text_config.num_hidden_layers))
        self.norm = make_qwen_norm(text_config.hidden_size, text_config.rms_norm_eps)
        self.norm_moe_gen = make_qwen_norm(text_config.hidden_size, text_config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(text_config)

    def forward(
        self,
        und: torch.Tensor,
        gen: torch.Tensor | None,
        positions: torch.Tensor,
        mask: torch.Tensor | BlockMask | PackedLayout,
        cache: BagelCache | None = None,
        prefill: bool = False,
        context_states: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
        """
        Args:
            und (`torch.Tensor` of shape `(batch, und_tokens, hidden)`): Embeddings for the understanding expert.
            gen (`torch.Tensor` of shape `(batch, gen_tokens, hidden)`, *optional*):
                Embeddings for the generation expert.
            positions (`torch.Tensor` of shape `(batch, und_tokens + gen_tokens)`): Rotary positions.
            mask (`torch.Tensor` of shape `(batch, queries, keys)`, `BlockMask` or [`PackedLayout`]): Visibility, bool.
            cache ([`BagelCache`], *optional*): Context that comes before these tokens.
            prefill (`bool`, *optional*, defaults to `False`): Whether these tokens become the cache's prefix.
            context_states (`Sequence[torch.Tensor]`, *optional*):
                For a layout without contexts, what a layout without copies returned.

        Returns:
            The normed hidden states of both experts' tokens, and for a layout without copies the keys and values
            `(sequences, kv_heads, context, head_dim)` of every layer's every bucket.
        """
        # SDPA would convert a bool mask in every layer, and keep each result for the backward.
        kind, implementation = und.device.type, self.config._attn_implementation
        computes_in = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else und.dtype
        if isinstance(mask, PackedLayout):
            mask = mask.additive(torch.float32 if implementation == "eager" else computes_in)
            num_und = und.shape[1]
            position_embeddings = tuple(
                self.rotary_emb(und, p) for p in (positions[:, :num_und], positions[:, num_und:])
            )
        else:
            if not isinstance(mask, BlockMask):
                mask = mask[:, None]
            if (cache is not None and not prefill) or implementation == "eager":
                mask = additive_mask(mask)
            elif implementation == "sdpa":
                mask = additive_mask(mask, computes_in)
            position_embeddings = self.rotary_emb(und, positions)
        num_states, kept = len(context_states) // len(self.layers), []
        for i, layer in enumerate(self.layers):
            seen = context_states[i * num_states : (i + 1) * num_states]
            # A layer gets what is its own and changes no list, so that compilation takes all layers for the same.
            context = None if cache is None or prefill else cache.layer(i)
            # Under gradient checkpointing, Transformers removes arguments whose name says cache.
            und, gen, *states = layer(
                und, gen, *seen, position_embeddings=position_embeddings, mask=mask, context=context, prefill=prefill
            )
            if prefill:
                cache.store(*states)
            else:
                kept += states
        return self.norm(und), None if gen is None else self.norm_moe_gen(gen), kept


class BagelHead(nn.Linear):
    """
    Language-model head that scores tokens chunk by chunk. It is one call of one module, so that sharded weights are
    gathered once.
    """

    def forward(
        self, hidden_states: torch.Tensor, targets: torch.Tensor | None = None, temperature: float | torch.Tensor = 1.0
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
    """Maps a time in [0, 1] to a vector of the decoder's width."""

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
    """Maps the vision tower's outputs to the width of the decoder."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.fc1 = nn.Linear(config.vision_config.hidden_size, hidden_size)
        self.activation = ACT2FN[config.connector_hidden_act]
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class BagelVisionEmbeddings(nn.Module):
    """Patch embedding by a linear layer, with learned positions that are indexed by flattened two-dimensional ids."""

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
        """
        `(images, patches, values)` to `(images, patches, hidden)`; `mask` `(images, patches)` is false on padding.
        """
        hidden_states = self.embeddings(patches.to(self.embeddings.patch_embedding.weight.dtype), position_ids)
        attention_mask = additive_mask(mask, hidden_states.dtype)[:, None, None].expand(-1, 1, mask.shape[1], -1)
        hidden_states = self.encoder(hidden_states, attention_mask).last_hidden_state
        return self.post_layernorm(hidden_states)


class BagelVisionModel(nn.Module):
    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.vision_model = BagelVisionTransformer(config)


class BagelNetwork(PreTrainedModel):
    """
    All parts of BAGEL and the embeddings of its tokens; module names are those of the released checkpoint.

    Args:
        config ([`BagelConfig`]): Sizes of every part.
    """

    config_class = BagelConfig
    base_model_prefix = "bagel"
    supports_gradient_checkpointing = True

    _no_split_modules = ["BagelDecoderLayer", "SiglipEncoderLayer"]
    # Anchored, because `vae2llm` and `llm2vae` are not part of the autoencoder.
    _keep_in_fp32_modules_strict = [r"^vae\."]
    _supports_sdpa = True
    _supports_flex_attn = True
    work: WorkCounter | None = None

    def __init__(self, config: BagelConfig) -> None:
        super().__init__(config)
        self._set_attention_of_parts()
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
        # `post_init` adds the autoencoder's classes, and FSDP would look for those that this autoencoder does not
        # have.
        self._no_split_modules = set(type(self)._no_split_modules)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BagelPositionTable):
            init.copy_(module.pos_embed, sincos_position_table(module.side, module.hidden_size))
        elif isinstance(module, BagelNetwork):
            init.zeros_(module.llm2vae.weight)

    def _set_attention_of_parts(self) -> None:
        # Transformers sets the implementation of the whole model alone, because the parts are plain modules.
        name = self.config._attn_implementation
        self.config.text_config._attn_implementation = name
        # The vision tower sees single images and has no block mask.
        self.config.vision_config._attn_implementation = "sdpa" if name == "flex_attention" else name

    def set_attn_implementation(self, attn_implementation: str, *args: Any, **kwargs: Any) -> None:
        # Without names of parts, because Transformers warns of every part that is no model of its own.
        whole = {"": attn_implementation} if isinstance(attn_implementation, str) else attn_implementation
        super().set_attn_implementation(whole, *args, **kwargs)
        self._set_attention_of_parts()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        # Loading replaces the parameters, and the new ones are not frozen.
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

    def embed_sequences(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings `(batch, tokens, hidden)` of both experts' tokens, from what [`collate_sequences`] returns."""
        und = self.language_model.model.embed_tokens(inputs["input_ids"])
        if "vit_patches" in inputs:
            patches = self.embed_patches(inputs["vit_patches"], inputs["vit_position_ids"], inputs["vit_mask"])
            patches, mask = (tensor[inputs["vit_image"]] for tensor in (patches, inputs["vit_mask"]))
            flat = und.flatten(0, 1).index_put((inputs["vit_index"][mask],), patches[mask].to(und.dtype))
            und = flat.view_as(und)
        if "latents" not in inputs:
            return und, None
        times = self.time_embedder(inputs["timesteps"])
        index = inputs["timestep_index"][..., None].expand(-1, -1, times.shape[-1])
        gen = self.embed_latents(inputs["latents"], inputs["latent_position_ids"], times.gather(1, index))
        return und, gen
