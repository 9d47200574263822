# SPDX-License-Identifier: Apache-2.0

"""Arguments of `pretrain_shapes.py`. They are read without models, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alphagrpo_ext.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, UnitFloat, check_ranges


@dataclass
class PretrainingArguments:
    """Arguments of the pretraining on shapes."""

    family: str = field(default="bagel", metadata={"help": "Model family: bagel or cosmos3."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for checkpoint and state; by default runs/FAMILY-shapes."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights, scenes, times and noise."})
    vae_steps: NonNegativeInt = field(default=1200, metadata={"help": "Optimizer steps of the autoencoder."})
    decoder_steps: NonNegativeInt = field(default=2000, metadata={"help": "Further steps of the decoder alone."})
    decoder_noise: NonNegativeFloat = field(
        default=0.3, metadata={"help": "Largest noise on the decoder's latents, in units of their std."}
    )
    vae_batch_size: PositiveInt = field(default=64, metadata={"help": "Scenes per batch of the autoencoder."})
    vae_learning_rate: NonNegativeFloat = field(
        default=2e-3, metadata={"help": "Peak learning rate of the autoencoder."}
    )
    steps: PositiveInt = field(default=650, metadata={"help": "Optimizer steps in which the model learns to paint."})
    learning_rate: NonNegativeFloat = field(default=1.5e-3, metadata={"help": "Peak learning rate of the model."})
    warmup_steps: NonNegativeInt = field(
        default=50, metadata={"help": "Steps at the start of a stage in which the learning rate rises."}
    )
    decay_fraction: UnitFloat = field(
        default=0.35, metadata={"help": "Share of a stage, at its end, in which the learning rate falls to 0."}
    )
    text_weight: NonNegativeFloat = field(
        default=0.5, metadata={"help": "Weight of the text loss relative to the image loss."}
    )
    ema_decay: Annotated[float, "[0, 1)"] = field(
        default=0.996, metadata={"help": "Decay of the averaged weights that are saved."}
    )
    vision_steps: NonNegativeInt = field(default=800, metadata={"help": "Further steps of the vision tower alone."})
    vision_answers: Annotated[int, "[4, inf)"] = field(
        default=32, metadata={"help": "Questions per batch of these steps. There are a quarter as many reflections."}
    )
    vision_learning_rate: NonNegativeFloat = field(
        default=2e-3, metadata={"help": "Peak learning rate of these steps."}
    )
    grounding_rounds: PositiveInt = field(
        default=2,
        metadata={
            "help": "Last stages, in which the model learns to answer, to edit and to repair. It paints anew for each of them."
        },
    )
    num_paintings: PositiveInt = field(
        default=1500,
        metadata={"help": "Images per process that it paints for each of these stages, to judge and to repair."},
    )
    grounding_steps: PositiveInt = field(default=550, metadata={"help": "Optimizer steps of each of these stages."})
    grounding_learning_rate: NonNegativeFloat = field(
        default=7e-4, metadata={"help": "Peak learning rate of these steps."}
    )
    init_from: str | None = field(
        default=None, metadata={"help": "Checkpoint for which only the last steps are run, e.g. bagel-shapes."}
    )
    save_steps: PositiveInt = field(default=100, metadata={"help": "Steps between two saved states."})
    bf16: bool = field(default=True, metadata={"help": "Whether to train under bfloat16 autocast."})

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.output_dir is None:
            self.output_dir = f"runs/{self.family}-shapes"
