# SPDX-License-Identifier: Apache-2.0

"""
Make a tiny model of a family from a seed: train its autoencoder, and then the model on rendered scenes. BAGEL's is the packaged
checkpoint `bagel-shapes`.

```bash
accelerate launch --multi_gpu --num_processes 2 recipes/pretrain_shapes.py --output_dir runs/bagel-shapes
```

One thread per process is fastest on a CPU, where `accelerate launch` starts several processes only with `--multi_gpu`. The model
first learns to paint. Then its vision tower alone learns from images, and at last all weights but the autoencoder's learn to answer
questions and to repair images. The same command continues a run that was stopped. The finished model lies in the output folder
itself, the newest averaged weights during the run in its folder `checkpoint`.

Cosmos3 is trained by the same code:

```bash
accelerate launch --multi_gpu --num_processes 2 recipes/pretrain_shapes.py --family cosmos3
accelerate launch recipes/reasoning_t2i.py --model_name_or_path runs/cosmos3-shapes
```
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from alphagrpo_ext.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, UnitFloat, check_ranges
from recipe_tools.recipe_arguments import RecipeParser


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
    grounding_steps: PositiveInt = field(
        default=600, metadata={"help": "Last steps, in which the model learns to answer and to repair."}
    )
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


def main(args: PretrainingArguments) -> None:
    # Here, so that `--help` does not import models.
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from alphagrpo_ext.models.loading import load_model
    from recipe_tools.shapes_pretraining.examples import GROUNDING
    from recipe_tools.shapes_pretraining.families import SHAPES_FAMILIES
    from recipe_tools.shapes_pretraining.training import PretrainingStage, export, train_painter, train_stage

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if args.bf16 else "no")
    set_seed(args.seed)
    family = SHAPES_FAMILIES.get(args.family)()
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    processor = family.build_processor()
    if args.init_from is None:
        model = train_painter(family, processor, accelerator, args)
    else:
        model, _ = load_model(args.init_from, attn_implementation="eager")
    grounding = PretrainingStage("grounding", GROUNDING, args.grounding_steps, args.grounding_learning_rate)
    model = train_stage(model, processor, grounding, accelerator, args)
    if accelerator.is_main_process:
        export(Path(args.output_dir), model, processor, args)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    (arguments,) = RecipeParser([PretrainingArguments], __doc__).parse_args_and_config()
    main(arguments)
