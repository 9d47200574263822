# SPDX-License-Identifier: Apache-2.0

"""Arguments of `gpu_check.py`. They are read without models, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field

from alphagrpo_ext.ranges import AtLeastTwo, PositiveInt, check_ranges


CHECK_PARTS = {"parity": 60, "speed": 90, "denoising": 60, "update": 60}
"""Shares of the time that the parts of one model get, in seconds if all of them run for two models in 9 minutes."""
TINY_SIZES = ("bagel-shapes", "cosmos3-shapes")
IMAGE_SIZES = {"BAGEL-7B-MoT": 512, "Cosmos3-Edge": 640, **dict.fromkeys(TINY_SIZES, 24)}
"""Height and width of images, in pixels, by the name of a model."""


@dataclass
class GPUCheckArguments:
    """Arguments of the check; the help text of a field describes it."""

    parts: list[str] = field(
        default_factory=lambda: list(CHECK_PARTS), metadata={"help": f"Parts to run: {', '.join(CHECK_PARTS)}."}
    )
    device: str = field(
        default="cuda", metadata={"help": "Device to check. 'cpu' is for tests and takes the tiny sizes alone."}
    )
    sizes: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Models whose speed is measured, of {', '.join(IMAGE_SIZES)}. Default: the first two, and the tiny ones on a CPU."
        },
    )
    trained_steps: list[PositiveInt] = field(
        default_factory=lambda: [5, 10],
        metadata={"help": "Numbers K of trained steps per image, of at most 15 steps."},
    )
    num_samples: AtLeastTwo = field(default=4, metadata={"help": "Samples of a rollout. They share a prompt."})
    prompt_tokens: PositiveInt = field(default=128, metadata={"help": "Length of the prompt of an update, in tokens."})
    thought_tokens: PositiveInt = field(default=128, metadata={"help": "Length of thoughts, in tokens."})
    lora_rank: PositiveInt = field(default=32, metadata={"help": "Rank of the adapter."})
    repetitions: PositiveInt = field(default=3, metadata={"help": "Timed calls, after one that is not timed."})
    amortised_calls: PositiveInt = field(
        default=5000,
        metadata={"help": "Calls among which the seconds of a compilation are divided before a way to compute wins."},
    )
    compile_backend: str = field(
        default="inductor", metadata={"help": "Backend of torch.compile. 'eager' makes no code, and is for tests."}
    )
    time_limit: PositiveInt = field(
        default=540,
        metadata={
            "help": "Seconds after which the check stops. Each part has a share of what is left, and leaves what it does not use to "
            "those after it. The same command goes on where it stopped."
        },
    )
    output_dir: str = field(default="runs/gpu_check", metadata={"help": "Folder for gpu_check.json and gpu_check.md."})

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.sizes is None:
            self.sizes = list(TINY_SIZES) if self.is_cpu else [name for name in IMAGE_SIZES if name not in TINY_SIZES]
        for name, values, known in (("parts", self.parts, CHECK_PARTS), ("sizes", self.sizes, IMAGE_SIZES)):
            if unknown := [value for value in values if value not in known]:
                raise ValueError(f"{name}: unknown {', '.join(unknown)}; available: {', '.join(known)}")
        if self.is_cpu and (large := [name for name in self.sizes if name not in TINY_SIZES]):
            raise ValueError(f"sizes: {', '.join(large)} is too large for a CPU; it takes {', '.join(TINY_SIZES)}")
        if too_many := [steps for steps in self.trained_steps if steps > 15]:
            raise ValueError(f"trained_steps must be at most 15, the steps of an image, but has {too_many[0]}")

    @property
    def is_cpu(self) -> bool:
        return self.device.partition(":")[0] == "cpu"
