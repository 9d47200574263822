# SPDX-License-Identifier: Apache-2.0

"""
Paint prompts with a trained policy, and let it reflect on its images and refine them.

Without arguments it paints eight held-out prompts of the shapes world with the packaged `bagel-shapes` and refines each
up to twice, judged by the pixel judge:

```bash
python recipes/generate.py
```

With prompts of your own and no judge; every option stands in `--help`:

```bash
python recipes/generate.py --model_name_or_path runs/self_reflection_shapes --judge none \\
    --prompts "a red circle on a white background" "two blue squares , on gray"
```

The output folder gets an image a step, `samples.jsonl` and `contact_sheet.png`.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from trl import TrlParser

from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.rollout import Refinement, refine
from alphagrpo_ext.rollout.arguments import SamplingArguments
from recipe_tools.contact_sheet import contact_sheet
from reward_models.arguments import RewardArguments
from reward_models.prompts.loading import load_prompts
from reward_models.prompts.questions import from_row


@dataclass
class GenerationArguments(RewardArguments, SamplingArguments):
    """What is painted and refined; for the rest see [`RewardArguments`] and [`SamplingArguments`]."""

    model_name_or_path: str = field(default="bagel-shapes", metadata={"help": "The policy: a name or a folder."})
    prompts: list[str] = field(default_factory=list, metadata={"help": "What to paint."})
    prompt_file: str | None = field(
        default=None, metadata={"help": "Prompts with questions, as JSON lines, in place of --prompts."}
    )
    num_prompts: int = field(default=8, metadata={"help": "Prompts of the shapes world, where none are given."})
    num_rounds: int = field(default=2, metadata={"help": "Most rounds of reflection; 0 only paints."})
    think: bool = field(default=True, metadata={"help": "Whether the first image follows a thought."})
    judge: str = field(
        default="shapes", metadata={"help": "Who scores images of prompts with questions; 'none' for nobody."}
    )
    stop_reward: float | None = field(default=None, metadata={"help": "Reward at which an image is left as it is."})
    keep_best: bool = field(default=False, metadata={"help": "Whether a round refines the best image so far."})
    height: int = field(default=24, metadata={"help": "Height of images, in pixels."})
    width: int = field(default=24, metadata={"help": "Width of images, in pixels."})
    batch_size: int = field(default=16, metadata={"help": "Prompts at once."})
    seed: int = field(default=0, metadata={"help": "Of all noise."})
    output_dir: str = field(default="runs/generate", metadata={"help": "Where images and texts go."})

    def __post_init__(self) -> None:
        RewardArguments.__post_init__(self)
        SamplingArguments.__post_init__(self)
        if self.prompts and self.prompt_file:
            raise ValueError("give prompts or prompt_file, not both")
        for name in ("num_prompts", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}")


def load_rows(args: GenerationArguments) -> list[dict[str, Any]]:
    """Rows to paint, with questions unless prompts stand on the command line."""
    if args.prompts:
        return [{"prompt": prompt} for prompt in args.prompts]
    return list(load_prompts(args.prompt_file, "evaluation", args.num_prompts))


def save(refinements: list[Refinement], rows: list[dict[str, Any]], output_dir: Path, num_rounds: int) -> None:
    """Images first and the list of them last and whole, so that the list never names an image that is not there."""
    lines, sheet = [], []
    blank = Image.new("RGB", refinements[0].steps[0].image.size, "white")
    for index, (row, refinement) in enumerate(zip(rows, refinements, strict=True)):
        steps, tiles = [], []
        for turn, step in enumerate(refinement.steps):
            name = f"{index:04d}_round{turn}.png"
            step.image.save(output_dir / name)
            steps.append({"image": name, "text": step.text, "reward": step.reward, "best": step is refinement.best})
            tiles.append((step.image, "" if step.reward is None else f"reward {step.reward:.2f}"))
        lines.append(json.dumps({"prompt": row["prompt"], "steps": steps}, ensure_ascii=False))
        tiles += [(blank, "")] * (num_rounds + 1 - len(tiles))
        sheet.append((f"{row['prompt']} | {refinement.steps[-1].text}", tiles))
    headers = ["painted", *(f"round {turn}" for turn in range(1, num_rounds + 1))]
    contact_sheet(sheet, headers, caption_width=420).save(output_dir / "contact_sheet.png")
    temporary = output_dir / "samples.jsonl.tmp"
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(temporary, output_dir / "samples.jsonl")


def main(args: GenerationArguments) -> None:
    rows = load_rows(args)
    model, processor = load_model(args.model_name_or_path, dtype=args.dtype)
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu").eval()
    scorer = None
    if args.judge != "none" and not args.prompts:
        reward = args.make_reward((model, processor))
        reward.validate_image_size(args.height, args.width)

        async def score(images: list[Image.Image], of_rows: list[Mapping[str, Any]]) -> list[float | None]:
            try:
                scores = await reward.score(images, [from_row(row) for row in of_rows])
            finally:
                # Each call has an event loop of its own.
                await reward.aclose()
            return [score.reward for score in scores]

        def scorer(images: list[Image.Image], of_rows: list[Mapping[str, Any]]) -> list[float | None]:
            return asyncio.run(score(images, of_rows))

    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    refinements = []
    for start in tqdm(range(0, len(rows), args.batch_size), desc="prompts"):
        refinements += refine(
            model,
            processor,
            rows[start : start + args.batch_size],
            args.rollout(args.height, args.width),
            num_rounds=args.num_rounds,
            think=args.think,
            seed=f"{args.seed}-{start}",
            scorer=scorer,
            stop_reward=args.stop_reward,
            keep_best=args.keep_best,
        )
    save(refinements, rows, output_dir, args.num_rounds)
    print(f"{len(rows)} prompts: images, samples.jsonl and contact_sheet.png in {output_dir}")


if __name__ == "__main__":
    (arguments,) = TrlParser((GenerationArguments,)).parse_args_and_config()
    main(arguments)
