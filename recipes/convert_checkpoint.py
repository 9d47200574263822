# SPDX-License-Identifier: Apache-2.0

"""
Convert a checkpoint between its family's released layout and the one that `save_pretrained` writes.

From the released layout, in a folder or on the Hub, to a folder for `from_pretrained`:

```bash
python recipes/convert_checkpoint.py --model_name_or_path BAGEL-7B-MoT --layout pretrained --output_dir runs/bagel
```

And back, for code that reads the released layout. An adapter is merged into its model:

```bash
python recipes/convert_checkpoint.py --model_name_or_path runs/bagel --layout released --output_dir runs/released
```

Weights keep their values and types unless `--dtype` is given. The autoencoder is always fp32. In BAGEL's released layout, position
tables are fp32 as well, which changes no value. The output is written beside `--output_dir` and renamed when it is complete, so a
conversion that fails or is stopped leaves no folder that loads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from recipe_tools.input_errors import checking_input, input_errors_in_a_line
from recipe_tools.recipe_arguments import RecipeParser


LAYOUTS = ("pretrained", "released")
WEIGHT_DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass
class ConversionArguments:
    """Arguments of the conversion."""

    model_name_or_path: str = field(metadata={"help": "The checkpoint: a folder, or an id on the Hub."})
    layout: str = field(
        metadata={"help": "Layout of the output: 'pretrained' (for from_pretrained) or 'released' (the family's)."}
    )
    output_dir: str = field(metadata={"help": "Output folder, which is empty or does not exist."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Data type of the weights: 'auto' keeps it, else 'bfloat16', 'float16' or 'float32'."},
    )
    max_shard_size: str = field(
        default="5GB", metadata={"help": "Size of the largest weight file in the layout 'pretrained'."}
    )

    def __post_init__(self) -> None:
        for name, allowed in (("layout", LAYOUTS), ("dtype", WEIGHT_DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, but is {getattr(self, name)!r}")


def main(args: ConversionArguments) -> None:
    # Here, so that `--help` does not import models.
    from peft import PeftModel

    from alphagrpo_ext.models.loading import load_model
    from alphagrpo_ext.models.saving import check_output_folder, save_model

    with checking_input():
        # First, because loading takes minutes.
        check_output_folder(args.output_dir)
        model, processor = load_model(args.model_name_or_path, dtype=args.dtype, revision=args.revision)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    if args.layout == "released":
        model.family.save_released(model, processor, args.output_dir)
    else:
        save_model(model, processor, args.output_dir, max_shard_size=args.max_shard_size)
    print(f"{args.model_name_or_path} in the layout '{args.layout}': {args.output_dir}")


if __name__ == "__main__":
    with input_errors_in_a_line():
        with checking_input():
            (arguments,) = RecipeParser([ConversionArguments], __doc__).parse_args_and_config()
        main(arguments)
