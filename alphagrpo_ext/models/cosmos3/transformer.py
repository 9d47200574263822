# SPDX-License-Identifier: Apache-2.0

"""
The decoder of Cosmos3, over batches: an understanding stream and a generation stream with weights of their own.

Modules and parameters have the names of Diffusers' `Cosmos3OmniTransformer`, and the leaf modules are Diffusers' own or compute the same.
What differs is how they are run. Diffusers packs one sample, without mask or cache, and runs both streams every time.
Here each stream is run by itself, over a padded batch. The understanding stream never reads the generation stream, so
its keys and values are computed once for any number of images, steps and copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.transformers.transformer_cosmos3 import Cosmos3VLTextMLP, DomainAwareLinear
from torch import nn
from torch.func import functional_call
from transformers.modeling_layers import GradientCheckpointingLayer

from alphagrpo_ext.models.cosmos3.configuration_cosmos3 import Cosmos3Config
from alphagrpo_ext.models.layers.recomputed import GatedMLP, RMSNorm, round_once


NUM_TRAIN_TIMESTEPS = 1000
Rotary = tuple[torch.Tensor, torch.Tensor]


@dataclass
class StreamStates:
    """
    What later tokens read of tokens of the understanding stream: one tensor `(batch, kv_heads, tokens, head_dim)` per
    layer.

    Args:
        keys (`list[torch.Tensor]`): Rotated keys, as the understanding stream reads them.
        generation_keys (`list[torch.Tensor]`):
            Rotated keys, as the generation stream reads them. They are `keys` itself unless the variant has a second
            norm.
        values (`list[torch.Tensor]`): Values, as both streams read them.
    """

    keys: list[torch.Tensor]
    generation_keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> StreamStates:
        """Apply a function to every tensor. Keys that both streams share stay shared."""
        keys = [function(key) for key in self.keys]
        shared = self.generation_keys is self.keys
        generation_keys = keys if shared else [function(key) for key in self.generation_keys]
        return StreamStates(keys, generation_keys, [function(value) for value in self.values])

    def detach(self) -> StreamStates:
        """The same values without gradient."""
        return self.map(torch.Tensor.detach)


@dataclass(frozen=True)
class Stream:
    """Names of the modules of one stream in a layer."""

    query: str
    key: str
    value: str
    output: str
    query_norm: str
    key_norm: str
    input_norm: str
    mlp_norm: str
    mlp: str


UNDERSTANDING = Stream(
    *("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k"),
    *("input_layernorm", "post_attention_layernorm", "mlp"),
)
GENERATION = Stream(
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k"),
    *("input_layernorm_moe_gen", "post_attention_layernorm_moe_gen", "mlp_moe_gen"),
)


def sdpa_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """
    Attention of grouped queries by PyTorch's fused kernels.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, queries, head_dim)`): Queries.
        key, value (`torch.Tensor` of shape `(batch, kv_heads, keys, head_dim)`): Keys and values.
        bias (`torch.Tensor` of shape `(batch, 1, queries, keys)`, *optional*): What is added to scores.

    Returns:
        `torch.Tensor` of shape `(batch, queries, heads * head_dim)`.
    """
    is_grouped = query.shape[1] != key.shape[1]
    # The kernels of a GPU that take a bias read one key per query head.
    if is_grouped and bias is not None and query.is_cuda:
        key, value = (
            states.repeat_interleave(query.shape[1] // states.shape[1], dim=1, output_size=query.shape[1])
            for states in (key, value)
        )
        is_grouped = False
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=is_grouped)
    return output.transpose(1, 2).flatten(2)


def eager_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """
    As [`sdpa_attention`], by two matrix products. For short rows on a CPU this is faster, above all backwards.
    """
    grouped = query.unflatten(1, (key.shape[1], -1)) * query.shape[-1] ** -0.5
    scores = grouped @ key[:, :, None].transpose(-1, -2)
    if bias is not None:
        scores = scores + bias[:, :, None]
    output = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value[:, :, None]
    return output.flatten(1, 2).transpose(1, 2).flatten(2)


def rotate(states: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Turn `(batch, heads, tokens, head_dim)` by cosines and sines `(batch, tokens, head_dim)`, half against half."""
    cos, sin = (part[:, None] for part in rotary)
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


class Cosmos3Attention(nn.Module):
    """Attention of one layer, with projections and norms for each stream."""

    def __init__(self, config: Cosmos3Config) -> None:
        super().__init__()
        self.config = config
        sizes = config.transformer_config
        hidden, self.head_dim = sizes["hidden_size"], sizes["head_dim"]
        heads, kv_heads = sizes["num_attention_heads"] * self.head_dim, sizes["num_key_value_heads"] * self.head_dim
        bias = sizes["attention_bias"]
        for stream in (UNDERSTANDING, GENERATION):
            self.add_module(stream.query, nn.Linear(hidden, heads, bias=bias))
            self.add_module(stream.key, nn.Linear(hidden, kv_heads, bias=bias))
            self.add_module(stream.value, nn.Linear(hidden, kv_heads, bias=bias))
            self.add_module(stream.output, nn.Linear(heads, hidden, bias=bias))
            has_norms = stream is GENERATION or sizes["qk_norm_for_text"]
            for name in (stream.query_norm, stream.key_norm):
                self.add_module(name, make_norm(config, self.head_dim) if has_norms else nn.Identity())
        # Diffusers makes this norm only where the understanding stream has none of its own.
        has_second_norm = sizes["use_und_k_norm_for_gen"] and not sizes["qk_norm_for_text"]
        self.k_norm_und_for_gen = make_norm(config, self.head_dim) if has_second_norm else None

    def forward(
        self,
        states: torch.Tensor,
        rotary: Rotary,
        bias: torch.Tensor | None,
        stream: Stream,
        past_keys: torch.Tensor | None,
        past_values: torch.Tensor | None,
        past_rows: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        query, key, value = (
            getattr(self, name)(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for name in (stream.query, stream.key, stream.value)
        )
        query, key = getattr(self, stream.query_norm)(query), getattr(self, stream.key_norm)(key)
        generation_key = None
        if stream is UNDERSTANDING and self.k_norm_und_for_gen is not None:
            generation_key = rotate(self.k_norm_und_for_gen(key), rotary)
        query, key = rotate(query, rotary), rotate(key, rotary)
        seen_keys, seen_values = key, value
        if past_keys is not None:
            # Gathered here and not before, so that checkpointing stores no copies of a context.
            if past_rows is not None:
                past_keys, past_values = past_keys[past_rows], past_values[past_rows]
            seen_keys = torch.cat([past_keys.to(key.dtype), key], dim=2)
            seen_values = torch.cat([past_values.to(value.dtype), value], dim=2)
        attend = eager_attention if self.config._attn_implementation == "eager" else sdpa_attention
        output = attend(query.to(seen_values.dtype), seen_keys.to(seen_values.dtype), seen_values, bias)
        return getattr(self, stream.output)(output), key, key if generation_key is None else generation_key, value


class Cosmos3DecoderLayer(GradientCheckpointingLayer):
    """A layer in which every weight exists twice, for the understanding stream and for the generation stream."""

    def __init__(self, config: Cosmos3Config) -> None:
        super().__init__()
        hidden = config.transformer_config["hidden_size"]
        self.self_attn = Cosmos3Attention(config)
        for stream in (UNDERSTANDING, GENERATION):
            self.add_module(stream.mlp, make_mlp(config))
            self.add_module(stream.input_norm, make_norm(config, hidden))
            self.add_module(stream.mlp_norm, make_norm(config, hidden))

    # Tensors with a gradient are positional, because reentrant checkpointing follows no others.
    def forward(
        self,
        states: torch.Tensor,
        past_keys: torch.Tensor | None,
        past_values: torch.Tensor | None,
        rotary: Rotary,
        bias: torch.Tensor | None,
        stream: Stream,
        past_rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """States after the layer, and the tokens' keys, keys for the generation stream, and values."""
        normed = round_once(getattr(self, stream.input_norm)(states))
        output, *seen = self.self_attn(normed, rotary, bias, stream, past_keys, past_values, past_rows)
        states = states + output
        states = states + getattr(self, stream.mlp)(round_once(getattr(self, stream.mlp_norm)(states)))
        return states, *seen


def make_norm(config: Cosmos3Config, size: int) -> RMSNorm:
    """The norm of the variant: Edge's multiplies by its weight in fp32, Nano's in the data type of the weight."""
    is_edge = config.transformer_config["hidden_act"] == "relu2"
    return RMSNorm(size, config.transformer_config["rms_norm_eps"], _multiply_in_fp32 if is_edge else _multiply)


def _multiply_in_fp32(normed: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (weight.float() * normed).to(dtype)


def _multiply(normed: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    is_half = weight.dtype in (torch.float16, torch.bfloat16)
    return (normed.to(weight.dtype) if is_half else normed) * weight


def make_mlp(config: Cosmos3Config) -> nn.Module:
    """The MLP of the variant: Edge's has a squared ReLU and no gate."""
    hidden, intermediate = (config.transformer_config[name] for name in ("hidden_size", "intermediate_size"))
    if config.transformer_config["hidden_act"] == "relu2":
        return Cosmos3VLTextMLP(hidden, intermediate, "relu2")
    return GatedMLP(hidden, intermediate)


class Cosmos3Transformer(nn.Module):
    """
    Embeddings, decoder layers and heads of both streams.

    The heads of action and sound are held, so that a checkpoint keeps them, and are never trained or run.
    """

    def __init__(self, config: Cosmos3Config) -> None:
        super().__init__()
        self.config = config
        sizes = config.transformer_config
        hidden, channels = sizes["hidden_size"], sizes["patch_latent_dim"]
        self.embed_tokens = nn.Embedding(sizes["vocab_size"], hidden)
        self.layers = nn.ModuleList(Cosmos3DecoderLayer(config) for _ in range(sizes["num_hidden_layers"]))
        self.norm = make_norm(config, hidden)
        self.norm_moe_gen = make_norm(config, hidden)
        self.lm_head = nn.Linear(hidden, sizes["vocab_size"], bias=False)
        self.proj_in = nn.Linear(channels, hidden, bias=True)
        self.proj_out = nn.Linear(hidden, channels, bias=True)
        self.time_proj = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(in_channels=256, time_embed_dim=hidden)
        self._add_unused_heads()

    def _add_unused_heads(self) -> None:
        sizes = self.config.transformer_config
        hidden = sizes["hidden_size"]
        if sizes["action_gen"]:
            action, domains = sizes["action_dim"], sizes["num_embodiment_domains"]
            self.action_proj_in = DomainAwareLinear(action, hidden, domains)
            self.action_proj_out = DomainAwareLinear(hidden, action, domains)
            self.action_modality_embed = nn.Parameter(torch.zeros(hidden))
        if sizes["sound_gen"]:
            self.audio_proj_in = nn.Linear(sizes["sound_dim"], hidden, bias=True)
            self.audio_proj_out = nn.Linear(hidden, sizes["sound_dim"], bias=True)
            self.audio_modality_embed = nn.Parameter(torch.zeros(hidden))
        self.freeze_unused_heads()

    def freeze_unused_heads(self) -> None:
        """Exclude the heads of action and sound from training, which loading may have undone."""
        for name, parameter in self.named_parameters():
            if is_unused_head(name):
                parameter.requires_grad_(False)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `(batch, tokens, hidden)` of token ids `(batch, tokens)`."""
        return self.embed_tokens(ids)

    def rotary(self, positions: torch.Tensor, dtype: torch.dtype) -> Rotary:
        """
        Cosines and sines of positions. Angles are fp32, because a position above 256 is no bf16 number.

        Args:
            positions (`torch.Tensor` of shape `(3, batch, tokens)`): Time, row and column.
            dtype (`torch.dtype`): Data type of the result.

        Returns:
            `tuple` of two tensors of shape `(batch, tokens, head_dim)`.
        """
        sizes = self.config.transformer_config
        frequencies = rotary_frequencies(sizes["head_dim"], sizes["rope_theta"]).to(positions.device)
        angles = positions.float()[..., None] * frequencies
        # Each third frequency turns by the row or the column, as far as there are enough of them.
        mixed = angles[0]
        for axis in (1, 2):
            places = slice(axis, 3 * sizes["rope_axes_dim"][axis], 3)
            mixed[..., places] = angles[axis, ..., places]
        mixed = torch.cat([mixed, mixed], dim=-1)
        return mixed.cos().to(dtype), mixed.sin().to(dtype)

    def understand(
        self,
        states: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        past: StreamStates | None = None,
        deepstack: tuple[torch.Tensor, Sequence[torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, StreamStates]:
        """
        Run the understanding stream.

        Args:
            states (`torch.Tensor` of shape `(batch, tokens, hidden)`):
                Embeddings of texts, and features of images.
            positions (`torch.Tensor` of shape `(3, batch, tokens)`):
                Time, row and column of every token.
            mask (`torch.Tensor` of shape `(batch, 1, tokens, past + tokens)`, *optional*):
                True where a token sees another. A token that sees nothing is padding. `None` lets every token see
                all, which is right for one token that follows unpadded ones.
            past ([`StreamStates`], *optional*):
                Earlier tokens of the same rows.
            deepstack (`tuple` of `torch.Tensor` and `Sequence[torch.Tensor]`, *optional*):
                Places of image tokens, bool of shape `(batch, tokens)`, and what is added to their states after each
                of the first layers, each of shape `(places, hidden)`.

        Returns:
            States after the final norm, `(batch, tokens, hidden)`, and the [`StreamStates`] of these tokens.
        """
        bias = None if mask is None else visibility_bias(mask, states.dtype)
        rotary = self.rotary(positions, states.dtype)
        rows, columns, features = (), (), ()
        if deepstack is not None:
            (rows, columns), features = deepstack[0].nonzero(as_tuple=True), deepstack[1]
        keys, generation_keys, values = [], [], []
        for i, layer in enumerate(self.layers):
            past_states = (None, None) if past is None else (past.keys[i], past.values[i])
            states, key, generation_key, value = layer(states, *past_states, rotary, bias, UNDERSTANDING)
            if i < len(features):
                states = states.index_put((rows, columns), features[i].to(states.dtype), accumulate=True)
            keys.append(key)
            generation_keys.append(generation_key)
            values.append(value)
        has_second_keys = bool(keys) and self.layers[0].self_attn.k_norm_und_for_gen is not None
        return self.norm(states), StreamStates(keys, generation_keys if has_second_keys else keys, values)

    def denoise(
        self,
        latents: torch.Tensor,
        noised: torch.Tensor,
        times: torch.Tensor,
        positions: torch.Tensor,
        context: StreamStates,
        mask: torch.Tensor | None,
        context_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Run the generation stream. All latents of a row see its context and each other, clean ones included.

        Args:
            latents (`torch.Tensor` of shape `(batch, tokens, channels)`):
                Noised latents, and clean latents of images that are context.
            noised (`torch.Tensor` of shape `(batch, tokens)`):
                True on noised latents. The others get no time embedding.
            times (`torch.Tensor` of shape `(batch,)`):
                Time in [0, 1] of every row.
            positions (`torch.Tensor` of shape `(3, batch, tokens)`):
                Time, row and column of every latent.
            context ([`StreamStates`]):
                The understanding stream of the same rows, or of the rows that `context_rows` names.
            mask (`torch.Tensor` of shape `(batch, 1, tokens, context + tokens)`, *optional*):
                True where a latent sees a token. A latent that sees nothing is padding. `None` lets all see all.
            context_rows (`torch.Tensor` of shape `(batch,)`, *optional*):
                Row of the context that each row of latents is painted from. Rows may share one.

        Returns:
            `torch.Tensor` of shape `(batch, tokens, channels)`: Velocities, fp32. They have no meaning on clean latents.
        """
        states = self.proj_in(latents.to(self.proj_in.weight.dtype))
        time_states = self.embed_times(times).to(states.dtype)[:, None]
        states = torch.where(noised[..., None], states + time_states, states)
        bias = None if mask is None else visibility_bias(mask, states.dtype)
        rotary = self.rotary(positions, states.dtype)
        for layer, keys, values in zip(self.layers, context.generation_keys, context.values, strict=True):
            states = layer(states, keys, values, rotary, bias, GENERATION, context_rows)[0]
        return self.proj_out(self.norm_moe_gen(states)).float()

    def embed_times(self, times: torch.Tensor) -> torch.Tensor:
        """Embeddings `(batch, hidden)` of times `(batch,)` in [0, 1], fp32."""
        scaled = times.float() * NUM_TRAIN_TIMESTEPS * self.config.transformer_config["timestep_scale"]
        # Weights may have been cast with the rest of a model, or by a wrapper that shards it. Times are never rounded.
        weights = {name: weight.float() for name, weight in self.time_embedder.named_parameters()}
        with torch.autocast(device_type=times.device.type, enabled=False):
            return functional_call(self.time_embedder, weights, (self.time_proj(scaled),))


def visibility_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    A mask as what is added to scores. It is made once, because attention would convert a bool mask in every layer, and
    keep each result for the backward.

    Args:
        mask (`torch.Tensor` of shape `(batch, 1, tokens, past + tokens)`):
            True where a token sees another. A token that sees nothing is padding, and sees itself here, so that no
            softmax is over nothing.
        dtype (`torch.dtype`): Data type of the states; autocast goes first.

    Returns:
        `torch.Tensor` of the same shape: 0 where a token sees another, else minus infinity.
    """
    kind, (tokens, keys) = mask.device.type, mask.shape[-2:]
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
    own = torch.ones(tokens, keys, dtype=torch.bool, device=mask.device).tril(keys - tokens).triu(keys - tokens)
    visible = mask | (own & ~mask.any(dim=-1, keepdim=True))
    # Lines that begin at multiples of 16 numbers. Kernels of a GPU would copy others, once per layer.
    lines = torch.zeros(*mask.shape[:-1], math.ceil(keys / 16) * 16, dtype=dtype, device=mask.device)
    return lines[..., :keys].masked_fill_(~visible, -torch.inf)


# Compilation takes the result for a constant, so that no code is compiled for the CPU.
@torch.compiler.assume_constant_result
def rotary_frequencies(head_dim: int, theta: float) -> torch.Tensor:
    """
    Frequencies `(head_dim // 2,)` of rotary positions, fp32, computed on the CPU for all devices. They are no part of a
    model, so that no cast reaches them, and no checkpoint lacks them.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    return 1.0 / theta**exponents


def is_unused_head(name: str) -> bool:
    """Whether a parameter of a [`Cosmos3Transformer`] belongs to the heads of action or sound."""
    return name.rsplit("transformer.", 1)[-1].startswith(("action_", "audio_"))
