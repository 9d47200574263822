# SPDX-License-Identifier: Apache-2.0

"""The contract of painters, which turn prompts and thoughts into images, their arguments, and the registry that names them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from alphagrpo_ext.ranges import AtLeastTwo, NonNegativeInt, PositiveFloat, PositiveInt, UnitFloat, check_ranges
from alphagrpo_ext.registry import Registry
from reward_models.files.image_decoding import ImageLimits


if TYPE_CHECKING:
    from transformers.processing_utils import ProcessorMixin

    from alphagrpo_ext.models.contract import UnifiedModel


PAINTERS = Registry(
    "painter",
    "alphagrpo_ext.painters",
    {
        "openai": "reward_models.painters.openai:OpenAIPainter",
        "policy": "reward_models.painters.policy:PolicyPainter",
    },
)

DEFAULT_PAINTER_MODEL = "bagel-shapes"


@dataclass(frozen=True)
class ImageRequest:
    """
    A request for one image.

    Args:
        prompt (`str`):
            Prompt of the user.
        thought (`str`, *optional*):
            Text that was written before the image: a plan, or the reflection on `image`. `None` paints without a thought. An
            empty string is a thought.
        image (`PIL.Image.Image`, *optional*):
            An image in RGB to refine. `None` paints a new image.
        seed (`int`, *optional*):
            Seed of the noise. `None` draws one.
    """

    prompt: str
    thought: str | None = None
    image: Image.Image | None = None
    seed: int | None = None


class UnpaintableError(ValueError):
    """Raised for a request that cannot be painted as it is, where a retry would not help."""


class PaintError(RuntimeError):
    """Raised when a painter failed. Another try may succeed."""


@dataclass
class PainterArguments:
    """
    Which painter to use, and its settings; the help text of a field describes it. The defaults suit the packaged model. For
    BAGEL set size, steps and guidance. Keys of endpoints come from the environment alone.
    """

    painter: str = field(
        default="none", metadata={"help": "Painter of images: 'none', 'policy', 'openai' or a registered one."}
    )
    painter_model: str = field(
        default=DEFAULT_PAINTER_MODEL,
        metadata={"help": "Name or folder of the policy, or name of the model at the endpoint."},
    )
    painter_dtype: str = field(default="float32", metadata={"help": "Data type of the policy's weights."})
    painter_batch_size: PositiveInt = field(default=16, metadata={"help": "Images per batch of the policy."})
    painter_base_url: str | None = field(
        default=None,
        metadata={"help": "OpenAI-compatible endpoint of the painter 'openai', e.g. http://localhost:8000/v1."},
    )
    painter_max_concurrency: PositiveInt = field(
        default=16, metadata={"help": "Largest number of images that the endpoint paints concurrently."}
    )
    painter_timeout: PositiveFloat = field(
        default=120.0, metadata={"help": "Seconds for one try of an image at the endpoint."}
    )
    painter_max_retries: NonNegativeInt = field(
        default=2, metadata={"help": "Further tries of an image at the endpoint."}
    )
    painter_max_answer_bytes: PositiveInt = field(
        default=2**25,
        metadata={
            "help": "Largest size of the endpoint's answer, which holds one image, before and after decompression."
        },
    )
    # A union with str, as in TRL's own dictionaries: the argument parser passes a string.
    painter_extra_body: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Further fields of a request to the painter's endpoint, as JSON. A field that is null is left out, e.g. "
            '{"response_format": null}.'
        },
    )
    image_height: PositiveInt = field(default=24, metadata={"help": "Height of painted images, in pixels."})
    image_width: PositiveInt = field(default=24, metadata={"help": "Width of painted images, in pixels."})
    num_timesteps: AtLeastTwo = field(
        default=11, metadata={"help": "Number of points of the policy's denoising schedule."}
    )
    timestep_shift: PositiveFloat = field(default=1.0, metadata={"help": "Shift of the schedule towards noise."})
    cfg_text_scale: float = field(default=1.0, metadata={"help": "Guidance scale of text; at most 1 is off."})
    cfg_img_scale: float | None = field(
        default=None,
        metadata={"help": "Guidance scale of images; at most 1 is off. By default 1.0, and 2.0 to refine an image."},
    )
    cfg_interval: list[UnitFloat] | None = field(
        default=None,
        metadata={
            "help": "Half-open interval (low, high] of guided times. By default 0.4 1.0, and 0.0 1.0 to refine an image."
        },
    )
    cfg_renorm_type: str | None = field(
        default=None,
        metadata={
            "help": "Renormalisation of the guidance: 'global', 'channel' or 'text_channel'. By default 'global', and "
            "'text_channel' to refine an image."
        },
    )
    task_settings: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Guidance and schedule of the policy's single tasks, 'reasoning_t2i' to paint and 'self_reflection' to "
            "refine, as JSON or a mapping in YAML. They win over the argument of that name, which holds for both."
        },
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        # Of images that an endpoint sends. The server has limits of its own.
        self.image_limits = ImageLimits()

    def make_painter(self) -> Painter | None:
        """
        Build the painter; `None` for `"none"`.

        Raises:
            `ValueError`: If there is no such painter, or an argument is out of range.
        """
        return None if self.painter == "none" else PAINTERS.get(self.painter).from_arguments(self)


class Painter(ABC):
    """
    Paints images. Register a painter with `@PAINTERS.register("name")`.

    A painter is called from one event loop, for several requests of a server concurrently. It must not block that loop.
    """

    max_calls: int = 1
    """Largest number of concurrent calls of [`paint`]. Further calls wait, and their images stay undecoded meanwhile."""

    policy: tuple[UnifiedModel, ProcessorMixin] | None = None
    """The model that paints and its processor, if they are in this process, so that a judge can use them too."""

    @classmethod
    @abstractmethod
    def from_arguments(cls, args: PainterArguments) -> Painter:
        """
        Build the painter.

        Args:
            args ([`PainterArguments`]): The arguments.

        Raises:
            `ValueError`: If an argument is missing or out of range. The message names the argument.
        """

    @abstractmethod
    async def paint(self, requests: Sequence[ImageRequest]) -> list[Image.Image]:
        """
        Paint one RGB image per request.

        Raises:
            [`UnpaintableError`]: If a request cannot be painted as it is. The message names its index.
            [`PaintError`]: If the painter failed.
        """

    async def aclose(self) -> None:
        """Release resources of the painter, e.g. threads and connections. The default does nothing."""
        return
