# SPDX-License-Identifier: Apache-2.0

"""
Make a tiny model of a family from a seed: train its autoencoder, and then the model on rendered scenes. BAGEL's is the packaged
checkpoint `bagel-shapes`.

```bash
accelerate launch --multi_gpu --num_processes 2 recipes/pretrain_shapes.py --output_dir runs/bagel-shapes
```

One thread per process is fastest on a CPU, where `accelerate launch` starts several processes only with `--multi_gpu`. The model
first learns to paint. Then its vision tower alone learns from images, and at last all weights but the autoencoder's learn to answer
questions, to write captions, to edit images, and to repair or keep them. The same command continues a run that was stopped. The finished model lies in the output folder
itself, the newest averaged weights during the run in its folder `checkpoint`.

Cosmos3 is trained by the same code. Its checkpoint is not packaged, because it would add 8 MB. This makes it and trains it:

```bash
accelerate launch --multi_gpu --num_processes 2 recipes/pretrain_shapes.py --family cosmos3
accelerate launch recipes/reasoning_t2i.py --model_name_or_path runs/cosmos3-shapes
```
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from recipe_tools.input_errors import checking_input, input_errors_in_a_line
from recipe_tools.recipe_arguments import RecipeParser
from recipe_tools.shapes_pretraining.arguments import PretrainingArguments


if TYPE_CHECKING:
    from accelerate import Accelerator


def pretrain(args: PretrainingArguments, accelerator: Accelerator) -> None:
    """Go through all stages that are not finished, and save the model."""
    from accelerate.utils import set_seed

    from alphagrpo_ext.models.attention.choice import choose_attention
    from alphagrpo_ext.models.loading import load_model
    from recipe_tools.shapes_pretraining.examples import GROUNDING
    from recipe_tools.shapes_pretraining.families import SHAPES_FAMILIES
    from recipe_tools.shapes_pretraining.training import (
        PretrainingStage,
        export,
        own_paintings,
        train_painter,
        train_stage,
    )

    set_seed(args.seed)
    family = SHAPES_FAMILIES.get(args.family)()
    processor = family.build_processor()
    if args.init_from is None:
        model = train_painter(family, processor, accelerator, args)
    else:
        model, _ = load_model(args.init_from)
        model.set_attn_implementation(choose_attention(model.family, accelerator.device.type).name)
    for index in range(args.grounding_rounds):
        name = f"grounding_{index}"
        paintings = own_paintings(name, model, processor, accelerator, args)
        stage = PretrainingStage(name, GROUNDING, args.grounding_steps, args.grounding_learning_rate, paintings)
        model = train_stage(model, processor, stage, accelerator, args)
    if accelerator.is_main_process:
        export(Path(args.output_dir), model, processor, args)
    accelerator.wait_for_everyone()


def main(args: PretrainingArguments) -> None:
    # Here, so that `--help` does not import models.
    import torch
    from accelerate import Accelerator

    from alphagrpo_ext.trainer.resume.sole_writer import sole_writer

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if args.bf16 else "no")
    with sole_writer(args.output_dir):
        pretrain(args, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    with input_errors_in_a_line():
        with checking_input():
            (arguments,) = RecipeParser([PretrainingArguments], __doc__).parse_args_and_config()
        main(arguments)
