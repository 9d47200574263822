# SPDX-License-Identifier: Apache-2.0

"""
Estimate the memory of an update, also for a model that this machine could not hold. No weights are loaded.

Without arguments it prints a table for BAGEL-7B, with LoRA and with all weights trained, for K = 10 and K = 5 trained steps. That takes
about a minute:

```bash
python recipes/estimate_memory.py
```

For one setting (`--help` lists all options):

```bash
python recipes/estimate_memory.py --lora_rank 64 --batch_size 4 --image_steps_per_forward 2 --num_shards 8
```

`--model_name_or_path` takes `bagel-shapes`, or a folder or id on the Hub in the layout of `save_pretrained`. Only the configuration
is read.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

from alphagrpo_ext.ranges import PositiveInt
from recipe_tools.memory_settings import MemorySettings
from recipe_tools.recipe_arguments import RecipeParser


if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from recipe_tools.memory import MemoryEstimate


@dataclass(frozen=True)
class EstimationArguments(MemorySettings):
    """Arguments of the estimate. The defaults are those of BAGEL-7B under the paper's settings, with one trajectory per micro-batch."""

    batch_size: PositiveInt = field(default=1, metadata=MemorySettings.__dataclass_fields__["batch_size"].metadata)
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model whose configuration is read. Default: the sizes of BAGEL-7B-MoT."}
    )


def load_config(model_name_or_path: str | None) -> PreTrainedConfig:
    """Load the configuration of a model, or make one with the sizes of BAGEL-7B-MoT."""
    from transformers import AutoConfig

    from alphagrpo_ext.models.bagel import BagelConfig
    from alphagrpo_ext.models.loading import resolve_model_path

    if model_name_or_path is None:
        return BagelConfig()
    return AutoConfig.from_pretrained(resolve_model_path(model_name_or_path))


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
        for window, part in ((10, None), (5, None), (10, 1)):
            changed = replace(
                settings,
                lora_rank=rank,
                num_shards=shards,
                with_reference=False,
                sde_window_size=window,
                image_steps_per_forward=part,
            )
            name = f"LoRA r = {rank}" if rank else "all weights"
            split = f", {part} per forward" if part else ""
            rows.append((f"{name}, {shards} {'shards' if shards > 1 else 'device'}, K = {window}{split}", changed))
    return rows


def main(args: EstimationArguments, show_overview: bool) -> None:
    # Here, so that `--help` does not import models.
    import torch
    from tqdm import tqdm

    from recipe_tools.memory import estimate_memory

    config = load_config(args.model_name_or_path)
    torch.set_num_threads(1)
    settings = overview(args) if show_overview else [("an update", args)]
    rows = [(label, estimate_memory(config, row)) for label, row in tqdm(settings, desc="estimates", unit="row")]
    print(format_table(rows) + "\n\nGiB per process; leave a tenth of a device free.")


if __name__ == "__main__":
    (arguments,) = RecipeParser([EstimationArguments], __doc__).parse_args_and_config()
    main(arguments, show_overview=len(sys.argv) == 1)
