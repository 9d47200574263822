# SPDX-License-Identifier: Apache-2.0

"""
What becomes of the options of [`~trl.GRPOConfig`]: one table of all of them.

An option does what it does in TRL's trainer, or is refused by its name where it could do nothing here. A test compares the table
with the fields, so an option that a new version of TRL brings has to be tried and gets a place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


_THOUGHTS = "thoughts are sampled by temperature, top_p and top_k alone, so that rollout and training agree"
_NO_VLLM = "thoughts and images are sampled by this package's own rollout generator, and nothing by vLLM"
_NO_PAGING = "texts and images are sampled by this package's own rollout generator, and nothing by continuous batching"

REFUSED_OPTIONS: dict[str, str] = {
    "min_p": f"{_THOUGHTS}: use top_p",
    "repetition_penalty": f"{_THOUGHTS}: write a reward that lowers the score of repetitions",
    "generation_kwargs": f"{_THOUGHTS}: set those, and max_completion_length for the longest thought",
    "chat_template_kwargs": "a prompt has the form of its task, and no chat template is applied: write a task for another form, "
    "and set think=False for no thought",
    "cache_implementation": "the model family has a cache of its own",
    "max_tool_calling_iterations": "a policy that paints calls no tools",
    "cast_lm_head_to_fp32": "log-probabilities are computed in fp32 from the head's logits; for a head in fp32 load the model in "
    "float32",
    "neftune_noise_alpha": "noise on embeddings would make rollout and training disagree",
    "label_smoothing_factor": "there are no labels",
    "debug": "its hooks do not take the model's inputs; a loss, a gradient or a weight that is not finite stops the run anyway",
    "remove_unused_columns": "rewards and tasks read columns of the dataset: remove those that nobody reads yourself",
    "liger_kernel_config": "Liger's kernels are not used",
    "use_transformers_continuous_batching": _NO_PAGING,
    "use_transformers_paged": _NO_PAGING,
    "transformers_continuous_batching_config": _NO_PAGING,
    "use_vllm": _NO_VLLM,
    "use_liger_kernel": "it replaces TRL's loss of text, and modules of architectures that Liger knows; texts and images are "
    "computed in one packed forward, which uses neither",
    **dict.fromkeys(
        """
        vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_group_port vllm_importance_sampling_cap
        vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min vllm_importance_sampling_correction
        vllm_importance_sampling_mode vllm_max_model_length vllm_mode vllm_model_impl vllm_server_base_url
        vllm_server_host vllm_server_port vllm_server_timeout vllm_structured_outputs_regex vllm_tensor_parallel_size
        """.split(),
        _NO_VLLM,
    ),
}
"""Options that would do nothing here or break the model, each with the reason and what to do instead."""

_THOUGHT_AND_LOSS = """
    beta delta disable_dropout entropy_coef entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target epsilon
    epsilon_high importance_sampling_level loss_type mask_truncated_completions max_completion_length
    multi_objective_aggregation num_iterations off_policy_mask_threshold ref_model_mixup_alpha ref_model_sync_steps
    reward_weights router_aux_loss_coef sapo_temperature_neg sapo_temperature_pos scale_rewards sync_ref_model
    temperature top_entropy_quantile top_k top_p use_adaptive_entropy use_bias_correction_kl vespo_k_neg vespo_k_pos
    vespo_lambda_neg vespo_lambda_pos
"""
_BATCHES_AND_DATA = """
    auto_find_batch_size average_tokens_across_devices data_seed dataloader_drop_last dataloader_in_order
    dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
    dataloader_prefetch_factor generation_batch_size gradient_accumulation_steps ignore_data_skip label_names
    length_column_name max_steps num_generations num_generations_eval num_train_epochs pad_to_multiple_of
    per_device_eval_batch_size per_device_train_batch_size seed shuffle_dataset steps_per_generation
    train_sampling_strategy
"""
_OPTIMIZER = """
    adam_beta1 adam_beta2 adam_epsilon learning_rate lr_scheduler_kwargs lr_scheduler_type max_grad_norm optim optim_args
    optim_target_modules warmup_steps weight_decay
"""
_COMPUTING = """
    accelerator_config activation_checkpointing activation_checkpointing_kwargs bf16 bf16_full_eval ddp_backend
    ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout deepspeed
    ds3_gather_for_generation fp16 fp16_full_eval fsdp fsdp_config full_determinism gradient_checkpointing
    gradient_checkpointing_kwargs local_rank model_init_kwargs parallelism_config skip_memory_metrics tf32
    torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps trust_remote_code use_cache use_cpu
"""
_EVALUATION = """
    batch_eval_metrics do_eval do_predict do_train eval_accumulation_steps eval_delay eval_do_concat_batches
    eval_on_start eval_steps eval_strategy eval_use_gather_object greater_is_better include_for_metrics
    load_best_model_at_end metric_for_best_model prediction_loss_only
"""
_SAVING_AND_LOGGING = """
    disable_tqdm enable_jit_checkpoint hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token
    include_num_input_tokens_seen log_completions log_completions_hub_repo log_level log_level_replica log_multimodal
    log_on_each_node log_unique_prompts logging_first_step logging_nan_inf_filter logging_steps logging_strategy
    num_completions_to_print output_dir project push_to_hub report_to restore_callback_states_from_checkpoint
    resume_from_checkpoint run_name save_on_each_node save_only_model save_steps save_strategy save_total_limit
    trackio_bucket_id trackio_space_id trackio_static_space_id
"""
KEPT_OPTIONS = frozenset(
    name
    for group in (
        _THOUGHT_AND_LOSS,
        _BATCHES_AND_DATA,
        _OPTIMIZER,
        _COMPUTING,
        _EVALUATION,
        _SAVING_AND_LOGGING,
    )
    for name in group.split()
)
"""Options that do what they do in TRL's trainer."""
OPTION_CHOICES = {
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}
"""The words that options can be, of those whose words TRL compares after a rollout, or in a loss."""


def refuse_options(config: Any, changed: Iterable[str]) -> None:
    """
    Refuse the options that could do nothing here.

    Args:
        config (`AlphaGRPOConfig`): The configuration.
        changed (`Iterable[str]`): Names of arguments that have another value than their default.

    Raises:
        `ValueError`: If one of them is refused. The message has all of them, with their values and what to do.
    """
    refused = [
        f"{name}={getattr(config, name)!r}: {REFUSED_OPTIONS[name]}"
        for name in sorted(REFUSED_OPTIONS.keys() & changed)
        # No value is asked for by an empty one, or by a probability of 0.
        if getattr(config, name) or getattr(type(config), name) is not None
    ]
    if refused:
        raise ValueError(
            f"AlphaGRPOTrainer does not take {'; '.join(refused)}. Leave {'it' if len(refused) == 1 else 'them'} out"
        )
