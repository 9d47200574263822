# SPDX-License-Identifier: Apache-2.0

"""Arguments of `export_benchmark.py`. They are read without models, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field

from alphagrpo_ext.ranges import NonNegativeInt, PositiveInt
from alphagrpo_ext.rollout.arguments import SamplingArguments
from reward_models.arguments import RewardArguments


@dataclass
class ExportArguments(RewardArguments, SamplingArguments):
    """
    Arguments of the export; for the rest see [`RewardArguments`] and [`SamplingArguments`]. The help text of a field describes it.
    """

    benchmark: str = field(
        default="geneval",
        metadata={"help": "'geneval', 'dpg_bench', 'tiif_bench', 'wise', 'gedit_bench', or a registered one."},
    )
    prompts: str | None = field(
        default=None, metadata={"help": "The benchmark's own prompts: a file, a folder or a dataset."}
    )
    questions: str | None = field(
        default=None,
        metadata={"help": "Questions about its prompts, as JSON lines; they precede the benchmark's own."},
    )
    model_name_or_path: str = field(
        default="bagel-shapes", metadata={"help": "The policy: a name, a folder, or an id on the Hub."}
    )
    model_label: str | None = field(
        default=None,
        metadata={"help": "Name of the model for the benchmark's scorer. Default: made from --model_name_or_path."},
    )
    num_images: PositiveInt | None = field(
        default=None, metadata={"help": "Images per prompt. Default: as in the benchmark's protocol."}
    )
    think: bool = field(default=True, metadata={"help": "Whether the policy writes a thought before it paints."})
    num_rounds: NonNegativeInt = field(
        default=0, metadata={"help": "Number of rounds of reflection; the last image is exported."}
    )
    height: PositiveInt | None = field(
        default=None,
        metadata={"help": "Height of images, in pixels. Default: 24, or for an edited image that of the original."},
    )
    width: PositiveInt | None = field(
        default=None,
        metadata={"help": "Width of images, in pixels. Default: 24, or for an edited image that of the original."},
    )
    skip_broken_rows: bool = field(
        default=False,
        metadata={
            "help": "Whether to leave out prompts whose image cannot be read, and to list them at the end. Default: nothing is "
            "painted if there are any."
        },
    )
    batch_size: PositiveInt = field(default=16, metadata={"help": "Images per batch, rounded to whole prompts."})
    seed: int = field(default=0, metadata={"help": "Seed of all noise."})
    judge: str = field(
        default="none", metadata={"help": "Judge that answers questions about the images; 'none' asks no questions."}
    )
    output_dir: str = field(default="runs/export_benchmark", metadata={"help": "Folder for images and scores."})

    def __post_init__(self) -> None:
        RewardArguments.__post_init__(self)
        SamplingArguments.__post_init__(self)
        if not self.prompts:
            raise ValueError(f"prompts is missing: name the file or folder with the prompts of '{self.benchmark}'")
        if self.questions and self.judge == "none":
            raise ValueError("questions are answered by a judge: give one, e.g. --judge openai")
        if (self.height is None) != (self.width is None):
            raise ValueError(f"give height and width, or neither, but they are {self.height} and {self.width}")
