# SPDX-License-Identifier: Apache-2.0

"""Settings of an update whose memory is estimated, which are also arguments of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from alphagrpo_ext.models.attention.choice import ATTENTION_IMPLEMENTATIONS
from alphagrpo_ext.ranges import NonNegativeInt, PositiveInt, check_ranges, number_or_word


if TYPE_CHECKING:
    from alphagrpo_ext.flow.guidance import GuidanceConfig


DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class MemorySettings:
    """
    Settings of an update; the help text of a field describes it. The defaults are those of the paper's configuration for reasoning
    text-to-image. Adapters are fp32. All trained steps are counted as guided, which is the largest number that there can be.
    """

    lora_rank: NonNegativeInt = field(default=32, metadata={"help": "Rank of the adapter; 0 trains all weights."})
    lora_targets: str = field(
        default="both", metadata={"help": "Expert that gets the adapter: 'both', 'generation' or 'understanding'."}
    )
    batch_size: PositiveInt = field(
        default=14, metadata={"help": "Trajectories per process and micro-batch (per_device_train_batch_size)."}
    )
    prompt_tokens: PositiveInt = field(default=128, metadata={"help": "Length of given text, in tokens."})
    thought_tokens: NonNegativeInt = field(default=512, metadata={"help": "Length of sampled text, in tokens."})
    context_images: NonNegativeInt = field(
        default=0, metadata={"help": "Number of images that the policy is given: 1 in self-reflection."}
    )
    height: PositiveInt = field(default=512, metadata={"help": "Height of images, in pixels."})
    width: PositiveInt = field(default=512, metadata={"help": "Width of images, in pixels."})
    sde_window_size: PositiveInt = field(default=10, metadata={"help": "Number K of trained steps per image."})
    image_steps_per_forward: str = field(
        default="auto",
        metadata={
            "help": "Largest number of trained steps in one forward: a number, 'all', or 'auto', as in training."
        },
    )
    num_branches: Annotated[int, "[1, 3]"] = field(
        default=2, metadata={"help": "Number of guidance branches, 1 to 3 for BAGEL and 1 to 2 for Cosmos3."}
    )
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Whether the backward computes each layer again."}
    )
    attn_implementation: str = field(
        default="flex_attention",
        metadata={
            "help": "'flex_attention', 'sdpa' (which stores masks of pairs of tokens), or 'eager' (which also stores their scores)."
        },
    )
    dtype: str = field(default="bfloat16", metadata={"help": "Data type of the weights."})
    autocast: bool = field(
        default=True, metadata={"help": "Whether operations run in bf16 for any type of the weights, as under --bf16."}
    )
    with_reference: bool = field(
        default=False, metadata={"help": "Whether a copy of all weights is kept for a KL. An adapter needs none."}
    )
    num_shards: PositiveInt = field(
        default=1,
        metadata={
            "help": "Number of processes that share weights, gradients and optimizer states, as under FSDP2 and ZeRO-3. Under "
            "autocast these keep trained weights, gradients and moments in fp32."
        },
    )

    def __post_init__(self) -> None:
        from alphagrpo_ext.models.contract import LORA_TARGETS

        check_ranges(self)
        steps = number_or_word("image_steps_per_forward", self.image_steps_per_forward, ("auto", "all"))
        object.__setattr__(self, "image_steps_per_forward", steps)
        for name, choices in (
            ("attn_implementation", ATTENTION_IMPLEMENTATIONS),
            ("lora_targets", LORA_TARGETS),
            ("dtype", DTYPES),
        ):
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, but is {value!r}")

    def steps_per_forward(self, tokens_per_image: int, num_weights: int) -> int:
        """
        Number of trained steps in the largest forward.

        Args:
            tokens_per_image (`int`): Latent tokens of an image.
            num_weights (`int`): Weights that noised tokens are multiplied with.
        """
        from alphagrpo_ext.models.work import balanced_steps, min_forward_tokens

        given, num_steps = self.image_steps_per_forward, self.sde_window_size
        if given == "auto":
            tokens_per_step = self.batch_size * self.num_branches * tokens_per_image
            is_fp32 = self.dtype == "float32" and not self.autocast
            least = min_forward_tokens(is_fp32, trains_adapters=self.lora_rank > 0)
            return balanced_steps(num_steps, tokens_per_step, num_weights, least)
        return num_steps if given == "all" else min(given, num_steps)

    @property
    def guidance(self) -> GuidanceConfig:
        """Guidance at all times, with `num_branches` branches."""
        from alphagrpo_ext.flow.guidance import GuidanceConfig

        return GuidanceConfig(
            text_scale=4.0 if self.num_branches > 1 else 1.0,
            image_scale=2.0 if self.num_branches > 2 else 1.0,
            interval=(0.0, 1.0),
        )
