# SPDX-License-Identifier: Apache-2.0

"""Arguments of `evaluate.py`. They are read without models, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field

from alphagrpo_ext.ranges import NonNegativeInt, PositiveInt
from alphagrpo_ext.rollout.arguments import SamplingArguments, StoppingArguments
from recipe_tools.evaluation.stages import ANSWERING, DIRECT, EDITING, PAINTING, REFINE, THOUGHT
from reward_models.arguments import RewardArguments


@dataclass
class EvaluationArguments(RewardArguments, SamplingArguments, StoppingArguments):
    """
    Arguments of the evaluation; for the rest see [`RewardArguments`], [`SamplingArguments`] and [`StoppingArguments`]. The help
    text of a field describes it.
    """

    models: list[str] = field(
        default_factory=lambda: ["bagel-shapes"],
        metadata={"help": "Checkpoints and adapters: names, folders, or ids on the Hub."},
    )
    task: str = field(
        default=PAINTING, metadata={"help": "'reasoning_t2i', 'image_editing' or 'visual_question_answering'."}
    )
    eval_file: str | None = field(
        default=None,
        metadata={
            "help": "Prompts with questions, and images to edit: JSON lines, a JSON array, CSV, TSV, Parquet, a folder, or a dataset. "
            "Default: prompts of the shapes world."
        },
    )
    num_eval_prompts: PositiveInt = field(
        default=504, metadata={"help": "Number of prompts drawn from the shapes world."}
    )
    skip_broken_rows: bool = field(
        default=False,
        metadata={"help": "Leave out rows whose image cannot be read, and list them at the end, instead of stopping."},
    )
    eval_seeds: PositiveInt = field(default=2, metadata={"help": "Noise seeds per prompt."})
    modes: list[str] | None = field(
        default=None,
        metadata={
            "help": "How images are made: 'direct' (without a thought), 'thought' (after one), 'refine' (after a thought and "
            "num_rounds rounds of reflection, each of which is scored). Default: 'thought', and 'refine' if there are rounds."
        },
    )
    num_rounds: NonNegativeInt = field(default=0, metadata={"help": "Number of rounds of reflection."})
    calibrate_stop: NonNegativeInt = field(
        default=0,
        metadata={
            "help": "With allow_stop, number of training prompts on which stop_threshold is calibrated first, for every model. A "
            "folder with a whole model keeps its threshold in config.json. 0 calibrates nothing."
        },
    )
    calibration_file: str | None = field(
        default=None,
        metadata={"help": "Training prompts with questions for calibrate_stop. Default: those of the shapes world."},
    )
    image_size: PositiveInt = field(default=24, metadata={"help": "Height and width of images, in pixels."})
    batch_size: PositiveInt = field(default=128, metadata={"help": "Samples per batch."})
    output_dir: str = field(default="runs/evaluate", metadata={"help": "Folder for scores and images."})

    def __post_init__(self) -> None:
        RewardArguments.__post_init__(self)
        SamplingArguments.__post_init__(self)
        StoppingArguments.__post_init__(self)
        if self.task not in (PAINTING, EDITING, ANSWERING):
            raise ValueError(f"task must be '{PAINTING}', '{EDITING}' or '{ANSWERING}', but is '{self.task}'")
        if self.task == ANSWERING and self.num_rounds:
            raise ValueError(f"task '{ANSWERING}' has no image that num_rounds={self.num_rounds} could refine")
        if self.modes is None:
            self.modes = [THOUGHT, REFINE] if self.num_rounds else [THOUGHT]
        unknown = [mode for mode in self.modes if mode not in (DIRECT, THOUGHT, REFINE)]
        if unknown or not self.modes:
            raise ValueError(f"modes must be among '{DIRECT}', '{THOUGHT}' and '{REFINE}', but are {self.modes}")
        if self.calibrate_stop and (not self.allow_stop or self.stop_threshold is not None or self.task == EDITING):
            raise ValueError(
                f"calibrate_stop={self.calibrate_stop} chooses the stop_threshold of rounds of reflection after '{PAINTING}': set "
                f"allow_stop, and no stop_threshold"
            )
        if self.calibration_file is not None and not self.calibrate_stop:
            raise ValueError(
                f"calibration_file={self.calibration_file!r} needs calibrate_stop, the number of its prompts"
            )
        if (REFINE in self.modes) != (self.num_rounds > 0):
            raise ValueError(
                f"mode '{REFINE}' and num_rounds go together, but modes are {self.modes} and num_rounds is {self.num_rounds}"
            )
