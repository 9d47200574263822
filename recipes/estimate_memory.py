# SPDX-License-Identifier: Apache-2.0

"""
Estimate the memory of an update, for a model and settings that may be larger than this machine.

Without arguments it prints the table of BAGEL-7B with LoRA and with all weights trained, for K = 10 and K = 5 trained
steps. It loads no weights:

```bash
python recipes/estimate_memory.py
```

For one setting; every option stands in `--help`:

```bash
python recipes/estimate_memory.py --lora_rank 64 --batch_size 4 --image_steps_per_forward 2 --num_shards 8
```

`--model_name_or_path` takes a folder or Hub id that `save_pretrained` wrote, or `bagel-shapes`; its configuration is all
that is read.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields, replace

import torch
from transformers import AutoConfig, PreTrainedConfig
from trl import TrlParser

from alphagrpo_ext.models.bagel import BagelConfig
from alphagrpo_ext.models.loading import resolve_model_path
from recipe_tools.memory import MemoryEstimate, MemorySettings, estimate_memory


@dataclass
class EstimationArguments:
    """Arguments of the estimate. The defaults are those of BAGEL-7B under the paper's settings, one trajectory at once."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Whose configuration to read; the sizes of BAGEL-7B-MoT by default."}
    )
    lora_rank: int = field(default=32, metadata={"help": "Rank of the adapter; 0 trains all weights."})
    lora_targets: str = field(default="both", metadata={"help": "'both', 'generation' or 'understanding'."})
    batch_size: int = field(default=1, metadata={"help": "Trajectories a process trains on at once."})
    prompt_tokens: int = field(default=128, metadata={"help": "Length of given text, in tokens."})
    thought_tokens: int = field(default=512, metadata={"help": "Length of sampled text, in tokens."})
    context_images: int = field(default=0, metadata={"help": "Images that the policy is given."})
    height: int = field(default=512, metadata={"help": "Height of images, in pixels."})
    width: int = field(default=512, metadata={"help": "Width of images, in pixels."})
    sde_window_size: int = field(default=10, metadata={"help": "Trained steps K of an image."})
    image_steps_per_forward: int | None = field(
        default=None, metadata={"help": "Most trained steps in one forward; all by default."}
    )
    num_branches: int = field(default=2, metadata={"help": "Guidance branches, 1 to 3."})
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Whether the backward computes each layer anew."}
    )
    attn_implementation: str = field(
        default="flex_attention", metadata={"help": "'flex_attention', 'sdpa' or 'eager'."}
    )
    dtype: str = field(default="bfloat16", metadata={"help": "Of the weights."})
    autocast: bool = field(default=True, metadata={"help": "Whether operations run in bf16, as under --bf16."})
    with_reference: bool = field(default=False, metadata={"help": "Whether a copy of all weights stays for a KL."})
    num_shards: int = field(
        default=1, metadata={"help": "Processes that weights, gradients and optimizer states are spread over."}
    )

    @property
    def settings(self) -> MemorySettings:
        values = {part.name: getattr(self, part.name) for part in fields(MemorySettings)}
        return MemorySettings(**{**values, "lora_rank": self.lora_rank or None})


def load_config(model_name_or_path: str | None) -> PreTrainedConfig:
    """Configuration of a model, or the sizes of BAGEL-7B-MoT."""
    if model_name_or_path is None:
        return BagelConfig()
    return AutoConfig.from_pretrained(resolve_model_path(model_name_or_path))


def table(rows: list[tuple[str, MemoryEstimate]]) -> str:
    """Estimates in GiB, as Markdown."""
    names = [part.name for part in fields(MemoryEstimate)]
    lines = [f"| | {' | '.join(names)} | total |", "|---" * (len(names) + 2) + "|"]
    for label, estimate in rows:
        values = [getattr(estimate, name) for name in names] + [estimate.total]
        lines.append(f"| {label} | {' | '.join(f'{value / 2**30:.3g}' for value in values)} |")
    return "\n".join(lines)


def overview(config: PreTrainedConfig, settings: MemorySettings) -> list[tuple[str, MemoryEstimate]]:
    """LoRA on one device and all weights on eight, for 10, 5 and 1 trained steps at once."""
    rows = []
    for rank, shards in ((settings.lora_rank or 32, 1), (None, 8)):
        for window, part in ((10, None), (5, None), (10, 1)):
            changed = replace(
                settings,
                lora_rank=rank,
                num_shards=shards,
                with_reference=False,
                sde_window_size=window,
                image_steps_per_forward=part,
            )
            name = "all weights" if rank is None else f"LoRA r = {rank}"
            split = f", {part} a forward" if part else ""
            label = f"{name}, {shards} {'shards' if shards > 1 else 'device'}, K = {window}{split}"
            rows.append((label, estimate_memory(config, changed)))
    return rows


def main(args: EstimationArguments, show_overview: bool) -> None:
    config = load_config(args.model_name_or_path)
    torch.set_num_threads(1)
    if show_overview:
        rows = overview(config, args.settings)
    else:
        rows = [("an update", estimate_memory(config, args.settings))]
    print(table(rows) + "\n\nGiB a process; leave a tenth of a device free.")


if __name__ == "__main__":
    (arguments,) = TrlParser((EstimationArguments,)).parse_args_and_config()
    main(arguments, show_overview=len(sys.argv) == 1)
