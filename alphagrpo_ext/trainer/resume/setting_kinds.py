# SPDX-License-Identifier: Apache-2.0

"""
What becomes of a setting that differs between a checkpoint and the run that resumes from it: one table of all of them.

A new field of [`AlphaGRPOConfig`] gets a line here; a test compares the table with the fields.
"""

from __future__ import annotations

from enum import Enum


class SettingKind(Enum):
    """What becomes of a setting that differs."""

    FIXED = "fixed"
    """Refused: samples, loss, order of prompts or the optimizer's state would no longer be those of one run."""
    FREE = "free"
    """Applied, and said: length, learning rate, saving, logging, evaluation, and how the same numbers are computed."""
    LOCAL = "local"
    """Applied silently and not kept: where a process runs and writes, and secrets."""


_SAMPLING = """
    task task_settings think thought_context image_height image_width num_timesteps timestep_shift sde_type noise_level
    sde_window_size sde_window_range cfg_text_scale cfg_img_scale cfg_interval cfg_renorm_type cfg_renorm_min
    ode_solver ode_steps refine_strength branches_per_thought num_reflection_rounds num_initial_images stage1_think
    allow_stop stage1_selection
    rollout_policy max_completion_length temperature top_p top_k min_p repetition_penalty generation_kwargs chat_template_kwargs
    cache_implementation max_tool_calling_iterations use_transformers_continuous_batching
    transformers_continuous_batching_config use_transformers_paged use_vllm vllm_structured_outputs_regex
"""
_LOSS = """
    image_objective image_epsilon image_beta image_base_beta image_kl_type image_advantage_clip image_loss_weight
    text_loss_weight forward_time_interval nft_beta awm_power awm_time_power context_gradient rectification separate_advantages
    mask_broken_format beta epsilon epsilon_high delta loss_type importance_sampling_level scale_rewards
    reward_weights multi_objective_aggregation mask_truncated_completions num_iterations sapo_temperature_neg
    sapo_temperature_pos vespo_k_pos vespo_k_neg vespo_lambda_pos vespo_lambda_neg top_entropy_quantile
    entropy_coef entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target
    use_adaptive_entropy off_policy_mask_threshold use_bias_correction_kl
    vllm_importance_sampling_cap vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
    vllm_importance_sampling_correction vllm_importance_sampling_mode sync_ref_model ref_model_mixup_alpha
    ref_model_sync_steps ref_model_decay_ramp router_aux_loss_coef label_smoothing_factor
    average_tokens_across_devices disable_dropout cast_lm_head_to_fp32 neftune_noise_alpha
"""
_BATCHES = """
    seed data_seed shuffle_dataset per_device_train_batch_size gradient_accumulation_steps num_generations
    generation_batch_size steps_per_generation auto_find_batch_size dataloader_drop_last train_sampling_strategy
    length_column_name label_names remove_unused_columns ignore_data_skip pad_to_multiple_of
"""
_WEIGHTS = """
    freeze_vision_tower lora_targets lora_init bf16 fp16 optim optim_args optim_target_modules weight_decay
    adam_beta1 adam_beta2 adam_epsilon
"""
_RATES = "learning_rate generation_learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps max_grad_norm"
_LENGTH = "max_steps num_train_epochs"
_SAVING = """
    save_strategy save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint push_to_hub
    hub_model_id hub_private_repo hub_strategy hub_always_push hub_revision
"""
_LOGGING = """
    logging_strategy logging_steps logging_first_step logging_nan_inf_filter include_num_input_tokens_seen
    log_completions log_multimodal log_unique_prompts num_completions_to_print log_completions_hub_repo report
    report_steps report_num_trajectories report_image_size report_to log_work
"""
_EVALUATION = """
    eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size num_generations_eval
    eval_num_timesteps eval_ode_solver eval_ode_steps eval_refine_strength eval_timestep_shift eval_cfg_text_scale
    eval_cfg_img_scale eval_cfg_interval eval_temperature eval_top_p load_best_model_at_end metric_for_best_model greater_is_better
    prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics
    batch_eval_metrics bf16_full_eval fp16_full_eval restore_callback_states_from_checkpoint
"""
_COMPUTING = """
    rollout_batch_size image_steps_per_forward offload_ref_model gradient_checkpointing gradient_checkpointing_kwargs
    activation_checkpointing activation_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
    tf32 use_liger_kernel liger_kernel_config use_cache torch_empty_cache_steps full_determinism accelerator_config
    parallelism_config ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph
    deepspeed fsdp fsdp_config ds3_gather_for_generation dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
"""
_LOCAL = """
    output_dir preset resume_from_checkpoint run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    hub_token local_rank use_cpu ddp_timeout disable_tqdm log_level log_level_replica log_on_each_node debug
    skip_memory_metrics do_train do_eval do_predict trust_remote_code model_init_kwargs vllm_enable_sleep_mode
    vllm_gpu_memory_utilization vllm_group_port vllm_max_model_length vllm_mode vllm_model_impl vllm_server_base_url
    vllm_server_host vllm_server_port vllm_server_timeout vllm_tensor_parallel_size
"""
# What a trainer is given beside its configuration; see `settings.py`.
_CONSTRUCTOR = """
    model.frozen_weights model.dtype peft_config processing_class train_dataset reward_funcs reward_model sharding
"""
_NAMED = "model.name"

SETTING_KINDS: dict[str, SettingKind] = {
    name: kind
    for kind, groups in (
        (SettingKind.FIXED, (_CONSTRUCTOR, _BATCHES, _SAMPLING, _LOSS, _WEIGHTS)),
        (SettingKind.FREE, (_RATES, _LENGTH, _SAVING, _LOGGING, _EVALUATION, _COMPUTING, _NAMED)),
        (SettingKind.LOCAL, (_LOCAL,)),
    )
    for group in groups
    for name in group.split()
}
"""Kind of every field of [`AlphaGRPOConfig`], and of what a trainer is given beside it."""

SAVED_RATE_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")
"""Values of `lr_scheduler_type` whose rate is a state of its own, which a new setting cannot replace."""
