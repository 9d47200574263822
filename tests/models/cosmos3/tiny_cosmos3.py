# SPDX-License-Identifier: Apache-2.0

"""
Tiny random Cosmos3 models of both variants, with tokenizers and chat templates of the released form.

`make_tiny_model` builds ours. `write_released_folder` builds one of the libraries' own classes and writes it as NVIDIA
releases it, without any of our code.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from diffusers.models.transformers.transformer_cosmos3 import Cosmos3OmniTransformer
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import Cosmos3OmniPipeline
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    Cosmos3EdgeConfig,
    Cosmos3EdgeForConditionalGeneration,
    Cosmos3OmniConfig,
    Cosmos3OmniForConditionalGeneration,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from alphagrpo_ext.models.cosmos3.autoencoder import Cosmos3Autoencoder
from alphagrpo_ext.models.cosmos3.chat_template import chat_pieces
from alphagrpo_ext.models.cosmos3.configuration_cosmos3 import Cosmos3Config
from alphagrpo_ext.models.cosmos3.transformer import Cosmos3Transformer
from alphagrpo_ext.models.cosmos3.vision import Cosmos3Vision


VARIANTS = ("omni", "edge")

# Bytes come first in Nano's vocabulary and last in Edge's, whose ids here are the released ones.
SPECIAL_TOKENS: dict[str, dict[str, int]] = {
    "omni": {
        token: 256 + i
        for i, token in enumerate(
            (
                *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
                *("<|image_pad|>", "<|video_pad|>", "<think>", "</think>"),
            )
        )
    },
    "edge": {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        "<|im_start|>": 10,
        "<|im_end|>": 11,
        "<think>": 12,
        "</think>": 13,
        "<|video_pad|>": 18,
        "<|image_pad|>": 19,
        "<|vision_start|>": 20,
        "<|vision_end|>": 21,
    },
}
VOCAB_SIZE = {"omni": 272, "edge": 280}

_CONTENT = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' or 'image' in part -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
TEMPLATES = {
    # Qwen3-VL's form.
    "omni": _CONTENT
    + """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + text_of(message.content) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
""",
    # The form of Nemotron's templates: a system turn in any case, and an assistant that thinks unless told not to.
    "edge": _CONTENT
    + """\
{%- set thinks = enable_thinking if enable_thinking is defined else true -%}
{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\\n<|im_end|>\\n' -}}{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + text_of(message.content) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' + ('<think>\\n' if thinks else '<think></think>') -}}
{%- endif -%}
""",
}

TRANSFORMER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_axes_dim": [4, 2, 2],
    "latent_channel": 16,
    "patch_latent_dim": 64,
    "action_dim": 4,
    "num_embodiment_domains": 3,
}
# Only Nano has heads of sound.
SOUND: dict[str, dict[str, Any]] = {"omni": {"sound_gen": True, "sound_dim": 6}, "edge": {}}
VISION: dict[str, dict[str, Any]] = {
    "omni": {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    },
    "edge": {
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_patches": 16,
    },
}
PROJECTOR_SIZE = 80
MAX_POSITIONS = 32768
AUTOENCODER: dict[str, Any] = {
    "base_dim": 8,
    "decoder_base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "latents_mean": [0.1 * i - 0.8 for i in range(16)],
    "latents_std": [0.5 + 0.1 * i for i in range(16)],
}
SCHEDULER: dict[str, Any] = {
    "solver_order": 2,
    "solver_type": "bh2",
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "final_sigmas_type": "zero",
    "num_train_timesteps": 1000,
}


def make_tiny_tokenizer(variant: str) -> PreTrainedTokenizerBase:
    """A tokenizer of single bytes, of the class, special tokens and chat template that the variant is released with."""
    special = SPECIAL_TOKENS[variant]
    first = 0 if variant == "omni" else 22
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Unused ids below the bytes have to belong to something.
    fillers = {f"<|unused_{i}|>": i for i in range(first) if i not in special.values()}
    vocab = {symbol: first + i for i, symbol in enumerate(symbols)} | special | fillers
    tokens = [AddedToken(token, special=True, normalized=False) for token in [*special, *fillers]]
    if variant == "omni":
        tokenizer: PreTrainedTokenizerBase = Qwen2Tokenizer(
            vocab=vocab,
            merges=[],
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            chat_template=TEMPLATES[variant],
        )
    else:
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="<|im_end|>",
            pad_token="<|im_end|>",
            chat_template=TEMPLATES[variant],
        )
    tokenizer.add_tokens(tokens, special_tokens=True)
    return tokenizer


def tiny_config(variant: str, vision: bool = True, **overrides: Any) -> Cosmos3Config:
    """
    Configuration of a tiny model of ours, which is the variant in everything but sizes.

    Args:
        variant (`str`): `"omni"` or `"edge"`.
        vision (`bool`): Whether the model has a vision tower.
        overrides (`Any`): More arguments of the configuration.
    """
    ids = SPECIAL_TOKENS[variant]
    arguments: dict[str, Any] = {
        "variant": variant,
        "transformer_config": {**TRANSFORMER, **SOUND[variant], "vocab_size": VOCAB_SIZE[variant]},
        "vision_config": VISION[variant] if vision else None,
        "projector_hidden_size": PROJECTOR_SIZE,
        "autoencoder_config": AUTOENCODER,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "eos_token_id": ids["<|im_end|>"],
        "max_position_embeddings": MAX_POSITIONS,
        "chat_pieces": chat_pieces(make_tiny_tokenizer(variant)),
    }
    return Cosmos3Config(**{**arguments, **overrides})


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random value, of a size at which it matters, and switch to evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 or parameter.squeeze().ndim == 1:
            is_gain = "norm" in name and not name.endswith("bias")
            parameter.copy_(0.2 * noise + (1 if is_gain else 0))
        elif "embed_tokens" in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return module.eval()


@dataclass
class References:
    """One tiny model in the libraries' own classes: transformer, autoencoder, and vision tower inside the reasoner."""

    transformer: Cosmos3OmniTransformer
    autoencoder: AutoencoderKLWan
    reasoner: nn.Module


def make_reasoner(config: Cosmos3Config) -> nn.Module:
    """Transformers' model of the understanding stream and the vision tower, with the sizes of our configuration."""
    return (
        Cosmos3OmniForConditionalGeneration(Cosmos3OmniConfig(**_reasoner_config(config)))
        if config.variant == "omni"
        else Cosmos3EdgeForConditionalGeneration(Cosmos3EdgeConfig(**_reasoner_config(config)))
    )


def _reasoner_config(config: Cosmos3Config) -> dict[str, Any]:
    sizes, is_omni = config.transformer_config, config.variant == "omni"
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "attention_bias")
    text = {name: sizes[name] for name in names}
    rope = {
        "rope_type": "default",
        "rope_theta": sizes["rope_theta"],
        "mrope_section": sizes["rope_axes_dim"],
        **({"mrope_interleaved": True} if is_omni else {}),
    }
    text |= {"rope_parameters": rope, "max_position_embeddings": config.max_position_embeddings}
    text |= {"model_type": "qwen3_vl_text" if is_omni else "cosmos3_edge_text", "eos_token_id": config.eos_token_id}
    vision = {**config.vision_config, "model_type": "qwen3_vl_vision" if is_omni else "cosmos3_edge_vision"}
    values = {"text_config": text, "vision_config": vision}
    values |= {} if is_omni else {"projector_hidden_size": config.projector_hidden_size}
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return values | {name: getattr(config, name) for name in tokens}


def make_references(variant: str, seed: int = 0, **overrides: Any) -> References:
    """A tiny random model in the libraries' classes. The reasoner has the transformer's weights."""
    config = tiny_config(variant, **overrides)
    transformer = randomize(Cosmos3OmniTransformer(**config.transformer_config), seed)
    autoencoder = randomize(AutoencoderKLWan(**config.autoencoder_config), seed + 1)
    reasoner = randomize(make_reasoner(config), seed + 2)
    load_understanding(reasoner, transformer, variant)
    return References(transformer, autoencoder, reasoner)


REASONER_NAMES = {
    "omni": {
        "self_attn.to_q": "self_attn.q_proj",
        "self_attn.to_k": "self_attn.k_proj",
        "self_attn.to_v": "self_attn.v_proj",
        "self_attn.to_out": "self_attn.o_proj",
        "self_attn.norm_q": "self_attn.q_norm",
        "self_attn.norm_k": "self_attn.k_norm",
    },
    "edge": {
        "self_attn.to_q": "self_attn.q_proj",
        "self_attn.to_k": "self_attn.k_proj",
        "self_attn.to_v": "self_attn.v_proj",
        "self_attn.to_out": "self_attn.o_proj",
        "mlp.up_proj": "mlp.fc1",
        "mlp.down_proj": "mlp.fc2",
    },
}


def load_understanding(reasoner: nn.Module, transformer: nn.Module, variant: str) -> None:
    """Copy the weights of the understanding stream from a transformer of the flat layout into Transformers' model."""
    state = transformer.state_dict()
    target = reasoner.state_dict()
    for name in target:
        if name.startswith("model.language_model.") or name == "lm_head.weight":
            flat = name.removeprefix("model.language_model.")
            for ours, theirs in REASONER_NAMES[variant].items():
                flat = flat.replace(f"{theirs}.", f"{ours}.")
            target[name] = state[flat]
    reasoner.load_state_dict(target)


def vision_state(reasoner: nn.Module, variant: str) -> dict[str, torch.Tensor]:
    """Weights of the vision tower under the names that `vision_encoder/model.safetensors` has."""
    state = reasoner.state_dict()
    if variant == "omni":
        return {name.removeprefix("model.visual."): t for name, t in state.items() if name.startswith("model.visual.")}
    return {name: t for name, t in state.items() if name.startswith(("model.visual.", "model.projector."))}


def write_released_folder(folder: Path, variant: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> References:
    """
    Write a tiny random checkpoint as NVIDIA releases it: `model_index.json` and a folder per component for Diffusers,
    configuration and an index at the root for Transformers, and every weight once.

    Returns:
        [`References`] with the weights that were written.
    """
    references = make_references(variant, seed)
    config = tiny_config(variant)
    for module in (references.transformer, references.autoencoder, references.reasoner):
        module.to(dtype)
    tokenizer = make_tiny_tokenizer(variant)
    scheduler = UniPCMultistepScheduler(
        **SCHEDULER,
        **(
            {"use_karras_sigmas": True, "sigma_min": 0.147, "sigma_max": 200.0}
            if variant == "omni"
            else {"flow_shift": 3.0}
        ),
    )
    Cosmos3OmniPipeline(
        references.transformer,
        tokenizer,
        references.autoencoder,
        scheduler,
        enable_safety_checker=False,
        default_use_system_prompt=variant == "omni",
        use_native_flow_schedule=variant == "edge",
    ).save_pretrained(folder, max_shard_size="300KB")
    if variant == "edge":
        _update_json(folder / "model_index.json", native_flow_shift=3.0)
        # Diffusers warns of these and ignores them.
        extra = {"backbone_type": "cosmos3_edge_nemotron_dense", "temporal_compression_factor": 4}
        _update_json(folder / "transformer" / "config.json", **extra)
    (folder / "vision_encoder").mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in vision_state(references.reasoner, variant).items()},
        folder / "vision_encoder" / "model.safetensors",
        metadata={"format": "pt"},
    )
    if variant == "omni":
        _write_json(folder / "vision_encoder" / "config.json", _reasoner_config(config)["vision_config"])
    _write_root(folder, config, tokenizer)
    return references


def _write_root(folder: Path, config: Cosmos3Config, tokenizer: PreTrainedTokenizerBase) -> None:
    is_omni = config.variant == "omni"
    tokenizer.save_pretrained(folder)
    root = {
        "architectures": [f"Cosmos3{config.variant.title()}ForConditionalGeneration"],
        "model_type": f"cosmos3_{config.variant}",
        **_reasoner_config(config),
    }
    _write_json(folder / "config.json", root)
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor" if is_omni else "Cosmos3EdgeImageProcessor",
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "patch_size": 16,
        "temporal_patch_size": 2 if is_omni else 1,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    _write_json(folder / "preprocessor_config.json", preprocessor)
    weight_map = {}
    for component in ("transformer", "vision_encoder"):
        for path in sorted((folder / component).glob("*.safetensors")):
            weight_map |= dict.fromkeys(load_file(path), f"{component}/{path.name}")
    total = sum((folder / name).stat().st_size for name in set(weight_map.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def make_tiny_model(variant: str, seed: int = 0, vision: bool = True, **overrides: Any) -> nn.Module:
    """Our model with random weights, in fp32 and evaluation mode."""
    from alphagrpo_ext.models.cosmos3.modeling_cosmos3 import Cosmos3Model

    return randomize(Cosmos3Model(tiny_config(variant, vision, **overrides)), seed)


@dataclass
class Parts:
    """The three networks of our model."""

    transformer: Cosmos3Transformer
    vision: Cosmos3Vision
    autoencoder: Cosmos3Autoencoder


def make_parts(references: References, variant: str, **overrides: Any) -> Parts:
    """The networks of our model with the weights of the libraries' classes. Configurations must be the same."""
    config = tiny_config(variant, **overrides)
    parts = Parts(Cosmos3Transformer(config), Cosmos3Vision(config), Cosmos3Autoencoder(config))
    parts.transformer.load_state_dict(references.transformer.state_dict())
    parts.autoencoder.vae.load_state_dict(references.autoencoder.state_dict())
    tower = {
        name.removeprefix("model."): tensor
        for name, tensor in references.reasoner.state_dict().items()
        if name.startswith(("model.visual.", "model.projector."))
    }
    parts.vision.load_state_dict(tower)
    return parts


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _update_json(path: Path, **values: Any) -> None:
    _write_json(path, json.loads(path.read_text(encoding="utf-8")) | values)


def copy_folder(source: Path, target: Path) -> Path:
    """A copy of a folder that a test may damage."""
    return Path(shutil.copytree(source, target))
