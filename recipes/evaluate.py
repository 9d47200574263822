# SPDX-License-Identifier: Apache-2.0

"""
Score checkpoints and adapters on prompts with questions: as painters without and with a thought, with rounds of reflection on
what they painted, and as editors.

```bash
python recipes/evaluate.py --models bagel-shapes runs/reasoning_t2i_shapes --modes direct thought
python recipes/evaluate.py --models bagel-shapes runs/reasoning_t2i_shapes --num_rounds 3
python recipes/evaluate.py --models bagel-shapes runs/self_reflection_shapes --task image_editing
```

With prompts and a judge of your own; every option stands in `--help`:

```bash
python recipes/evaluate.py --models ByteDance-Seed/BAGEL-7B-MoT runs/adapter --dtype bfloat16 --eval_file questions.jsonl \\
    --image_size 512 --num_timesteps 50 --timestep_shift 3 --cfg_text_scale 4 --batch_size 8 \\
    --judge openai --judge_base_url http://localhost:8000/v1 --judge_model NAME
```

All checkpoints see the same prompts and the same noise, so their scores are paired; the first one is the baseline of the
others. Intervals hold 95% of 10,000 draws of the prompts.

Every scored batch is kept in the output folder. An evaluation that was stopped or killed goes on where it was when it is
started again, and one more model, mode or round only adds what is new. With `accelerate launch`, several processes share the
work.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers.processing_utils import ProcessorMixin
from trl import TrlParser

from alphagrpo_ext.files import FileInUseError
from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.models.fingerprint import checkpoint_fingerprint, model_label
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.rollout import TASKS, RolloutGenerator
from alphagrpo_ext.rollout.arguments import SamplingArguments
from alphagrpo_ext.shapes.editing import editing_rows
from reward_models.arguments import RewardArguments
from reward_models.evaluation.evaluate import evaluate, share_of_work
from reward_models.evaluation.results import save_results
from reward_models.evaluation.scores import NamedEvaluation
from reward_models.evaluation.settings_digest import settings_digest
from reward_models.evaluation.store import EvaluationStore
from reward_models.evaluation.text_tables import refinement_table
from reward_models.prompts.loading import load_prompts
from reward_models.prompts.questions import from_row
from reward_models.prompts.rows import PromptRows


PAINTING, EDITING = "reasoning_t2i", "image_editing"
DIRECT, THOUGHT, REFINE = "direct", "thought", "refine"


@dataclass
class EvaluationArguments(RewardArguments, SamplingArguments):
    """
    What is evaluated, and on what; for the rest see [`RewardArguments`] and [`SamplingArguments`].

    Args:
        models (`list[str]`, *optional*, defaults to `["bagel-shapes"]`):
            Checkpoints and adapters: names, folders, or ids on the Hub.
        task (`str`, *optional*, defaults to `"reasoning_t2i"`):
            `"reasoning_t2i"`, or `"image_editing"`.
        eval_file (`str`, *optional*):
            Prompts with questions, and for editing with images: see [`~reward_models.prompts.loading.load_prompts`]. `None` takes
            those of the shapes world.
        num_eval_prompts (`int`, *optional*, defaults to `504`):
            Prompts drawn from the shapes world.
        eval_seeds (`int`, *optional*, defaults to `2`):
            Noise seeds that every prompt is painted with.
        modes (`list[str]`, *optional*):
            How images are made: `"direct"`, `"thought"` (after a thought), and `"refine"` (after a thought and
            `num_rounds` rounds of reflection, each of which is scored). `None` takes `"thought"`, and `"refine"` too if
            there are rounds.
        num_rounds (`int`, *optional*, defaults to `0`):
            Rounds of reflection on what was painted.
        image_size (`int`, *optional*, defaults to `24`):
            Side of images, in pixels.
        batch_size (`int`, *optional*, defaults to `128`):
            Samples at once.
        output_dir (`str`, *optional*, defaults to `"runs/evaluate"`):
            Where scores and images go.
    """

    models: list[str] = field(
        default_factory=lambda: ["bagel-shapes"], metadata={"help": "Checkpoints and adapters: names or folders."}
    )
    task: str = field(default=PAINTING, metadata={"help": "'reasoning_t2i' or 'image_editing'."})
    eval_file: str | None = field(
        default=None,
        metadata={"help": "Prompts with questions, and images to edit: JSON lines, a folder, or a dataset."},
    )
    num_eval_prompts: int = field(default=504, metadata={"help": "Prompts drawn from the shapes world."})
    eval_seeds: int = field(default=2, metadata={"help": "Noise seeds every prompt is painted with."})
    modes: list[str] | None = field(
        default=None,
        metadata={
            "help": "How images are made: 'direct', 'thought', 'refine'. Default: the last two, if there are rounds."
        },
    )
    num_rounds: int = field(default=0, metadata={"help": "Rounds of reflection on what was painted."})
    image_size: int = field(default=24, metadata={"help": "Side of images, in pixels."})
    batch_size: int = field(default=128, metadata={"help": "Samples at once."})
    output_dir: str = field(default="runs/evaluate", metadata={"help": "Where scores and images go."})

    def __post_init__(self) -> None:
        RewardArguments.__post_init__(self)
        SamplingArguments.__post_init__(self)
        if self.task not in (PAINTING, EDITING):
            raise ValueError(f"task must be '{PAINTING}' or '{EDITING}', but is '{self.task}'")
        for name in ("eval_seeds", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}")
        if self.num_rounds < 0:
            raise ValueError(f"num_rounds must not be negative, but is {self.num_rounds}")
        if self.modes is None:
            self.modes = [THOUGHT, REFINE] if self.num_rounds else [THOUGHT]
        unknown = [mode for mode in self.modes if mode not in (DIRECT, THOUGHT, REFINE)]
        if unknown or not self.modes:
            raise ValueError(f"modes must be of '{DIRECT}', '{THOUGHT}' and '{REFINE}', but are {self.modes}")
        if (REFINE in self.modes) != (self.num_rounds > 0):
            raise ValueError(
                f"mode '{REFINE}' and num_rounds go together, but modes are {self.modes} and num_rounds is {self.num_rounds}"
            )


@dataclass(frozen=True)
class Stage:
    """
    One way in which all prompts are painted once.

    Args:
        mode (`str`): Its name in files and tables.
        task (`str`): Name in `TASKS`.
        think (`bool`): Whether the policy writes before it paints.
        source ([`Stage`], *optional*): The stage whose images the policy is given.
    """

    mode: str
    task: str
    think: bool
    source: Stage | None = None

    @property
    def lineage(self) -> list[Stage]:
        """The stages that led to this one, which is the last."""
        return [*(self.source.lineage if self.source else []), self]


def stages_of(args: EvaluationArguments) -> list[Stage]:
    """All stages, each after the one whose images it refines."""
    stages = [Stage(DIRECT, args.task, think=False)] if DIRECT in args.modes else []
    if THOUGHT in args.modes or REFINE in args.modes:
        stages.append(Stage(THOUGHT, args.task, think=True))
    for turn in range(1, args.num_rounds + 1):
        stages.append(Stage(f"round {turn}", "self_reflection", think=True, source=stages[-1]))
    return stages


def load_rows(args: EvaluationArguments) -> Sequence[dict[str, Any]]:
    """
    Rows to evaluate on.

    Raises:
        `ValueError`: If there are no images to edit.
    """
    if args.eval_file is None and args.task == EDITING:
        return editing_rows(args.num_eval_prompts, seed=0)
    dataset = load_prompts(args.eval_file, "evaluation", args.num_eval_prompts)
    if args.task == EDITING:
        if "image" not in dataset.column_names:
            raise ValueError(f"{args.eval_file} has no images, which task '{EDITING}' needs: give rows an 'image'")
    elif "image" in dataset.column_names:
        dataset = dataset.remove_columns("image")
    return PromptRows(dataset)


def evaluate_model(
    name: str, rows: Sequence[dict[str, Any]], rows_digest: str, args: EvaluationArguments
) -> list[NamedEvaluation]:
    """One evaluation a stage. The model is loaded only if something is left to paint."""

    @functools.cache
    def policy() -> tuple[UnifiedModel, ProcessorMixin]:
        model, processor = load_model(name, dtype=args.dtype)
        return model.to(PartialState().device).eval(), processor

    config = args.rollout(args.image_size, args.image_size)
    settings = [
        checkpoint_fingerprint(name),
        args.dtype,
        rows_digest,
        config,
        args.answer_settings(),
        args.eval_seeds,
        args.batch_size,
    ]
    seeds = range(args.eval_seeds)
    results: dict[str, NamedEvaluation] = {}
    for stage in stages_of(args):
        initial = results[stage.source.mode].evaluation if stage.source else None
        folder = Path(args.output_dir) / "images" / model_label(name) / stage.mode.replace(" ", "_")
        with EvaluationStore(folder, settings_digest(settings, stage.lineage)) as store:
            evaluation = store.evaluation(share_of_work(len(rows), seeds), len(stage.lineage) - 1)
            if evaluation is None:
                reward = args.make_reward(policy())
                reward.validate_image_size(args.image_size, args.image_size)
                evaluation = evaluate(
                    RolloutGenerator(*policy(), TASKS.get(stage.task)(think=stage.think)),
                    rows,
                    config,
                    reward,
                    seeds,
                    args.batch_size,
                    description=f"{name}, {stage.mode}",
                    initial=initial,
                    store=store,
                )
        first = results[stage.lineage[0].mode].evaluation if stage.source else None
        results[stage.mode] = NamedEvaluation(name, stage.mode, evaluation, first)
    return list(results.values())


def settings_of(args: EvaluationArguments) -> dict[str, Any]:
    """What stands in `evaluation.json` about how it was made."""
    return {name: value for name, value in asdict(args).items() if name != "output_dir"}


def main(args: EvaluationArguments) -> None:
    # Processes on a machine without an accelerator find each other only if they are told.
    PartialState(cpu=not torch.accelerator.is_available())
    rows = load_rows(args)
    rows_digest = settings_digest(rows)
    results = [
        evaluation
        for name in dict.fromkeys(args.models)
        for evaluation in evaluate_model(name, rows, rows_digest, args)
    ]
    if not PartialState().is_main_process:
        return
    records = [from_row(row, where=f"row {index}") for index, row in enumerate(rows)]
    print(f"\n{save_results(Path(args.output_dir), results, records, settings_of(args))}")
    for name in dict.fromkeys(args.models):
        rounds = {
            entry.mode: (entry.initial, entry.evaluation) for entry in results if entry.model == name and entry.initial
        }
        if rounds:
            print(f"\n{name}, from its first image\n{refinement_table(rounds)}")
    print(f"\nevaluation.json, summary.csv, samples.jsonl and images: {args.output_dir}")


if __name__ == "__main__":
    (arguments,) = TrlParser((EvaluationArguments,)).parse_args_and_config()
    try:
        main(arguments)
    except FileInUseError as error:
        sys.exit(str(error))
    # Threads of the communication backend that outlive the interpreter may abort the process.
    PartialState().destroy_process_group()
