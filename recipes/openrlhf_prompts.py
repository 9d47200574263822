# SPDX-License-Identifier: Apache-2.0

"""
Write a prompt dataset for OpenRLHF as JSON lines. In each line, `prompt` is the text that the policy is asked, and `label` is the
JSON of the prompt and its questions, by which images are scored.

Without arguments the script takes prompts of the shapes world:

```bash
python recipes/openrlhf_prompts.py --output_dir runs/openrlhf
```

With prompts of your own and another request to the policy:

```bash
python recipes/openrlhf_prompts.py --prompt_file questions.jsonl --template "Plan this picture: {prompt}"
```

OpenRLHF reads the file with `--data.prompt_dataset runs/openrlhf/prompts.jsonl --data.input_key prompt --data.label_key label
--data.apply_chat_template`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alphagrpo_ext.files import write_text
from alphagrpo_ext.ranges import PositiveInt, check_ranges
from recipe_tools.input_errors import checking_input, input_errors_in_a_line
from recipe_tools.recipe_arguments import RecipeParser


# OpenRLHF replaces this text by an image.
IMAGE_MARK = "<image>"


@dataclass
class OpenRLHFPromptArguments:
    """Arguments of the conversion."""

    prompt_file: str | None = field(
        default=None,
        metadata={
            "help": "Prompts with questions, in the formats of evaluate.py. Default: prompts of the shapes world."
        },
    )
    split: str = field(default="train", metadata={"help": "Split of the shapes world: 'train' or 'evaluation'."})
    num_prompts: PositiveInt = field(default=1024, metadata={"help": "Number of prompts drawn from the shapes world."})
    template: str = field(
        default=(
            "Plan an image for this request: {prompt}\\nSay what it shows, where everything is and how it looks. The image "
            "is then painted from your plan."
        ),
        metadata={"help": "What the policy is asked; {prompt} is replaced by the prompt, and \\n by a line break."},
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System message of the chat, if any."})
    output_dir: str = field(default="runs/openrlhf", metadata={"help": "Folder in which `prompts.jsonl` is written."})

    def __post_init__(self) -> None:
        check_ranges(self)
        if "{prompt}" not in self.template:
            raise ValueError(f"template must contain {{prompt}}, but is {self.template!r}")
        self.template = self.template.replace("\\n", "\n")
        if IMAGE_MARK in self.template + (self.system_prompt or ""):
            raise ValueError(f"template and system_prompt must not contain {IMAGE_MARK}: there is no image to show")


def convert(row: Mapping[str, Any], args: OpenRLHFPromptArguments, where: str) -> dict[str, Any]:
    """
    Convert a row to one line of the dataset.

    Args:
        row (`Mapping[str, Any]`): A row with `prompt`, `semantic_questions` and `quality_questions`.
        args ([`OpenRLHFPromptArguments`]): Template of the request to the policy.
        where (`str`): Name of the row in error messages.

    Raises:
        `ValueError`: If OpenRLHF would misread the prompt, or if the row asks to edit an image.
    """
    from alphagrpo_ext.messages import prompt_text

    prompt = prompt_text(row["prompt"])
    if IMAGE_MARK in prompt:
        raise ValueError(
            f"{where}: the prompt contains {IMAGE_MARK}, which OpenRLHF takes for an image: {prompt[:200]!r}"
        )
    if row.get("image") is not None:
        raise ValueError(
            f"{where} has an image to edit; OpenRLHF's rollouts start from text alone, so leave such rows out"
        )
    request = args.template.replace("{prompt}", prompt)
    record = {
        "prompt": prompt,
        "semantic_questions": row["semantic_questions"],
        "quality_questions": row["quality_questions"],
    }
    messages = [{"role": "system", "content": args.system_prompt}, {"role": "user", "content": request}]
    return {
        "prompt": request if args.system_prompt is None else messages,
        "label": json.dumps(record, ensure_ascii=False),
    }


def main(args: OpenRLHFPromptArguments) -> None:
    # Here, so that `--help` does not import models.
    from reward_models.prompts.loading import load_prompts

    with checking_input():
        dataset = load_prompts(args.prompt_file, args.split, args.num_prompts)
    source = args.prompt_file or f"shapes world, {args.split}"
    lines = [
        json.dumps(convert(row, args, f"{source}, row {index}"), ensure_ascii=False)
        for index, row in enumerate(dataset)
    ]
    output = Path(args.output_dir) / "prompts.jsonl"
    write_text(output, "\n".join(lines) + "\n")
    print(f"{len(lines)} prompts in {output}")


if __name__ == "__main__":
    with input_errors_in_a_line():
        with checking_input():
            (arguments,) = RecipeParser([OpenRLHFPromptArguments], __doc__).parse_args_and_config()
        main(arguments)
