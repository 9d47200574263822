# SPDX-License-Identifier: Apache-2.0

"""The tiny BAGEL of the shapes world: its configuration, tokenizer and processor."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, SiglipVisionConfig

from alphagrpo_ext.models.bagel.configuration_bagel import BagelConfig
from alphagrpo_ext.models.bagel.processing_bagel import BagelProcessor
from alphagrpo_ext.shapes.scene import IMAGE_SIZE
from alphagrpo_ext.shapes.text import (
    GENERATION_SYSTEM_PROMPT,
    KEEP_VERDICT,
    REFLECTION_PROMPT,
    REPAINT_VERDICT,
    UNDERSTANDING_SYSTEM_PROMPT,
    vocabulary,
)


PATCH_SIZE = 4
TOKENIZER_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word of the shapes world. Words are separated by blanks."""
    words = [*TOKENIZER_SPECIAL_TOKENS, *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|vision_start|>", "<|vision_end|>"],
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> BagelProcessor:
    """Build a processor for images of one size, for the autoencoder and for the vision tower."""
    limits = {
        f"{tower}_{name}": value
        for tower in ("vae", "vit")
        for name, value in (("max_size", IMAGE_SIZE), ("min_size", IMAGE_SIZE), ("stride", PATCH_SIZE))
    }
    return BagelProcessor(
        tokenizer=build_tokenizer(),
        generation_system_prompt=GENERATION_SYSTEM_PROMPT,
        understanding_system_prompt=UNDERSTANDING_SYSTEM_PROMPT,
        reflection_prompt=REFLECTION_PROMPT,
        verdict_request="",
        keep_verdict=KEEP_VERDICT,
        repaint_verdict=REPAINT_VERDICT,
        **limits,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> BagelConfig:
    """
    Make a configuration with about two million parameters: BAGEL's architecture, for images of 6 x 6 latent tokens.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): Tokenizer with the vocabulary and the delimiters.
    """
    token_ids = tokenizer.get_vocab()
    return BagelConfig(
        text_config=Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        ),
        vae_config={
            "block_out_channels": [16, 32],
            "layers_per_block": 1,
            "latent_channels": 8,
            "norm_num_groups": 8,
            "scaling_factor": 1.0,
            "shift_factor": 0.0,
        },
        latent_patch_size=2,
        max_latent_size=IMAGE_SIZE // PATCH_SIZE,
        bos_token_id=token_ids["<|im_start|>"],
        eos_token_id=token_ids["<|im_end|>"],
        image_start_token_id=token_ids["<|vision_start|>"],
        image_end_token_id=token_ids["<|vision_end|>"],
    )
