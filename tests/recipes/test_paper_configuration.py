# SPDX-License-Identifier: Apache-2.0

"""The configurations for BAGEL have the values of the paper's released configuration, which are written down here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import SchedulerType
from trl import ModelConfig, TrlParser

from alphagrpo_ext.trainer import AlphaGRPOConfig, AlphaGRPOTrainer
from reward_models.arguments import PromptArguments
from reward_models.format import FORMATS


CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
PROCESSES = 8
RELEASED: dict[str, Any] = {
    **{"image_height": 512, "image_width": 512, "timestep_shift": 3.0, "noise_level": 0.7, "sde_type": "flow_sde"},
    **{"cfg_text_scale": 4.0, "cfg_renorm_min": 0.0, "refine_strength": 1.0},
    **{"ode_solver": "euler", "ode_steps": None, "branches_per_thought": 1, "eval_num_timesteps": 40},
    **{
        "max_completion_length": 1024,
        "temperature": 1.0,
        "top_p": 0.8,
        "top_k": 0,
        "eval_temperature": 0.3,
        "eval_top_p": 1.0,
    },
    **{"num_generations": 14, "scale_rewards": "batch", "num_iterations": 1},
    **{"image_objective": "flow_grpo", "image_epsilon": 1e-5, "epsilon": 0.2, "epsilon_high": 0.28},
    **{"importance_sampling_level": "sequence", "image_advantage_clip": 5.0, "image_beta": 0.0, "beta": 0.0},
    **{"context_gradient": "detached", "mask_broken_format": False, "lora_targets": "both", "lora_init": "gaussian"},
    **{"learning_rate": 5e-5, "lr_scheduler_type": SchedulerType.CONSTANT, "warmup_steps": 0, "weight_decay": 1e-4},
    **{"max_grad_norm": 1.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "num_train_epochs": 10},
}
TASKS: dict[str, dict[str, Any]] = {
    "reasoning_t2i": {
        **{"num_timesteps": 16, "sde_window_size": 10, "sde_window_range": [0, 11], "think": True},
        **{"cfg_img_scale": 1.0, "cfg_interval": [0.4, 1.0], "cfg_renorm_type": "global"},
        **{"text_loss_weight": 1.0, "separate_advantages": False},
    },
    "self_reflection": {
        **{"num_timesteps": 40, "sde_window_size": 5, "sde_window_range": [0, 15], "think": True},
        **{"cfg_img_scale": 2.0, "cfg_interval": [0.0, 1.0], "cfg_renorm_type": "text_channel"},
        **{"text_loss_weight": 1 / 5, "num_initial_images": 7, "stage1_think": False, "stage1_selection": "lowest"},
        **{"rectification": "initial", "num_reflection_rounds": 1, "allow_stop": False},
    },
}


def darkness(images: list[Image.Image], **kwargs: Any) -> list[float]:
    """A reward of large spread, so that what is added to a deviation does not count."""
    return [100 * (1 - sum(image.convert("L").histogram()[:128]) / (image.width * image.height)) for image in images]


def parse(task: str, folder: Path) -> tuple[PromptArguments, AlphaGRPOConfig, ModelConfig]:
    parser = TrlParser((PromptArguments, AlphaGRPOConfig, ModelConfig))
    config = CONFIGS / f"{task}_bagel.yaml"
    return parser.parse_args_and_config(["--config", str(config), "--output_dir", str(folder)])


@pytest.mark.parametrize("task", TASKS)
def test_settings_are_those_of_the_released_configuration(tmp_path: Path, task: str) -> None:
    prompts, args, model = parse(task, tmp_path)
    expected = RELEASED | TASKS[task] | {"task": task}
    assert {name: getattr(args, name) for name in expected} == expected
    assert (model.use_peft, model.lora_r, model.lora_alpha, model.lora_dropout) == (True, 32, 64, 0.0)
    assert (prompts.reward, prompts.aggregation, args.reward_weights) == (["dvreward"], "geometric", None)
    # The released code computes the reward of the form in self-reflection, too, and adds it to nothing.
    assert prompts.formats == (["think"] if task == "reasoning_t2i" else [])
    # A group is on one process, a rollout has 112 samples, and a step 32 prompts.
    assert args.per_device_train_batch_size == args.num_generations
    assert args.generation_batch_size * PROCESSES == 112
    assert args.gradient_accumulation_steps * PROCESSES == 32


def test_initial_images_are_painted_with_the_guidance_of_text_to_image(tmp_path: Path) -> None:
    _, args, _ = parse("self_reflection", tmp_path)
    painting = args.for_task("reasoning_t2i")
    found = (painting.cfg_img_scale, painting.cfg_interval, painting.cfg_renorm_type, painting.num_timesteps)
    assert found == (1.0, [0.4, 1.0], "global", 40)


@pytest.mark.parametrize("task", TASKS)
def test_a_step_draws_several_rollouts_each_with_its_own_deviation(
    make_trainer: Callable[..., AlphaGRPOTrainer], tmp_path: Path, task: str
) -> None:
    """The settings that concern credit, at a size that takes seconds: the form counts for images as it does for texts."""
    prompts, args, _ = parse(task, tmp_path)
    names = ("separate_advantages", "rectification", "context_gradient", "scale_rewards", "steps_per_generation")
    trainer = make_trainer(
        **{name: getattr(args, name) for name in names},
        **{"task": task, "num_initial_images": 2, "gradient_accumulation_steps": 2},
        reward_funcs=[darkness, *(FORMATS.get(name)() for name in prompts.formats)],
    )
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "image/ratio_mean" in entry]
    assert log["image/ratio_mean"] == 1.0 and log["grad_norm"] > 0
    first, second = trainer.recorder.updates
    assert {id(t) for t in first.trajectories}.isdisjoint(id(t) for t in second.trajectories)
    for update in (first, second):
        advantages = update.inputs["image_advantages"]
        torch.testing.assert_close(advantages, update.inputs["advantages"])
        if task == "reasoning_t2i":
            assert advantages.std().item() == pytest.approx(1, abs=0.02)
