# SPDX-License-Identifier: Apache-2.0

"""
Estimate the memory of an update, also for a model that this machine could not hold. No weights are loaded.

Without settings it prints a table for BAGEL-7B or the named model, with LoRA and with all weights trained, for K = 10 and K = 5 trained
steps. That takes about a minute:

```bash
python recipes/estimate_memory.py
python recipes/estimate_memory.py --model_name_or_path Cosmos3-Edge
```

For one setting (`--help` lists all options):

```bash
python recipes/estimate_memory.py --lora_rank 64 --batch_size 4 --image_steps_per_forward 2 --num_shards 8
```

The sizes of BAGEL-7B-MoT, Cosmos3-Edge and Cosmos3-Nano are known by these names. Of other models only the configuration is read.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from alphagrpo_ext.ranges import PositiveInt
from recipe_tools.memory_settings import MemorySettings
from recipe_tools.recipe_arguments import RecipeParser


if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from recipe_tools.memory import MemoryEstimate


@dataclass(frozen=True)
class EstimationArguments(MemorySettings):
    """Arguments of the estimate. The defaults are the paper's settings, with one trajectory per micro-batch."""

    batch_size: PositiveInt = field(default=1, metadata=MemorySettings.__dataclass_fields__["batch_size"].metadata)
    model_name_or_path: str = field(
        default="BAGEL-7B-MoT",
        metadata={
            "help": "BAGEL-7B-MoT, Cosmos3-Edge or Cosmos3-Nano, whose sizes are known, also with an owner before a slash; or a "
            "model whose configuration is read: bagel-shapes, a folder, as released or saved, or an id on the Hub."
        },
    )
    height: PositiveInt | None = field(
        default=None,
        metadata={"help": "Height of images, in pixels. Default: 640 for Cosmos3, and 512, the paper's, for BAGEL."},
    )
    width: PositiveInt | None = field(
        default=None, metadata={"help": "Width of images, in pixels. The default is as for the height."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "'flex_attention' (BAGEL alone), 'sdpa' (which stores masks of pairs of tokens), or 'eager' (which also stores "
            "their scores). Default: the first of them that the model has."
        },
    )

    def settings_for(self, config: PreTrainedConfig) -> MemorySettings:
        """Settings for a model, with defaults that depend on it."""
        from alphagrpo_ext.models.attention.choice import attention_implementations
        from alphagrpo_ext.models.contract import FAMILIES

        family = FAMILIES.get(config.model_type)()
        # The paper trains BAGEL at half the size that it is demonstrated at.
        released = {} if config.model_type == "bagel" else family.sampling_settings
        sampling = getattr(config, "sampling", None) or released
        values = {f.name: getattr(self, f.name) for f in fields(MemorySettings)}
        return MemorySettings(
            **{
                **values,
                "height": self.height or sampling.get("image_height", MemorySettings.height),
                "width": self.width or sampling.get("image_width", MemorySettings.width),
                "attn_implementation": self.attn_implementation or attention_implementations(family)[0],
            }
        )


def load_config(model_name_or_path: str) -> PreTrainedConfig:
    """Load the configuration of a model, or make that of a released model whose sizes a family knows by its name."""
    from alphagrpo_ext.models.loading import find_family, resolve_model_path
    from recipe_tools.memory import released_config

    if not Path(model_name_or_path).is_dir():
        config = released_config(model_name_or_path.rpartition("/")[2])
        if config is not None:
            return config
    path = resolve_model_path(model_name_or_path)
    return find_family(path).load_config(path)


def format_table(rows: list[tuple[str, MemoryEstimate]]) -> str:
    """Format estimates in GiB as a Markdown table."""
    names = [part.name for part in fields(rows[0][1])]
    lines = [f"| | {' | '.join(names)} | total |", "|---" * (len(names) + 2) + "|"]
    for label, estimate in rows:
        values = [getattr(estimate, name) for name in names] + [estimate.total]
        lines.append(f"| {label} | {' | '.join(f'{value / 2**30:.3g}' for value in values)} |")
    return "\n".join(lines)


def overview(settings: MemorySettings) -> list[tuple[str, MemorySettings]]:
    """Settings with labels: LoRA on one device and all weights on eight, for 10, 5 and 1 trained steps per forward."""
    rows = []
    for rank, shards in ((settings.lora_rank or 32, 1), (0, 8)):
        for window, part in ((10, "all"), (5, "all"), (10, 1)):
            changed = replace(
                settings,
                lora_rank=rank,
                num_shards=shards,
                with_reference=False,
                sde_window_size=window,
                image_steps_per_forward=part,
            )
            name = f"LoRA r = {rank}" if rank else "all weights"
            split = "" if part == "all" else f", {part} per forward"
            rows.append((f"{name}, {shards} {'shards' if shards > 1 else 'device'}, K = {window}{split}", changed))
    return rows


def main(args: EstimationArguments, show_overview: bool) -> None:
    # Here, so that `--help` does not import models.
    import torch
    from tqdm import tqdm

    from recipe_tools.memory import estimate_memory

    config = load_config(args.model_name_or_path)
    torch.set_num_threads(1)
    settings = args.settings_for(config)
    named = overview(settings) if show_overview else [("an update", settings)]
    rows = [(label, estimate_memory(config, row)) for label, row in tqdm(named, desc="estimates", unit="row")]
    print(format_table(rows))
    print(
        f"\nGiB per process for images of {settings.height} x {settings.width} pixels and {settings.attn_implementation}; leave a "
        f"tenth of a device free."
    )


def names_model_alone(arguments: list[str]) -> bool:
    """Whether a command line has no argument but the model."""
    return {a.partition("=")[0] for a in arguments if a.startswith("--")} <= {"--model_name_or_path"}


if __name__ == "__main__":
    (arguments,) = RecipeParser([EstimationArguments], __doc__).parse_args_and_config()
    main(arguments, show_overview=names_model_alone(sys.argv[1:]))
