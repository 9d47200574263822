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

"""Trains one step, alone or as one of several processes, and saves what came out."""

import sys
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.shapes import build_dataset
from alphagrpo_ext.trainer import AlphaGRPOConfig, AlphaGRPOTrainer


def main(model_path: str, output_path: str, batch_size: int, task: str) -> None:
    """
    Args:
        model_path (`str`): Checkpoint to start from.
        output_path (`str`): Where to save weights, rewards and the windows' starts of all ranks.
        batch_size (`int`): Trajectories a process.
        task (`str`): What the policy does.
    """
    rollouts = []

    def brightness(images: list, trajectory: list, **kwargs: Any) -> list[float]:
        rewards = [float(np.asarray(image).mean()) / 255 for image in images]
        if trajectory[0] is None:
            # An image that is to be refined: no action.
            return rewards
        starts = [t.sampled_images[0].window.start for t in trajectory]
        texts = [t.sampled_texts[0].token_ids for t in trajectory]
        rollouts.extend(zip(rewards, starts, texts, strict=True))
        return rewards

    model, processor = load_model(model_path)
    trainer = AlphaGRPOTrainer(
        model=model,
        reward_funcs=brightness,
        args=AlphaGRPOConfig(
            output_dir=f"{output_path}-run",
            task=task,
            image_height=24,
            image_width=24,
            num_timesteps=6,
            timestep_shift=1.0,
            sde_window_size=2,
            sde_window_range=[0, 5],
            max_completion_length=10,
            per_device_train_batch_size=batch_size,
            num_generations=4,
            max_steps=1,
            # The step of plain gradient descent is the gradient; Adam's first one is only its sign, which turns rounding
            # of gradients near 0 into whole steps.
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            weight_decay=0.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=build_dataset("train", 8, seed=0),
        processing_class=processor,
    )
    trainer.train()
    rollouts = gather_object(rollouts)
    if trainer.accelerator.is_main_process:
        weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
        torch.save(
            {"weights": weights, "rollouts": rollouts, "num_processes": trainer.accelerator.num_processes}, output_path
        )
    # Threads of Gloo that outlive the interpreter may abort the process.
    trainer.accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
