# Copyright 2026 The AlphaGRPO-Ext Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Score checkpoints on prompts with questions: as painters, with rounds of reflection on what they painted, and as editors.

```bash
python recipes/evaluate.py --models bagel-shapes runs/reasoning_t2i_shapes --num_rounds 3
python recipes/evaluate.py --models bagel-shapes runs/self_reflection_shapes --task image_editing
```

All checkpoints see the same prompts and the same noise, so their scores are paired.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from trl import TrlParser

from alphagrpo_ext.flow import GuidanceConfig
from alphagrpo_ext.models.denoising import DenoisingConfig
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator
from alphagrpo_ext.shapes.editing import editing_rows
from reward_models.arguments import RewardArguments
from reward_models.evaluation import Evaluation, RefinementScore, comparison_table, evaluate, refinement_table
from reward_models.prompts import load_prompts


PAINTING, EDITING = "reasoning_t2i", "image_editing"


@dataclass
class EvaluationArguments(RewardArguments):
    """Arguments of the evaluation. The defaults suit the packaged model."""

    models: list[str] = field(default_factory=lambda: ["bagel-shapes"], metadata={"help": "Names or folders."})
    task: str = field(default=PAINTING, metadata={"help": "'reasoning_t2i', or 'image_editing' in the shapes world."})
    eval_file: str | None = field(default=None, metadata={"help": "Prompts with questions, as JSON lines."})
    num_eval_prompts: int = field(default=504, metadata={"help": "Prompts drawn from the shapes world."})
    eval_seeds: int = field(default=2, metadata={"help": "Noise seeds every prompt is painted with."})
    num_rounds: int = field(default=0, metadata={"help": "Rounds of reflection on what was painted."})
    think: bool = field(default=True, metadata={"help": "Whether the first image follows a thought."})
    image_size: int = field(default=24, metadata={"help": "Side of images, in pixels."})
    num_timesteps: int = field(default=11, metadata={"help": "Points of the denoising schedule."})
    timestep_shift: float = field(default=1.0, metadata={"help": "Shift of the schedule towards noise."})
    cfg_text_scale: float = field(default=1.0, metadata={"help": "Guidance scale of text; at most 1 is off."})
    cfg_img_scale: float = field(default=1.0, metadata={"help": "Guidance scale of images; at most 1 is off."})
    max_new_tokens: int = field(default=48, metadata={"help": "Longest text, in tokens."})
    temperature: float = field(default=0.0, metadata={"help": "Temperature of texts."})
    batch_size: int = field(default=128, metadata={"help": "Samples at once."})
    output_dir: str = field(default="runs/evaluate", metadata={"help": "Where scores.json goes."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in (PAINTING, EDITING):
            raise ValueError(f"task must be '{PAINTING}' or '{EDITING}', but is '{self.task}'")
        if self.task == EDITING and self.eval_file:
            raise ValueError("eval_file has no images, which task 'image_editing' needs")
        if self.eval_seeds < 1:
            raise ValueError(f"eval_seeds must be at least 1, but is {self.eval_seeds}")

    @property
    def rollout(self) -> RolloutConfig:
        return RolloutConfig(
            self.image_size,
            self.image_size,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            denoising=DenoisingConfig(
                self.num_timesteps, self.timestep_shift, GuidanceConfig(self.cfg_text_scale, self.cfg_img_scale)
            ),
        )


def evaluate_model(name: str, rows: list[dict], args: EvaluationArguments) -> list[Evaluation]:
    """The first image and one evaluation a round."""
    model, processor = load_model(name)
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu").eval()
    settings = {
        "rows": rows,
        "config": args.rollout,
        "reward": args.make_reward((model, processor)),
        "seeds": range(args.eval_seeds),
        "batch_size": args.batch_size,
    }
    painter = RolloutGenerator(model, processor, TASKS.get(args.task)(think=args.think))
    rounds = [evaluate(painter, description=name, **settings)]
    refiner = RolloutGenerator(model, processor, TASKS.get("self_reflection")(think=True))
    for turn in range(args.num_rounds):
        rounds.append(evaluate(refiner, description=f"{name}, round {turn + 1}", initial=rounds[-1], **settings))
    return rounds


def main(args: EvaluationArguments) -> None:
    if args.task == EDITING:
        rows = editing_rows(args.num_eval_prompts, seed=0)
    else:
        rows = list(load_prompts(args.eval_file, "evaluation", args.num_eval_prompts))
    results = {name: evaluate_model(name, rows, args) for name in args.models}
    first_name, first = next(iter(results.items()))
    for name, rounds in results.items():
        print(f"\n{first_name} -> {name}\n{comparison_table(first[0], rounds[0])}")
        if args.num_rounds:
            pairs = {f"round {turn + 1}": (rounds[0], rounds[turn + 1]) for turn in range(args.num_rounds)}
            print(f"\n{name}, from its first image\n{refinement_table(pairs)}")
    scores = {
        name: [{**evaluation.summary(), **asdict(RefinementScore.of(rounds[0], evaluation))} for evaluation in rounds]
        for name, rounds in results.items()
    }
    path = Path(args.output_dir) / "scores.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    (arguments,) = TrlParser((EvaluationArguments,)).parse_args_and_config()
    main(arguments)
