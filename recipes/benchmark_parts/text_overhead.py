# SPDX-License-Identifier: Apache-2.0

"""What this package's trainer costs on top of TRL's, with the same text network, prompts, completions and rewards."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from alphagrpo_ext.trainer import AlphaGRPOConfig, AlphaGRPOTrainer
from alphagrpo_ext.trainer.step import rollout_fields
from alphagrpo_ext.trajectory import TextSegment, Trajectory
from benchmark_parts.families import BENCHMARK_FAMILIES
from benchmark_parts.sizes import Size
from benchmark_parts.workload import build_image_processor, build_random_model


PROMPT_TOKENS = 32
BATCH_SIZE = 16


def sample_ids(count: int, rng: random.Random, vocab_size: int) -> list[int]:
    """Draw token ids that are not special."""
    return [rng.randrange(10, vocab_size) for _ in range(count)]


def sum_of_ids(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A reward that differs within a group."""
    return [float(sum(ids) % 17) for ids in completion_ids]


class StepTimes(TrainerCallback):
    """Records the seconds of every optimizer step, by the wall clock or another one."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(self.clock() - self.start)


class TextOnlyTrainer(AlphaGRPOTrainer):
    """The trainer with a rollout of random text, the same kind as that of the trainer that it is compared with."""

    thought_tokens = 64

    def _sample_rollout(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        rng = random.Random(self.state.global_step)
        vocab_size = self.model.config.get_text_config().vocab_size
        step = self._rollout_step
        step.trajectories = [
            Trajectory(
                [
                    TextSegment(sample_ids(PROMPT_TOKENS, rng, vocab_size)),
                    TextSegment(
                        sample_ids(self.thought_tokens, rng, vocab_size),
                        sampled=True,
                        ended=False,
                        log_probs=[0.0] * self.thought_tokens,
                    ),
                ]
            )
            for _ in prompts
        ]
        step.texts = [[self.processing_class.decode(t.sampled_texts[0].content_ids)] for t in step.trajectories]
        return rollout_fields(step.trajectories, step.texts, self._tokenizer.eos_token_id)


def plain_model(size: Size, vocab_size: int) -> Qwen3ForCausalLM:
    """Build a Qwen3 with the sizes of the understanding expert of a unified model."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=size.hidden_size,
            intermediate_size=size.intermediate_size,
            num_hidden_layers=size.num_layers,
            num_attention_heads=size.num_heads,
            num_key_value_heads=size.num_heads,
            head_dim=size.hidden_size // size.num_heads,
            attention_bias=BENCHMARK_FAMILIES[size.family].attention_bias,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            attn_implementation=size.attn_implementation,
        )
    )


def random_completions(
    prompts: list[Any], trainer: GRPOTrainer, vocab_size: int, num_tokens: int
) -> dict[str, list[Any]]:
    """TRL's `rollout_func` with random prompts and completions."""
    rng = random.Random(trainer.state.global_step)
    completions = [
        (sample_ids(PROMPT_TOKENS, rng, vocab_size), sample_ids(num_tokens, rng, vocab_size)) for _ in prompts
    ]
    return {
        "prompt_ids": [prompt for prompt, _ in completions],
        "completion_ids": [ids for _, ids in completions],
        "logprobs": [[0.0] * num_tokens for _ in completions],
    }


def build_trainers(size: Size, output_dir: str, steps: int, bf16: bool) -> dict[str, GRPOTrainer]:
    """
    Build TRL's trainer of a Qwen3 and this package's trainer of a unified model whose understanding expert has the same sizes. Both
    train on one rollout of random text per step, in which the generation expert takes no part.

    Args:
        size ([`Size`]): Sizes of the decoder, and the number of tokens of a completion (`thought_tokens`).
        output_dir (`str`): Output directory of the trainers, in which they write nothing.
        steps (`int`): Optimizer steps of a run.
        bf16 (`bool`): Whether to train under autocast.
    """
    processor = build_image_processor(size)
    shared = {
        "output_dir": output_dir,
        "per_device_train_batch_size": BATCH_SIZE,
        "num_generations": 8,
        "max_completion_length": size.thought_tokens,
        "max_steps": steps,
        "learning_rate": 1e-5,
        "bf16": bf16,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "scale_rewards": "batch",
        "epsilon_high": 0.28,
        "weight_decay": 1e-4,
        "logging_steps": 1,
    }
    dataset = Dataset.from_list([{"prompt": f"a red circle and {i} blue squares"} for i in range(8)])

    torch.manual_seed(0)
    model = build_random_model(size)
    vocab_size = model.config.get_text_config().vocab_size
    plain = GRPOTrainer(
        model=plain_model(size, vocab_size),
        reward_funcs=sum_of_ids,
        args=GRPOConfig(**shared),
        train_dataset=dataset,
        processing_class=processor.tokenizer,
        rollout_func=functools.partial(random_completions, vocab_size=vocab_size, num_tokens=size.thought_tokens),
    )
    unified = TextOnlyTrainer(
        model=model,
        reward_funcs=sum_of_ids,
        args=AlphaGRPOConfig(
            **shared, image_height=size.image_size, image_width=size.image_size, sde_window_size=1, top_p=1.0
        ),
        train_dataset=dataset,
        processing_class=processor,
    )
    unified.thought_tokens = size.thought_tokens
    return {"GRPOTrainer": plain, "AlphaGRPOTrainer": unified}


def step_seconds(trainer: GRPOTrainer) -> list[float]:
    """Train and return the seconds of every optimizer step but the first."""
    times = StepTimes()
    trainer.add_callback(times)
    try:
        trainer.train()
    finally:
        trainer.remove_callback(times)
    return times.seconds[1:]
