# SPDX-License-Identifier: Apache-2.0

"""
Measure how well rewards of a frozen model tell right images of a prompt from wrong ones.

The images are those of a finished evaluation by the judge of the pixels, which says what is right. For every reward, the area under the
ROC curve within a prompt is the share of pairs of a right and a wrong image of the same prompt in which the right one has the higher
value. It is a script that `reproduce_tables.py` runs:

```bash
python recipes/reproduce_tables.py --only frozen_rewards
```
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphagrpo_ext.files import write_text
from recipe_tools.recipe_arguments import RecipeParser
from table_parts.results import ScoredSamples
from table_parts.rewards import HOLISTIC_TEMPLATE


if TYPE_CHECKING:
    from PIL import Image


@dataclass
class AgreementArguments:
    """Arguments of the measurement; the help text of a field describes it."""

    model_name_or_path: str = field(default="bagel-shapes", metadata={"help": "Frozen unified model that scores."})
    evaluation: str = field(
        default="runs/evaluate", metadata={"help": "Folder of an evaluation with several noise seeds per prompt."}
    )
    output_dir: str = field(default="runs/frozen_rewards", metadata={"help": "Folder for frozen_rewards.json."})


def within_prompt_auc(
    prompts: Sequence[int], is_right: Sequence[bool], values: Sequence[float | None]
) -> dict[str, Any]:
    """
    Compare values of right and of wrong images of the same prompt.

    Args:
        prompts (`Sequence[int]`): The prompt of each image.
        is_right (`Sequence[bool]`): Whether an image is right.
        values (`Sequence[float]`): Its value. Images without one are left out.

    Returns:
        `dict`: `auc`, the share of pairs with the higher value on the right image, where equal values count half; its standard `error`,
        clustered by prompt; and the number of `prompts` that have a pair, and of their `pairs`.
    """
    from reward_models.evaluation.statistics import standard_error

    groups: dict[int, tuple[list[float], list[float]]] = {}
    for prompt, right, value in zip(prompts, is_right, values, strict=True):
        if value is not None:
            groups.setdefault(prompt, ([], []))[right].append(value)
    pairs = [
        (prompt, (high > low) + 0.5 * (high == low))
        for prompt, (wrong, right) in groups.items()
        for high in right
        for low in wrong
    ]
    if not pairs:
        raise ValueError("no prompt has a right and a wrong image: evaluate with more prompts or noise seeds")
    places, wins = [prompt for prompt, _ in pairs], [win for _, win in pairs]
    auc = sum(wins) / len(wins)
    return {"auc": auc, "error": standard_error(places, wins), "prompts": len(set(places)), "pairs": len(pairs)}


def rewards_of(model_name: str) -> dict[str, Callable[[list[Image.Image], list[dict[str, Any]]], list[float | None]]]:
    """
    The rewards by their label. Each takes images and lines of `samples.jsonl`, and returns a value per image, `None` without one.

    Args:
        model_name (`str`): The frozen model.
    """
    from alphagrpo_ext.models.attention.choice import choose_attention
    from alphagrpo_ext.models.loading import load_model
    from reward_models.dvreward import DVReward
    from reward_models.judges.policy import PolicyJudge
    from reward_models.likelihood.policy import PolicyScorer
    from reward_models.likelihood.reward import LikelihoodReward
    from reward_models.prompts.questions import PromptRecord, from_row

    model, processor = load_model(model_name, dtype="float32")
    model.set_attn_implementation(choose_attention(model.family, model.device.type).name)
    policy = (model.eval(), processor)
    judge = DVReward(PolicyJudge(*policy, min_answer_mass=0.0))

    def by_judge(images: list[Image.Image], records: list[PromptRecord]) -> list[float | None]:
        return [score.reward for score in asyncio.run(judge.score(images, records))]

    def likelihood(context: str, tokens: str) -> Callable[..., list[float | None]]:
        reward = LikelihoodReward(PolicyScorer(*policy, context=context), tokens)
        return lambda images, rows: reward([row["prompt"] for row in rows], images=images)

    return {
        "DVReward": lambda images, rows: by_judge(images, [from_row(_with_questions(row)) for row in rows]),
        "one question": lambda images, rows: by_judge(images, [from_row(_with_one_question(row)) for row in rows]),
        **{
            f"likelihood, `{context}`, {tokens} tokens": likelihood(context, tokens)
            for context in ("vit", "vae_vit")
            for tokens in ("all", "content")
        },
    }


def _with_questions(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": row["prompt"],
        **{f"{side}_questions": [a for a in row["answers"] if a["side"] == side] for side in ("semantic", "quality")},
    }


def _with_one_question(row: dict[str, Any]) -> dict[str, Any]:
    question = {"question": HOLISTIC_TEMPLATE.format(prompt=row["prompt"]), "tag": "Holistic"}
    return {"prompt": row["prompt"], "semantic_questions": [question], "quality_questions": []}


def main(args: AgreementArguments) -> None:
    # Here, so that `--help` does not import models.
    import torch

    from reward_models.files.image_files import load_image

    # Threads that wait for each other cost more than they save at this size.
    torch.set_num_threads(1)
    (samples,) = ScoredSamples.read(Path(args.evaluation)).values()
    images = [load_image(Path(args.evaluation) / row["image"]) for row in samples.rows]
    prompts, is_right = ([row[name] for row in samples.rows] for name in ("prompt_index", "strict_pass"))
    found = {}
    for label, reward in rewards_of(args.model_name_or_path).items():
        found[label] = within_prompt_auc(prompts, is_right, reward(images, samples.rows))
        print(f"{label:<38}{found[label]['auc']:.3f} +- {found[label]['error'] or 0:.3f}", flush=True)
    output = Path(args.output_dir) / "frozen_rewards.json"
    write_text(output, json.dumps(found, indent=2) + "\n")
    print(f"\n{output}")


if __name__ == "__main__":
    (arguments,) = RecipeParser([AgreementArguments], __doc__).parse_args_and_config()
    main(arguments)
