# SPDX-License-Identifier: Apache-2.0

"""
Paint prompts with a trained policy, and let it reflect on its images and refine them.

Without arguments it paints eight held-out prompts of the shapes world with the packaged `bagel-shapes`, and scores the images with
the pixel judge. With rounds the model refines each image, and the judge keeps the best:

```bash
python recipes/generate.py --num_rounds 2 --keep_best
```

With prompts of your own and no judge (`--help` lists all options):

```bash
python recipes/generate.py --model_name_or_path runs/self_reflection_shapes --judge none \\
    --prompts "a red circle on a white background" "two blue squares , on gray"
```

Without a judge, `--prompt_file` may hold prompts alone: a text file with one prompt per line, a table or JSON lines. Guidance is off
unless `--cfg_text_scale` is given.

The output folder holds one image per prompt and round, `samples.jsonl` and `contact_sheet.png`.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphagrpo_ext.files import write_text
from alphagrpo_ext.ranges import NonNegativeInt, PositiveInt
from alphagrpo_ext.rollout.arguments import SamplingArguments, StoppingArguments
from recipe_tools.input_errors import checking_input, input_errors_in_a_line
from recipe_tools.recipe_arguments import RecipeParser
from reward_models.arguments import RewardArguments


if TYPE_CHECKING:
    from PIL import Image

    from alphagrpo_ext.rollout import Refinement
    from reward_models.dvreward import DVReward


@dataclass
class GenerationArguments(RewardArguments, SamplingArguments, StoppingArguments):
    """Arguments of the generation; for the rest see [`RewardArguments`], [`SamplingArguments`] and [`StoppingArguments`]."""

    model_name_or_path: str = field(
        default="bagel-shapes", metadata={"help": "The policy: a name, a folder, or an id on the Hub."}
    )
    prompts: list[str] = field(default_factory=list, metadata={"help": "Prompts to paint."})
    prompt_file: str | None = field(
        default=None,
        metadata={
            "help": "A file of prompts with questions, in the formats of evaluate.py, instead of --prompts. With '--judge none' they "
            "need no questions, and plain text with one prompt per line is read as well."
        },
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Name of the column of prompts in prompt_file. Default: prompt."}
    )
    num_prompts: PositiveInt = field(
        default=8, metadata={"help": "Number of prompts drawn from the shapes world if none are given."}
    )
    num_rounds: NonNegativeInt = field(
        default=0,
        metadata={
            "help": "Largest number of rounds of reflection; 0 only paints. After a good first image a round breaks as many "
            "images as it fixes, unless a judge keeps the best one (keep_best)."
        },
    )
    think: bool = field(
        default=True, metadata={"help": "Whether the policy writes a thought before it paints the first image."}
    )
    judge: str = field(
        default="shapes", metadata={"help": "Judge of images whose prompts have questions; 'none' scores nothing."}
    )
    stop_reward: float | None = field(
        default=None, metadata={"help": "Reward from which an image is not refined further."}
    )
    keep_best: bool = field(
        default=False, metadata={"help": "Whether a round refines the best image so far instead of the last one."}
    )
    height: PositiveInt = field(default=24, metadata={"help": "Height of images, in pixels."})
    width: PositiveInt = field(default=24, metadata={"help": "Width of images, in pixels."})
    batch_size: PositiveInt = field(default=16, metadata={"help": "Prompts per batch."})
    seed: int = field(default=0, metadata={"help": "Seed of all noise."})
    output_dir: str = field(default="runs/generate", metadata={"help": "Folder for images and texts."})

    def __post_init__(self) -> None:
        RewardArguments.__post_init__(self)
        SamplingArguments.__post_init__(self)
        StoppingArguments.__post_init__(self)
        if self.prompts and self.prompt_file:
            raise ValueError("give prompts or prompt_file, not both")
        if self.prompt_column is not None and not self.prompt_file:
            raise ValueError(f"prompt_column={self.prompt_column!r} needs prompt_file, whose column it names")
        if (self.judge == "none" or self.prompts) and (self.keep_best or self.stop_reward is not None):
            raise ValueError(
                "keep_best and stop_reward go by rewards: give a judge, and a prompt_file whose rows have questions instead of "
                "prompts"
            )


def load_prompt_rows(args: GenerationArguments) -> list[dict[str, Any]]:
    """Load the rows to paint. They have questions where a judge needs them."""
    from reward_models.prompts.loading import load_prompts, load_unjudged_prompts

    if args.prompts:
        return [{"prompt": prompt} for prompt in args.prompts]
    if args.prompt_file and args.judge == "none":
        rows = load_unjudged_prompts(args.prompt_file, prompt_column=args.prompt_column)
        return [{name: row[name] for name in ("prompt", "image") if row.get(name) is not None} for row in rows]
    return list(load_prompts(args.prompt_file, "evaluation", args.num_prompts, prompt_column=args.prompt_column))


def make_scorer(
    reward: DVReward,
) -> Callable[[list[Image.Image], list[Mapping[str, Any]]], list[float | None]]:
    """Wrap a reward as a function that scores the images of some rows."""
    from reward_models.prompts.questions import from_row

    async def score(images: list[Image.Image], rows: list[Mapping[str, Any]]) -> list[float | None]:
        try:
            scores = await reward.score(images, [from_row(row) for row in rows])
        finally:
            # Each call has its own event loop.
            await reward.aclose()
        reward.check_failures(scores)
        return [score.reward for score in scores]

    return lambda images, rows: asyncio.run(score(images, rows))


def save_refinements(
    refinements: list[Refinement], rows: list[dict[str, Any]], output_dir: Path, num_rounds: int, keep_best: bool
) -> None:
    """Write all images, and then their list, so that it never names an image that does not exist."""
    from PIL import Image

    from alphagrpo_ext.messages import prompt_text
    from recipe_tools.contact_sheet import contact_sheet
    from reward_models.files.image_files import save_image

    lines, sheet = [], []
    blank = Image.new("RGB", refinements[0].steps[0].image.size, "white")
    for index, (row, refinement) in enumerate(zip(rows, refinements, strict=True)):
        steps, tiles = [], []
        for turn, step in enumerate(refinement.steps):
            name = f"{index:04d}_round{turn}.png"
            save_image(step.image, output_dir / name)
            is_best = step.reward is not None and step is refinement.best
            steps.append({"image": name, "text": step.text, "reward": step.reward, "best": is_best})
            label = "" if step.reward is None else f"reward {step.reward:.2f}"
            tiles.append((step.image, f"{label} (kept)" if keep_best and is_best else label))
        kept = {} if refinement.verdict is None else {"kept_with": refinement.verdict}
        lines.append(json.dumps({"prompt": row["prompt"], "steps": steps, **kept}, ensure_ascii=False))
        tiles += [(blank, "")] * (num_rounds + 1 - len(tiles))
        shown = refinement.best if keep_best else refinement.steps[-1]
        text = shown.text if refinement.verdict is None else refinement.verdict
        sheet.append((f"{prompt_text(row['prompt'])}\n\n{text}", tiles))
    headers = ["painted", *(f"round {turn}" for turn in range(1, num_rounds + 1))]
    save_image(contact_sheet(sheet, headers, caption_width=420), output_dir / "contact_sheet.png")
    write_text(output_dir / "samples.jsonl", "\n".join(lines) + "\n")


def generate_images(args: GenerationArguments, is_main: bool) -> None:
    """Paint and refine all prompts, and save images and texts."""
    from tqdm import tqdm

    from alphagrpo_ext.rollout.readable_prompts import unknown_words, unknown_words_warning
    from alphagrpo_ext.rollout.refinement import check_refinement_room, refine
    from alphagrpo_ext.rollout.task import PAINTING_TASK, REFLECTION_TASK
    from recipe_tools.processes import load_policy

    rows = load_prompt_rows(args)
    configs = {name: args.rollout(args.height, args.width, name) for name in (PAINTING_TASK, REFLECTION_TASK)}
    policy = functools.cache(functools.partial(load_policy, args.model_name_or_path, args.dtype))
    scorer = None
    if args.judge != "none" and not args.prompts:
        # Before the model is loaded.
        named_rows = {f"prompt_file {args.prompt_file}": rows}
        sizes = [config.size for config in configs.values()]
        scorer = make_scorer(args.make_checked_reward(named_rows, sizes, policy))
    model, processor = policy()
    with checking_input():
        check_refinement_room(model, processor, rows, configs, args.num_rounds, args.think)
    if words := unknown_words((row["prompt"] for row in rows), processor):
        print(unknown_words_warning(words, processor))
    refinements = []
    for start in tqdm(range(0, len(rows), args.batch_size), desc="prompts"):
        refinements += refine(
            model,
            processor,
            rows[start : start + args.batch_size],
            configs,
            num_rounds=args.num_rounds,
            think=args.think,
            seed=f"{args.seed}-{start}",
            scorer=scorer,
            stop_reward=args.stop_reward,
            keep_best=args.keep_best,
            allow_stop=args.allow_stop,
            stop_threshold=args.threshold_of(model),
        )
    if is_main:
        save_refinements(refinements, rows, Path(args.output_dir), args.num_rounds, args.keep_best)
        print(f"{len(rows)} prompts: images, samples.jsonl and contact_sheet.png in {args.output_dir}")


def main(args: GenerationArguments) -> None:
    # Here, so that `--help` does not import models.
    from recipe_tools.processes import sole_processes

    with sole_processes(args.output_dir) as state:
        generate_images(args, state.is_main_process)


if __name__ == "__main__":
    with input_errors_in_a_line():
        with checking_input():
            (arguments,) = RecipeParser([GenerationArguments], __doc__).parse_args_and_config()
        main(arguments)
