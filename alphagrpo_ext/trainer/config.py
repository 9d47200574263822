# SPDX-License-Identifier: Apache-2.0

"""Configuration of [`AlphaGRPOTrainer`]."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

import torch
from trl import GRPOConfig

from alphagrpo_ext.flow.forward_process import draw_times
from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.flow.timesteps import draw_window, window_starts
from alphagrpo_ext.models.contract import CONTEXT_GRADIENTS, LORA_TARGETS
from alphagrpo_ext.objectives.base import OBJECTIVES, ObjectiveConfig
from alphagrpo_ext.ranges import (
    AtLeastTwo,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveUnitFloat,
    UnitFloat,
    check_number,
    check_ranges,
    number_or_word,
)
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.rollout.generator import RolloutConfig
from alphagrpo_ext.rollout.presets import PRESETS, preset_settings
from alphagrpo_ext.rollout.settings import SETTING_NAMES, TaskSettings, read_task_settings, resolve_settings
from alphagrpo_ext.rollout.task import PAINTING_TASK, TASKS, Task
from alphagrpo_ext.trainer.trl_options import OPTION_CHOICES, refuse_options


INHERITED_RANGES = {
    name: interval
    for interval, names in {
        "[1, inf)": "gradient_accumulation_steps per_device_eval_batch_size num_generations_eval generation_batch_size "
        "steps_per_generation num_iterations ref_model_sync_steps ddp_timeout pad_to_multiple_of",
        "[0, inf)": "warmup_steps max_grad_norm logging_steps eval_steps eval_delay save_steps "
        "dataloader_num_workers beta epsilon top_k",
        "(0, inf)": "adam_epsilon num_train_epochs temperature repetition_penalty delta sapo_temperature_neg "
        "sapo_temperature_pos",
        "[0, 1)": "adam_beta1 adam_beta2 label_smoothing_factor",
        "[0, 1]": "min_p ref_model_mixup_alpha top_entropy_quantile",
        "[-1, inf)": "max_steps",
        f"[0, {2**32 - 1}]": "seed data_seed",
    }.items()
    for name in names.split()
}
"""Ranges of numbers that TRL and Transformers define. Numbers that are not named here must be finite."""
RECTIFICATIONS = ("minimum", "initial", "off")
"""Rules that lower the reward of a refinement which improved nothing."""
SELECTIONS = ("lowest", "sampled")
"""Ways to choose which of several initial images is refined."""
STEPS_PER_FORWARD = ("auto", "all")
"""What `image_steps_per_forward` can be, beside a number."""
LORA_INITS = ("kaiming", "gaussian")
"""Distributions of the first matrix of a new LoRA adapter."""
ROLLOUT_POLICIES = ("policy", "reference")
"""The models that can sample the rollouts."""
TASK_DEFAULTS: dict[str, Any] = {
    **TaskSettings(
        cfg_text_scale=4.0,
        cfg_img_scale=1.0,
        cfg_interval=(0.4, 1.0),
        cfg_renorm_type="global",
        cfg_renorm_min=0.0,
        num_timesteps=16,
        timestep_shift=3.0,
        ode_solver="euler",
        refine_strength=1.0,
        image_height=512,
        image_width=512,
        max_completion_length=512,
        temperature=1.0,
        top_p=0.8,
        top_k=0,
    ).given(),
    **{"eval_ode_solver": "euler", "eval_temperature": 0.3, "eval_top_p": 1.0},
}
"""What holds where neither the user nor the task sets it. Arguments of these names are `None` until then."""
TASK_SETTINGS = (
    *SETTING_NAMES,
    *("eval_num_timesteps", "eval_timestep_shift", "eval_ode_solver", "eval_ode_steps", "eval_refine_strength"),
    *("eval_cfg_text_scale", "eval_cfg_img_scale", "eval_cfg_interval", "eval_temperature", "eval_top_p"),
)
"""Arguments that are settings of a task."""


@dataclass
class AlphaGRPOConfig(GRPOConfig):
    """
    Configuration class for the [`AlphaGRPOTrainer`].

    Every argument of [`~trl.GRPOConfig`] keeps its meaning for text, or is refused; `trl_options.py` says which. The defaults of
    sampling and of the objective are those of the paper's released configuration for reasoning text-to-image;
    `recipes/configs/*_bagel.yaml` have all of it. Where the paper leaves a choice to TRL, TRL's default holds, except for
    `loss_type`. It is `"grpo"`, the loss that sequence-level ratios, the paper's setting for text, were published with; TRL
    warns about other combinations.

    Each argument is described once, by the help text of its field, which `--help` shows.

    `changed_arguments` has the names of the arguments that were given another value than their default.
    """

    per_device_train_batch_size: PositiveInt = field(
        default=14,
        metadata={"help": "Trajectories per process in a micro-batch. The default is one group."},
    )
    num_generations: AtLeastTwo = field(
        default=14,
        metadata={"help": "Trajectories sampled per prompt: the size of a group, at least 2."},
    )
    learning_rate: NonNegativeFloat = field(default=5e-5, metadata={"help": "Initial learning rate of AdamW."})
    weight_decay: NonNegativeFloat = field(default=1e-4, metadata={"help": "Weight decay."})
    max_completion_length: NonNegativeInt | None = field(
        default=None, metadata={"help": "Longest thought, in tokens; 512 by default."}
    )
    temperature: PositiveFloat | None = field(
        default=None, metadata={"help": "Temperature of thoughts that are sampled for training; 1.0 by default."}
    )
    top_p: PositiveUnitFloat | None = field(
        default=None, metadata={"help": "Nucleus of thoughts that are sampled for training; 0.8 by default."}
    )
    top_k: int | None = field(
        default=None,
        metadata={"help": "Number of likeliest tokens that thoughts are drawn from; 0, the default, takes all."},
    )
    scale_rewards: str = field(
        default="batch",
        metadata={
            "help": "What advantages are divided by: the standard deviation over the 'batch' or the 'group', or 'none'."
        },
    )
    loss_type: str = field(default="grpo", metadata={"help": "Loss of text; see GRPOConfig."})
    importance_sampling_level: str = field(
        default="sequence",
        metadata={"help": "Whether the ratio of text is taken per 'token' or per 'sequence'."},
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Whether to disable dropout, which would make rollout and training disagree."},
    )
    epsilon_high: NonNegativeFloat | None = field(
        default=0.28, metadata={"help": "Upper clip range of the ratio of text."}
    )

    task: str = field(
        default="reasoning_t2i",
        metadata={"help": "Task of the policy, a registered name. The column 'task' of a row takes precedence."},
    )
    task_settings: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Settings of single tasks, as JSON or a mapping in YAML, e.g. \'{"reasoning_t2i": {"cfg_text_scale": '
            "3.0}}'. They are guidance (cfg_*), schedule (num_timesteps, timestep_shift, ode_*, refine_strength), size (image_height, "
            "image_width) and thought (max_completion_length, temperature, top_p, top_k), and those of evaluation (eval_*). "
            "They win over the argument of that name, which is about --task: a task beside it (rows of other tasks, and "
            "reasoning_t2i as the painter of initial images) keeps the guidance that it declares, and takes the argument "
            "for all that it does not declare. Arguments that are not given are what --task declares, or their default."
        },
    )
    think: bool = field(default=True, metadata={"help": "Whether the policy writes a thought before it paints."})
    thought_context: str | None = field(
        default=None,
        metadata={
            "help": "What an image is painted from after a thought: 'in_place', the conversation that the thought ends, or "
            "'rewrite', a new one whose request is the thought (Cosmos3 alone). By default what the model's folder says."
        },
    )
    freeze_vision_tower: bool = field(
        default=True,
        metadata={"help": "Whether to exclude vision tower and connector from training."},
    )

    lora_targets: str = field(
        default="both",
        metadata={
            "help": "Expert whose attention and MLP get an adapter: 'both', 'generation' or 'understanding'. "
            "--lora_target_modules takes precedence."
        },
    )
    lora_init: str = field(
        default="kaiming",
        metadata={
            "help": "Initial values of the first matrix of a LoRA adapter: 'kaiming', PEFT's default, or 'gaussian', with a standard "
            "deviation of 1 / lora_r, as in the paper's released code. At BAGEL's widths the first updates are then 3 to 7 times as "
            "large. A peft_config with another init_lora_weights keeps it."
        },
    )

    # Parameters that control rollouts
    image_height: PositiveInt | None = field(
        default=None, metadata={"help": "Height of painted images, in pixels; 512 by default."}
    )
    image_width: PositiveInt | None = field(
        default=None, metadata={"help": "Width of painted images, in pixels; 512 by default."}
    )
    num_timesteps: AtLeastTwo | None = field(
        default=None,
        metadata={
            "help": "Points of the denoising schedule, 16 by default: without ode_steps, the network is evaluated "
            "num_timesteps - 1 times."
        },
    )
    timestep_shift: PositiveFloat | None = field(
        default=None, metadata={"help": "Shift of the schedule towards noise; 3.0 by default."}
    )
    sde_type: str = field(
        default="flow_sde",
        metadata={"help": "Transition inside the window: 'flow_sde' or 'flow_cps'."},
    )
    noise_level: PositiveFloat = field(default=0.7, metadata={"help": "Noise level of the stochastic steps."})
    sde_window_size: PositiveInt = field(
        default=10,
        metadata={"help": "Number of stochastic steps of an image, which are the trained ones."},
    )
    sde_window_range: list[NonNegativeInt] = field(
        default_factory=lambda: [0, 11],
        metadata={"help": "First step that may be trained, and the step after the last one that may."},
    )
    cfg_text_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale of text; at most 1 is off. 4.0 by default."}
    )
    cfg_img_scale: float | None = field(
        default=None,
        metadata={
            "help": "Guidance scale of images; at most 1 is off. By default 1.0, in tasks that refine or edit 2.0."
        },
    )
    cfg_interval: list[UnitFloat] | None = field(
        default=None,
        metadata={
            "help": "Half-open interval (low, high] of shifted times that are guided. By default 0.4 1.0, in tasks that "
            "refine or edit 0.0 1.0."
        },
    )
    cfg_renorm_type: str | None = field(
        default=None,
        metadata={
            "help": "Renormalisation of guidance: 'global', 'channel' or 'text_channel'. By default 'global', in tasks "
            "that refine or edit 'text_channel'."
        },
    )
    cfg_renorm_min: UnitFloat | None = field(
        default=None, metadata={"help": "Least factor of the renormalisation; 1 is off. 0.0 by default."}
    )
    ode_solver: str | None = field(
        default=None,
        metadata={
            "help": "Solver of the steps outside the window, one evaluation of the network each: 'euler', the default, or "
            "of second order 'ab2' (Adams-Bashforth) or 'dpmpp_2m' (DPM-Solver++). Its history is cleared after the window "
            "and where guidance is switched on or off."
        },
    )
    ode_steps: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "Steps outside the window in total, shared between the stretches before and after it in proportion to"
            " their steps of the schedule, at least one each. An image takes sde_window_size + ode_steps "
            "evaluations wherever the window lies. Those of the schedule by default."
        },
    )
    refine_strength: PositiveUnitFloat | None = field(
        default=None,
        metadata={
            "help": "Where a task refines or edits an image, painting starts at the first time s of the schedule that is not "
            "above this, from (1 - s) image + s noise; the lower, the more of the image stays. Windows must lie after "
            "that time (sde_window_range). At 1.0, the default, painting starts from noise, as in all other tasks."
        },
    )
    branches_per_thought: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "Images painted after each thought of a group, which then has num_generations / branches_per_thought "
            "thoughts; 1 by default. They share the thought, its cache, the initial noise and all evaluations up to the first "
            "of the window. The gradient of a thought is that of the mean advantage of its images, so with a "
            "single thought in a group text learns nothing. With several rounds, images share in the first round "
            "only."
        },
    )
    preset: str = field(
        default="paper",
        metadata={
            "help": "Defaults of ode_solver, ode_steps and branches_per_thought: 'paper' evaluates the network at every step of the "
            "schedule by Euler, for one image per thought; 'fast' takes a third of the steps outside the window, by 'ab2', and "
            "two images per thought where a group has at least four. With an objective that trains no window, 'fast' takes half of "
            "all steps. These arguments win over it."
        },
    )
    rollout_batch_size: PositiveInt | None = field(
        default=None,
        metadata={"help": "Samples that a process generates at once; its whole share by default."},
    )

    # Parameters that control self-reflection
    num_reflection_rounds: PositiveInt = field(
        default=1,
        metadata={
            "help": "Rounds in which the policy reflects and paints again. Every round sees the image before it."
        },
    )
    num_initial_images: PositiveInt = field(
        default=1,
        metadata={
            "help": "Images that every process paints for each of its prompts, deterministically. The whole group refines one "
            "of them. A row with an 'image' uses that one."
        },
    )
    stage1_think: bool = field(
        default=False,
        metadata={
            "help": "Whether these images are painted with a thought, which is not part of the reflection. With allow_stop, "
            "set it, unless the rows have images: without a thought few images are worth keeping."
        },
    )
    stage1_selection: str = field(
        default="lowest",
        metadata={"help": "Which image is refined: of 'lowest' reward, or 'sampled' by softmax(1 - reward)."},
    )
    allow_stop: bool = field(
        default=False,
        metadata={
            "help": "Whether a turn may end without painting, after a reflection that says that the image is right. The image "
            "is then kept, and its reward is that of the trajectory."
        },
    )
    rectification: str = field(
        default="minimum",
        metadata={
            "help": "Reward of an image that is no better than the one it refines: the 'minimum' of the group, that of "
            "the 'initial' image, or its own: 'off'. An image that is kept has its own."
        },
    )
    separate_advantages: bool = field(
        default=True,
        metadata={
            "help": "Whether rewards that judge text alone (reward models, and functions with a true attribute text_only)"
            " are kept out of the advantages of images."
        },
    )
    mask_broken_format: bool = field(
        default=False,
        metadata={"help": "Whether an image whose text got less than half of a text-only reward has no advantage."},
    )

    # Parameters that control evaluation
    eval_num_timesteps: AtLeastTwo | None = field(
        default=None,
        metadata={
            "help": "num_timesteps in evaluation, where all steps are deterministic; the training value by default. BAGEL's "
            "own setting is 50."
        },
    )
    eval_ode_solver: str | None = field(
        default=None, metadata={"help": "ode_solver in evaluation; 'euler' by default."}
    )
    eval_ode_steps: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "Steps of the whole path in evaluation, whatever eval_num_timesteps is; those of its schedule by "
            "default."
        },
    )
    eval_refine_strength: PositiveUnitFloat | None = field(
        default=None,
        metadata={"help": "refine_strength in evaluation; the training value by default."},
    )
    eval_timestep_shift: PositiveFloat | None = field(
        default=None,
        metadata={
            "help": "timestep_shift in evaluation; the training value by default, which need not suit another number of "
            "steps."
        },
    )
    eval_cfg_text_scale: float | None = field(
        default=None,
        metadata={"help": "cfg_text_scale in evaluation; the training value by default."},
    )
    eval_cfg_img_scale: float | None = field(
        default=None,
        metadata={"help": "cfg_img_scale in evaluation; the training value by default."},
    )
    eval_cfg_interval: list[UnitFloat] | None = field(
        default=None,
        metadata={"help": "cfg_interval in evaluation; the training value by default."},
    )
    eval_temperature: NonNegativeFloat | None = field(
        default=None, metadata={"help": "Temperature of thoughts in evaluation; 0.3 by default."}
    )
    eval_top_p: PositiveUnitFloat | None = field(
        default=None, metadata={"help": "Nucleus of thoughts in evaluation; 1.0 by default."}
    )

    # Parameters that control the report
    report: bool = field(
        default=False,
        metadata={
            "help": "Whether to keep a page report.html in output_dir up to date: curves, and trajectories with their "
            "images and answers. Its data is in output_dir/report."
        },
    )
    report_steps: PositiveInt = field(
        default=10,
        metadata={
            "help": "Steps between rollouts that the report shows beside the first and the last, and the fewest between two writes of it."
        },
    )
    report_num_trajectories: PositiveInt = field(
        default=240,
        metadata={
            "help": "Most trajectories in the report: the newest, up to half of them, the first, and the most informative"
            " in between."
        },
    )
    report_image_size: PositiveInt = field(
        default=256,
        metadata={"help": "Longest side of an image in the report, in pixels."},
    )
    log_work: bool = field(
        default=False,
        metadata={"help": "Whether to log the tokens that the network is run on, by purpose, as work/*."},
    )

    # Parameters that control training
    image_objective: str = field(default="flow_grpo", metadata={"help": "Objective of images; a registered one."})
    text_loss_weight: NonNegativeFloat = field(default=1.0, metadata={"help": "Weight of the loss of text."})
    image_loss_weight: NonNegativeFloat = field(default=1.0, metadata={"help": "Weight of the loss of images."})
    image_epsilon: PositiveFloat | None = field(
        default=None,
        metadata={
            "help": "Clip range of the ratio of images, whose log-probability is an average over the image: 1e-5 by "
            "default, 1 for 'awm'. Text has epsilon and epsilon_high."
        },
    )
    image_beta: NonNegativeFloat = field(default=0.0, metadata={"help": "KL coefficient of images. Text has beta."})
    image_base_beta: NonNegativeFloat = field(
        default=0.0,
        metadata={
            "help": "With sync_ref_model, the weight of a second penalty of images: the mean squared difference to the "
            "velocity of the model before training, or of the model without its adapter. Where the reference does not "
            "follow the policy, image_beta with image_kl_type 'velocity' is this penalty."
        },
    )
    image_kl_type: str = field(
        default="mean",
        metadata={
            "help": "What the KL of images compares: 'mean' of the transition or 'velocity', a registered name. With "
            "sync_ref_model the reference is an exponential moving average of the policy, with an adapter too."
        },
    )
    image_advantage_clip: PositiveFloat = field(
        default=5.0, metadata={"help": "Largest absolute advantage of an image. 'awm' divides advantages by it."}
    )
    forward_time_interval: list[UnitFloat] | None = field(
        default=None,
        metadata={
            "help": "Interval, before the shift, from which objectives of the forward process ('diffusion_nft', 'awm') "
            "draw the sde_window_size times of noised copies; by default 0.0 1.0, for 'awm' 0.128 1.0, the first 35 of "
            "the 40 points of a schedule. They paint deterministically and train the velocity"
            " without guidance, so sde_window_range, sde_type and noise_level have no effect on them."
        },
    )
    nft_beta: PositiveFloat = field(
        default=1.0,
        metadata={
            "help": "Share of the current policy in DiffusionNFT's implicit policies. The rest is the policy that "
            "sampled."
        },
    )
    awm_power: PositiveUnitFloat = field(
        default=0.25,
        metadata={
            "help": "Power p of the flow-matching error e in AWM's log-likelihood -t^q e^p / p. Below 1, noised copies that "
            "are predicted well weigh more."
        },
    )
    awm_time_power: NonNegativeFloat = field(
        default=1.0,
        metadata={
            "help": "Power q of the time t in AWM's log-likelihood. Above 0, copies with little noise weigh less."
        },
    )
    generation_learning_rate: NonNegativeFloat | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the parameters that only the generation of images uses; learning_rate by default. "
            "The scheduler scales both."
        },
    )
    image_steps_per_forward: str = field(
        default="auto",
        metadata={
            "help": "Most trained steps of an image in one packed forward: a number, 'all', or 'auto', which takes the least that "
            "keep forwards large enough to be fast. Fewer need less memory; the gradient is the same. Contexts are run once "
            "for all of these forwards, unless the model family cannot, or parameters are sharded and there are several "
            "tasks: there, and under ZeRO 3, which cannot split them, 'auto' takes all."
        },
    )
    context_gradient: str = field(
        default="exact",
        metadata={
            "help": "Whether the loss of images has a gradient through prompt and thought ('exact') or treats them as "
            "constant ('detached'), as codebases do that run one forward per trained step. The loss is the same, "
            "and text keeps its own gradient. Detached is faster where no text is sampled."
        },
    )
    offload_ref_model: bool = field(
        default=False,
        metadata={
            "help": "Whether the frozen copies of training without an adapter (the reference model, and the one of "
            "image_base_beta) stay in the memory of the host, and are moved to the accelerator while they score or sample."
        },
    )
    rollout_policy: str = field(
        default="policy",
        metadata={
            "help": "Model that samples the rollouts: the 'policy', or the 'reference' that follows it (sync_ref_model), "
            "like the sampling policy of DiffusionNFT. Ratios and old velocities are then those of the reference."
        },
    )
    ref_model_decay_ramp: PositiveFloat | None = field(
        default=None,
        metadata={
            "help": "With sync_ref_model, how much the share of itself that the reference keeps rises per step, until it "
            "is 1 - ref_model_mixup_alpha; it starts there by default. DiffusionNFT's experiments use 0.001 and "
            "an alpha of 0.5."
        },
    )

    def __post_init__(self) -> None:
        # Before anything is resolved, because what follows from the given arguments was not given.
        given = self._differing_arguments()
        # On a machine without accelerators, processes that are launched together find each other only with `use_cpu`. It stays
        # off where the launcher names the device to accelerate, because DeepSpeed takes a CPU only without it.
        named_device = "ACCELERATE_TORCH_DEVICE" in os.environ
        self.use_cpu = self.use_cpu or not (torch.accelerator.is_available() or named_device)
        # Before, because TRL calculates with the numbers, and after, because it reads dictionaries from texts.
        self.check_numbers()
        self._resolve_own_task()
        self._initialize_upstream()
        self.check_numbers()
        refuse_options(self, given & self._differing_arguments())
        self.make_task(self.task)
        self._check_choices()
        steps = number_or_word("image_steps_per_forward", self.image_steps_per_forward, STEPS_PER_FORWARD)
        self.image_steps_per_forward = steps
        self._apply_preset()
        self._resolve_objective()
        self._check_bounds()
        self._check_trains()
        OBJECTIVES.get(self.image_objective)(self.objective)
        if self.trains_forward_process and self.image_beta and self.image_kl_type == "mean":
            raise ValueError(
                f"image_kl_type='mean' compares the means of transitions, which image_objective={self.image_objective!r} "
                f"does not sample: set image_kl_type='velocity', or image_beta=0"
            )
        self._check_rollouts()
        if "sde_window_range" in given:
            self._check_window_ends()
        self._check_branches()
        for name in self.with_painting_task([self.task, *self.task_settings]):
            self.check_task(name)
        # Parsers of command lines give some defaults in another form, which is resolved by now.
        self.changed_arguments = given & self._differing_arguments()

    def _initialize_upstream(self) -> None:
        """Let TRL check and complete its arguments; its error about groups names a number that users do not set."""
        is_given = self.generation_batch_size is not None
        try:
            with warnings.catch_warnings():
                # TRL sets a field by default that Transformers renames.
                warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
                super().__post_init__()
        except ValueError as error:
            if is_given or not self.generation_batch_size or not self.generation_batch_size % self.num_generations:
                raise
            raise ValueError(self._describe_broken_groups()) from error

    def _describe_broken_groups(self) -> str:
        """What to do if `num_generations` does not divide the samples of a rollout."""
        size, group = self.per_device_train_batch_size, self.num_generations
        others = self.generation_batch_size // size
        unit = group // math.gcd(group, others)
        low = size // unit * unit
        return (
            f"per_device_train_batch_size={size}: a rollout has {self.generation_batch_size} samples ({size} x "
            f"steps_per_generation {self.steps_per_generation} x {self.world_size} processes), and num_generations={group} "
            f"must divide them: set per_device_train_batch_size to {f'{low} or ' if low else ''}{low + unit}"
        )

    def _differing_arguments(self) -> frozenset[str]:
        """Names of the arguments that have another value than their default. An empty text and an empty list are the same."""
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(self)}
        values = ((name, getattr(self, name), default) for name, default in defaults.items())
        empty = ("", [])
        return frozenset(
            name for name, value, default in values if value != default and not (value in empty and default in empty)
        )

    def _resolve_own_task(self) -> None:
        """Set the arguments that are settings of a task, and were not given, to those of the run's own task."""
        run_names = {f.name for f in fields(self)}
        self.task_settings = read_task_settings(self.task_settings, TASKS, TASK_SETTINGS, run_names)
        self._given = {name: value for name in TASK_SETTINGS if (value := getattr(self, name)) is not None}
        self._defaults = TASK_DEFAULTS
        self._set_task_settings(self, self.task)

    def _apply_preset(self) -> None:
        """Set the arguments that were left to the preset, and keep their values by name as `preset_values`."""
        samples = self.per_device_train_batch_size * self.steps_per_generation
        has_window = not self.trains_forward_process
        values = preset_settings(self.preset, self._num_free_steps, has_window, self.num_generations, samples)
        branches = values.pop("branches_per_thought")
        if not self.make_task(self.task).can_paint:
            # Samples that share their thought would be the same.
            branches = 1
        self._defaults = {**TASK_DEFAULTS, **values}
        self._set_task_settings(self, self.task)
        self.preset_values = {n: v for n, v in values.items() if n not in self._given and getattr(self, n) == v}
        if self.branches_per_thought is None:
            self.branches_per_thought = branches
            self.preset_values["branches_per_thought"] = branches

    def _num_free_steps(self) -> int:
        """Steps of the schedule outside the window, which is empty for objectives that train on noise of their own."""
        strength = self.refine_strength if self.starts_from_image else 1.0
        path = DenoisingConfig(
            num_timesteps=self.num_timesteps, timestep_shift=self.timestep_shift, refine_strength=strength
        ).path()
        window_size = 0 if self.trains_forward_process else self.sde_window_size
        return max(len(path.timesteps) - 1 - window_size, 0)

    def _set_task_settings(self, config: AlphaGRPOConfig, task: str) -> None:
        """Write the settings of a task into this configuration or a copy of it."""
        overrides = self.task_settings.get(task, {})
        declared = TASKS.get(task).settings
        values = resolve_settings(declared, self._given, self._defaults, overrides, is_main_task=task == self.task)
        for name in TASK_SETTINGS:
            value = values.get(name)
            setattr(config, name, list(value) if isinstance(value, tuple | list) else value)
        # Other tasks paint from noise, so their windows may lie anywhere.
        config.starts_from_image = TASKS.get(task).starts_from_image()

    def _resolve_objective(self) -> None:
        """Set the arguments whose default the image objective declares, and which were not given."""
        objective = OBJECTIVES.get(self.image_objective)
        if self.image_epsilon is None:
            self.image_epsilon = objective.default_epsilon
        if self.forward_time_interval is None:
            self.forward_time_interval = list(objective.default_time_interval)

    def for_task(self, name: str | None) -> AlphaGRPOConfig:
        """
        The configuration of another task's rows: its arguments that are settings of a task have the values of that task. Rows
        of the run's own task, and of none (`None`), have this configuration.
        """
        if name is None or name == self.task:
            return self
        result = copy.copy(self)
        self._set_task_settings(result, name)
        return result

    def with_painting_task(self, names: Iterable[str]) -> list[str]:
        """The names of tasks, and of the task that paints the images that one of them refines."""
        unique = list(dict.fromkeys(names))
        paints = any(TASKS.get(name).paints_initial_image for name in unique)
        return [*unique, PAINTING_TASK] if paints and PAINTING_TASK not in unique else unique

    def check_task(self, name: str) -> None:
        """
        Check the settings of a task as those of the run are checked.

        Raises:
            `ValueError`: If one of them is out of range, or its images cannot be painted. The message names the task.
        """
        settings = self.for_task(name)
        if settings is self:
            return
        try:
            settings.check_numbers()
            settings._check_bounds()
            settings._check_rollouts()
        except ValueError as error:
            raise ValueError(f"task '{name}': {error}") from error

    def check_numbers(self) -> None:
        """Raise `ValueError` at the first number that is not finite or out of its range; the message names the field."""
        check_ranges(self, INHERITED_RANGES)
        _check_optimizer_numbers(self.optim_args)

    def _check_choices(self) -> None:
        for name, choices in (
            ("stage1_selection", SELECTIONS),
            ("rectification", RECTIFICATIONS),
            ("context_gradient", CONTEXT_GRADIENTS),
            ("rollout_policy", ROLLOUT_POLICIES),
            ("preset", PRESETS),
            ("lora_targets", LORA_TARGETS),
            ("lora_init", LORA_INITS),
            *OPTION_CHOICES.items(),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, but is {getattr(self, name)!r}")
        following = (("rollout_policy", "policy"), ("ref_model_decay_ramp", None), ("image_base_beta", 0.0))
        for name, default in following:
            if getattr(self, name) != default and not self.sync_ref_model:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} needs a reference that follows: set sync_ref_model=True"
                )

    def _check_bounds(self) -> None:
        for name in ("sde_window_range", "cfg_interval", "eval_cfg_interval", "forward_time_interval"):
            bounds = getattr(self, name)
            if bounds is not None and len(bounds) != 2:
                raise ValueError(f"{name} takes two numbers, but is {bounds}")

    def _check_window_ends(self) -> None:
        """Check a range that was given; the default one ends where a shorter schedule does."""
        num_steps, (low, high) = self.num_timesteps - 1, self.sde_window_range
        if high > num_steps and not self.trains_forward_process:
            raise ValueError(
                f"sde_window_range={self.sde_window_range} ends after the last of the {num_steps} steps of "
                f"num_timesteps={self.num_timesteps}: set it to {[low, num_steps]}, or raise num_timesteps"
            )

    def _check_trains(self) -> None:
        """Check that the loss is not 0 for every sample, which would train nothing without an error."""
        if not (self.text_loss_weight or self.image_loss_weight):
            raise ValueError("text_loss_weight and image_loss_weight are both 0, so nothing would be trained")
        task = self.make_task(self.task)
        if not (self.image_loss_weight or task.writes):
            raise ValueError("image_loss_weight=0 and think=False leave neither images nor texts to train on")
        if not (self.text_loss_weight or task.can_paint):
            raise ValueError(f"text_loss_weight=0 leaves nothing to train: the task {self.task} paints no images")
        if self.allow_stop and not self.think:
            raise ValueError("allow_stop=True needs think=True: what ends a turn is the text that the policy writes")
        if self.reward_weights is not None and not any(self.reward_weights):
            raise ValueError(f"reward_weights={self.reward_weights} are all 0, so nothing would be trained")

    def _check_rollouts(self) -> None:
        """Check that every thought, every window that may be drawn, and the path of an evaluation can be sampled."""
        if self.think and not self.max_completion_length > 0:
            raise ValueError(
                f"max_completion_length, the longest thought, must be positive, but is {self.max_completion_length}"
            )
        try:
            self.train_rollout(0)
            if not self.trains_forward_process:
                window_range, num_steps = tuple(self.sde_window_range), self.num_timesteps - 1
                for start in window_starts(self.sde_window_size, window_range, num_steps):
                    self._train_rollout(window_start=start, window_size=self.sde_window_size)
        except ValueError as error:
            raise ValueError(
                f"{error} (sde_window_size={self.sde_window_size}, sde_window_range={self.sde_window_range}, "
                f"num_timesteps={self.num_timesteps}, forward_time_interval={self.forward_time_interval})"
            ) from error
        try:
            self.eval_rollout()
        except ValueError as error:
            raise ValueError(
                f"in evaluation: {error} (num_timesteps={self.num_timesteps}, eval_num_timesteps={self.eval_num_timesteps}, "
                f"eval_ode_solver={self.eval_ode_solver}, eval_ode_steps={self.eval_ode_steps})"
            ) from error

    def _check_branches(self) -> None:
        """Check that one process paints all images of a thought, in one rollout."""
        samples = self.per_device_train_batch_size * self.steps_per_generation
        for name, count in (
            ("num_generations", self.num_generations),
            ("per_device_train_batch_size x steps_per_generation, the samples of a process,", samples),
        ):
            if count % self.branches_per_thought:
                raise ValueError(f"branches_per_thought={self.branches_per_thought} must divide {name} {count}")

    def copy(self) -> AlphaGRPOConfig:
        """Copy the configuration. TRL and Transformers write to the fields of the one that they are given."""
        result = copy.copy(self)
        result.accelerator_config = copy.copy(self.accelerator_config)
        return result

    @property
    def has_reference(self) -> bool:
        """Whether a run needs a reference: for a KL, or to sample rollouts."""
        return bool(self.beta or self.image_beta or self.rollout_policy == "reference")

    def make_task(self, name: str) -> Task:
        """Make a registered task with the settings of this configuration."""
        return TASKS.get(name)(self.think, self.num_reflection_rounds, self.allow_stop)

    @property
    def guidance(self) -> GuidanceConfig:
        """Guidance of training rollouts."""
        return GuidanceConfig(
            text_scale=self.cfg_text_scale,
            image_scale=self.cfg_img_scale,
            interval=tuple(self.cfg_interval),
            renorm_type=self.cfg_renorm_type,
            renorm_min=self.cfg_renorm_min,
        )

    @property
    def objective(self) -> ObjectiveConfig:
        """Settings of the image objective."""
        return ObjectiveConfig(
            sde_type=self.sde_type,
            noise_level=self.noise_level,
            epsilon=self.image_epsilon,
            beta=self.image_beta,
            base_beta=self.image_base_beta,
            kl_type=self.image_kl_type,
            advantage_clip=self.image_advantage_clip,
            nft_beta=self.nft_beta,
            awm_power=self.awm_power,
            awm_time_power=self.awm_time_power,
        )

    @property
    def trains_forward_process(self) -> bool:
        """Whether the image objective trains on noised copies of painted images instead of transitions."""
        return OBJECTIVES.get(self.image_objective).trains_on == "forward_process"

    @property
    def objective_guidance(self) -> GuidanceConfig:
        """Guidance of the velocities that the image objective receives: that of rollouts, or none."""
        return replace(self.guidance, text_scale=1.0) if self.trains_forward_process else self.guidance

    def train_rollout(self, step: int) -> RolloutConfig:
        """
        Settings of the training rollout at an optimizer step, with its own stochastic window.

        Args:
            step (`int`): Optimizer steps done so far.
        """
        if self.trains_forward_process:
            interval = tuple(self.forward_time_interval)
            times = draw_times(self.sde_window_size, interval, self.timestep_shift, self.seed, step)
            return self._train_rollout(forward_times=tuple(times.tolist()))
        window_range = tuple(self.sde_window_range)
        window = draw_window(self.sde_window_size, window_range, self.num_timesteps - 1, self.seed, step)
        return self._train_rollout(window_start=window.start, window_size=len(window))

    def _train_rollout(self, **trained_steps: Any) -> RolloutConfig:
        """Settings of a training rollout, with those fields of [`DenoisingConfig`] that say which steps are trained."""
        denoising = DenoisingConfig(
            num_timesteps=self.num_timesteps,
            timestep_shift=self.timestep_shift,
            guidance=self.guidance,
            sde_type=self.sde_type,
            noise_level=self.noise_level,
            ode_solver=self.ode_solver,
            ode_steps=self.ode_steps,
            refine_strength=self.refine_strength if self.starts_from_image else 1.0,
            **trained_steps,
        )
        return RolloutConfig(
            height=self.image_height,
            width=self.image_width,
            max_new_tokens=self.max_completion_length,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            denoising=denoising,
            batch_size=self.rollout_batch_size,
            branches_per_thought=self.branches_per_thought,
        )

    def eval_rollout(self) -> RolloutConfig:
        """Settings of an evaluation: deterministic denoising, and each setting's `eval_` field where it has a value."""
        evaluation = {name: getattr(self, f"eval_{name}", None) for name in SETTING_NAMES}
        values = {name: getattr(self, name) if value is None else value for name, value in evaluation.items()}
        # An evaluation has a solver of its own, whose number of steps may be left open, and samples from all tokens.
        settings = TaskSettings(**values | {"ode_steps": self.eval_ode_steps, "top_k": None})
        rollout = RolloutConfig.from_settings(settings, batch_size=self.rollout_batch_size)
        # Without a bound in the settings, there is none; `from_settings` would take its default.
        return replace(rollout, max_new_tokens=self.max_completion_length)


def _check_optimizer_numbers(optim_args: str | None) -> None:
    """
    Check `optim_args` as Transformers reads it: pairs of a name and a number or a word, with commas between them.

    Raises:
        `ValueError`: If a part is no such pair, or a number is not finite.
    """
    for part in optim_args.replace(" ", "").split(",") if optim_args else ():
        name, equals, value = part.partition("=")
        if not equals or "=" in value:
            raise ValueError(f"optim_args must be pairs such as 'name=value,name=value', but has {part!r}")
        try:
            number = float(value)
        except ValueError:
            continue
        check_number(f"{name} in optim_args", number)
