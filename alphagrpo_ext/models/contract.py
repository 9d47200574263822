# SPDX-License-Identifier: Apache-2.0

"""
The contract of a model family. Rollout, trainer, judges and recipes know a family by these five interfaces alone:

- [`Family`] finds and loads checkpoints and knows parameters by name. It is what [`FAMILIES`] registers.
- [`UnifiedModel`] samples with a cache and scores whole trajectories in one packed forward.
- [`Cache`] holds contexts that were read, for the samples that continue them.
- [`UnifiedProcessor`] turns texts and images into segments, and derives the context of every guidance branch.
- [`Guidance`] names the branches of classifier-free guidance and combines their velocities.

Conventions of a family are converted inside it. Outside, time `t` falls from 1 (noise) to 0 (image), a model predicts
`v = eps - x_0` with unit Gaussian noise `eps`, and latents are tokens of shape `(rows, tokens, channels)`. A family
whose noise has another scale divides its latents by that scale.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from PIL import Image
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.preflight import (
    check_finite_numbers,
    check_processor_file,
    check_saved_model,
    check_vocabulary,
    read_json,
)
from alphagrpo_ext.models.weight_files import summarize
from alphagrpo_ext.models.work import WorkCounter
from alphagrpo_ext.registry import Registry
from alphagrpo_ext.trajectory import ImageSegment, Segment, TextSegment, Trajectory


CONTEXT_GRADIENTS = ("exact", "detached")
"""Whether the loss of an image has a gradient through the context that the image is painted from."""

LORA_TARGETS = ("both", "generation", "understanding")
"""Presets of the modules that an adapter is put on."""

FAMILIES: Registry = Registry(
    "model family",
    "alphagrpo_ext.models",
    {
        "bagel": "alphagrpo_ext.models.bagel.family:BagelFamily",
        "cosmos3": "alphagrpo_ext.models.cosmos3.family:Cosmos3Family",
    },
)
"""Subclasses of [`Family`] by the `model_type` of their configurations."""


class Guidance(Protocol):
    """
    Classifier-free guidance of one family under given settings. It is immutable.

    A *branch* is a context that a velocity is predicted in. `"full"` is the whole context.
    """

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches that have an effect under these settings, `"full"` first."""

    def branches_at(self, t: float | torch.Tensor) -> tuple[str, ...]:
        """Names of the branches that are needed at time `t`: the first few of `branches`."""

    def combine(self, velocities: Mapping[str, torch.Tensor], mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Guided velocity.

        Args:
            velocities (`Mapping[str, torch.Tensor]`):
                A velocity `(..., tokens, channels)` for every branch that is needed. `"full"` alone is returned as it
                is.
            mask (`torch.Tensor` of shape `(..., tokens)`, *optional*):
                False on padding, which must not influence other tokens.

        Returns:
            `torch.Tensor` of shape `(..., tokens, channels)`: The guided velocity, fp32.
        """


class Cache(Protocol):
    """
    Contexts that a model has read, and what samples have added to them. A family decides what it stores.

    A cache is handed back to [`UnifiedModel.prefill`] as `past`, which may reuse any part of it.
    """

    @property
    def num_rows(self) -> int:
        """Number of samples."""

    def head(self, num_rows: int) -> Cache:
        """The first `num_rows` samples as views. They must be whole groups."""


@dataclass
class VelocityLayout:
    """
    Where the velocities of a packed forward belong. Row `i` of `PackedOutput.velocities` is the velocity of transition
    `step[i]` in the window of the sampled image `image[i]`, predicted in the guidance branch `branches[branch[i]]`.

    Args:
        image (`torch.Tensor` of shape `(copies,)`): Index into the sampled images with a window, in packing order.
        step (`torch.Tensor` of shape `(copies,)`): Index of the transition in that image's window.
        branch (`torch.Tensor` of shape `(copies,)`): Index into `branches`.
        mask (`torch.Tensor` of shape `(copies, max_tokens)`): False on padding.
        branches (`tuple[str, ...]`): Names of the family's guidance branches, `"full"` first.
    """

    image: torch.Tensor
    step: torch.Tensor
    branch: torch.Tensor
    mask: torch.Tensor
    branches: tuple[str, ...]


@dataclass
class PackedBatch:
    """
    Whole trajectories as tensors.

    Args:
        inputs (`dict[str, torch.Tensor]`):
            Keyword arguments of the model's forward.
        score_trajectory, score_column (`torch.Tensor` of shape `(scores,)`):
            Trajectory, and position among its sampled tokens, of every row of `PackedOutput.log_probs`.
        velocities (`VelocityLayout`, *optional*):
            `None` if no image of the batch has a window.
        image_trajectory (`torch.Tensor` of shape `(images,)`):
            Trajectory of every sampled image with a window.
        guidance ([`Guidance`] or `tuple[Guidance, ...]`):
            Combines the velocities of the branches: of all images, or one for every image of `image_trajectory`.
    """

    inputs: dict[str, torch.Tensor]
    score_trajectory: torch.Tensor
    score_column: torch.Tensor
    velocities: VelocityLayout | None
    image_trajectory: torch.Tensor
    guidance: Guidance | tuple[Guidance, ...]


@dataclass
class PackedParts:
    """
    Whole trajectories as tensors for one forward over their contexts, and several forwards over their noised latents.

    Args:
        contexts ([`PackedBatch`]): The contexts of all guidance branches, with the sampled tokens.
        copies (`list[PackedBatch]`):
            The noised latents of a few steps each, which read the states of `contexts`. They have no sampled tokens, and
            steps of `velocities` are counted from the first step of the part.
    """

    contexts: PackedBatch
    copies: list[PackedBatch]


class ReadContexts:
    """
    Contexts after a forward of their own, for forwards over noised latents. It is no dataclass, so that FSDP leaves the
    tensors in it alone: it takes the gradients of a forward's arguments for the end of the backward.

    Args:
        log_probs, entropies (`torch.Tensor` of shape `(scores,)`): Scores of every sampled token, fp32.
        states (`Sequence[torch.Tensor]`):
            What noised latents read of the contexts, such as keys and values, in the order and shapes of the family.
    """

    def __init__(self, log_probs: torch.Tensor, entropies: torch.Tensor, states: Sequence[torch.Tensor]) -> None:
        self.log_probs = log_probs
        self.entropies = entropies
        self.states = states


@dataclass
class PackedOutput:
    """
    Result of a packed forward.

    Args:
        log_probs, entropies (`torch.Tensor` of shape `(scores,)`): Scores of every sampled token, fp32.
        velocities (`torch.Tensor` of shape `(copies, max_tokens, channels)`): Velocities of every noised latent, fp32.
        states (`list[torch.Tensor]`, *optional*):
            What noised latents read of their contexts; see [`ReadContexts`]. Only of a forward with `keep_contexts`.
    """

    log_probs: torch.Tensor
    entropies: torch.Tensor
    velocities: torch.Tensor | None
    states: list[torch.Tensor] | None = None


@dataclass(frozen=True)
class SampledText:
    """
    Texts that were sampled, one per row.

    Args:
        token_ids (`list[list[int]]`): Sampled ids, including the end token where it was sampled.
        log_probs (`list[list[float]]`):
            Log-probability of each id under the temperature alone, before top-p and top-k.
        ended (`list[bool]`): Whether each text ended by itself.
    """

    token_ids: list[list[int]]
    log_probs: list[list[float]]
    ended: list[bool]

    @classmethod
    def from_steps(
        cls,
        sampled: Sequence[torch.Tensor],
        log_probs: Sequence[torch.Tensor],
        counted: Sequence[torch.Tensor],
        eos: int,
    ) -> SampledText:
        """
        Texts from what each step sampled.

        Args:
            sampled, log_probs, counted (`Sequence[torch.Tensor]` of shape `(batch,)`, one per step):
                Ids, their log-probabilities, and whether each belongs to its text. A text is the beginning of its row.
            eos (`int`): The end token.
        """
        lengths = torch.stack(list(counted), dim=1).sum(dim=1).tolist()
        rows, values = (torch.stack(list(steps), dim=1).tolist() for steps in (sampled, log_probs))
        token_ids = [row[:n] for row, n in zip(rows, lengths, strict=True)]
        return cls(
            token_ids=token_ids,
            log_probs=[row[:n] for row, n in zip(values, lengths, strict=True)],
            ended=[bool(ids) and ids[-1] == eos for ids in token_ids],
        )


class UnifiedModel(ABC):
    """
    An AR-diffusion unified multimodal model. A concrete model is a [`~transformers.PreTrainedModel`] as well, and its
    configuration has an `image_token_id`, which TRL keeps a text generator from sampling.

    `pack` and `forward` score whole trajectories with gradient. The other methods sample with a cache. Both paths must
    give the same log-probabilities and velocities for the same weights.
    """

    latent_downsample: int
    """Pixels per latent token, along one side."""
    latent_channels: int
    """Values of one latent token."""
    max_latent_size: int
    """Largest number of latent tokens along one side of an image."""
    max_positions: int
    """Largest number of positions in a sequence."""
    branches: ClassVar[tuple[str, ...]]
    """Names of all guidance branches of the family, `"full"` first."""
    generation_config: GenerationConfig
    """TRL writes the token ids of the tokenizer into it."""
    work: WorkCounter | None = None
    """Where the model counts the tokens that it computes; `None` does not count."""

    @property
    def family(self) -> Family:
        """The family of this model, found by the `model_type` of its configuration."""
        return FAMILIES.get(self.config.model_type)()

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the weights."""

    @property
    def num_generation_weights(self) -> int:
        """Number of the weights that only the generation of images uses. Each is multiplied with every noised token."""
        family = self.family
        return sum(p.numel() for name, p in self.named_parameters() if family.is_generation_parameter(name))

    @abstractmethod
    def guidance(self, settings: GuidanceConfig) -> Guidance:
        """
        The family's guidance under a user's settings. A `text_scale` of at most 1 switches all guidance off.

        Raises:
            `ValueError`: If the family does not support a setting.
        """

    def latent_grid(self, height: int, width: int) -> tuple[int, int]:
        """
        Rows and columns of latent tokens of an image of this size in pixels.

        Raises:
            `ValueError`: If the model cannot paint this size.
        """
        stride = self.latent_downsample
        for name, side in (("height", height), ("width", width)):
            if side <= 0 or side % stride:
                raise ValueError(f"{name}={side} is no positive multiple of the model's {stride} pixels")
        grid = (height // stride, width // stride)
        if max(grid) > self.max_latent_size:
            largest = self.max_latent_size * stride
            raise ValueError(
                f"an image of {height} x {width} pixels is too large: the model paints at most {largest} x {largest} pixels"
            )
        return grid

    @abstractmethod
    def num_positions(self, segments: Sequence[Segment]) -> int:
        """
        Upper bound of the positions that segments take, including everything that the family puts around them. Of an
        image only the grid is read.
        """

    @abstractmethod
    def text_slots(self, max_new_tokens: int) -> int:
        """Cache slots that one sampled text of at most `max_new_tokens` tokens takes, delimiters included."""

    @abstractmethod
    def image_slots(self, grid: tuple[int, int]) -> int:
        """Cache slots that one image of `grid` rows and columns takes while it is painted."""

    def denoising_tokens(self, cache: Cache, grid: tuple[int, int]) -> int:
        """Tokens that `predict_velocity` runs the network on for each image, for counts of work."""
        return self.image_slots(grid)

    def vision_size(self, height: int, width: int) -> tuple[int, int] | None:
        """
        Height and width in pixels at which the vision tower reads an image of this size. `None` without a vision tower.
        """
        return None

    @abstractmethod
    def pack(
        self, trajectories: Sequence[Trajectory], guidance: GuidanceConfig | Sequence[GuidanceConfig]
    ) -> PackedBatch:
        """
        Tensors for one forward over whole trajectories, in every guidance branch that is needed under the settings.

        Args:
            trajectories (`Sequence[Trajectory]`): The trajectories.
            guidance ([`GuidanceConfig`] or `Sequence[GuidanceConfig]`):
                Settings of all trajectories, or of each of them if their tasks have settings of their own.
        """

    def pack_parts(
        self,
        trajectories: Sequence[Trajectory],
        guidance: GuidanceConfig | Sequence[GuidanceConfig],
        steps_per_part: int,
    ) -> PackedParts | None:
        """
        Tensors as from `pack`, for a forward over contexts alone and forwards over the noised latents of at most
        `steps_per_part` steps each. `None` if the family has no such forwards; the trainer then runs contexts again with
        every part.

        Args:
            trajectories (`Sequence[Trajectory]`): The trajectories. All windows have the same number of steps.
            guidance ([`GuidanceConfig`] or `Sequence[GuidanceConfig]`): As in `pack`.
            steps_per_part (`int`): Most steps of a window in one part.
        """
        return None

    def with_all_parts(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Inputs of `forward` that make it run every part of the model without a change of its outputs. Processes with
        sharded parameters wait for each other at every part.
        """
        return inputs

    @abstractmethod
    def forward(
        self,
        temperature: float | torch.Tensor = 1.0,
        context_gradient: Literal["exact", "detached"] = "exact",
        **inputs: Any,
    ) -> PackedOutput:
        """
        Log-probabilities and entropies of sampled tokens, and velocities of noised latents, in one call.

        A family with `pack_parts` has two more arguments. `keep_contexts=True` goes with `PackedParts.contexts`: the
        output has `states`. `contexts`, a [`ReadContexts`] of these states or others with the same values, goes with the
        batches of `PackedParts.copies`: the forward runs noised latents alone, and hands on the scores of `contexts`, so
        that DDP finds all trained parameters from its output.

        Args:
            temperature (`float` or `torch.Tensor` of shape `(scores,)`, *optional*, defaults to `1.0`):
                Temperature at which all tokens, or each of them, were sampled.
            context_gradient (`str`, *optional*, defaults to `"exact"`):
                One of [`CONTEXT_GRADIENTS`]. With `"detached"`, velocities have the same values and no gradient
                through their context.
            inputs: `PackedBatch.inputs` on the model's device, and the two arguments above.
        """

    @abstractmethod
    def prefill(
        self, contexts: Sequence[Sequence[Segment]], group_size: int = 1, capacity: int = 0, past: Any | None = None
    ) -> Cache:
        """
        Read contexts.

        Args:
            contexts (`Sequence[Sequence[Segment]]`): What the samples of each group see. A context may be empty.
            group_size (`int`, *optional*, defaults to `1`): Consecutive samples that share each context.
            capacity (`int`, *optional*, defaults to `0`): Slots that each sample can fill afterwards.
            past ([`Cache`], *optional*):
                Cache of the previous turn. It may hold parts of the contexts, and is used up.

        Returns:
            [`Cache`] with `len(contexts) * group_size` rows.
        """

    @abstractmethod
    def sample_text(
        self, cache: Any, uniforms: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
    ) -> SampledText:
        """
        Sample one text for each of the first rows of a cache, and leave it there.

        Args:
            cache ([`Cache`]): Its first `batch` rows are continued. Rows after them, of other guidance branches, stay.
            uniforms (`torch.Tensor` of shape `(batch, max_new_tokens)`): Random numbers in [0, 1), one per token.
            temperature (`float`, *optional*, defaults to `1.0`): 0 takes the likeliest token.
            top_k (`int`, *optional*, defaults to `0`): Number of likeliest tokens to draw from; 0 means all.
            top_p (`float`, *optional*, defaults to `1.0`): Share of the likeliest tokens to draw from.
        """

    @abstractmethod
    def predict_velocity(
        self, cache: Any, latents: torch.Tensor, grid: tuple[int, int], timestep: torch.Tensor
    ) -> torch.Tensor:
        """
        Velocity of noised images, given each row's context in a cache, which is left as it is.

        Args:
            cache ([`Cache`]):
                It may have fewer rows than `latents`. Each row then serves the same number of consecutive images.
            latents (`torch.Tensor` of shape `(rows, tokens, channels)`): Noised images.
            grid (`tuple[int, int]`): Their rows and columns of tokens.
            timestep (`torch.Tensor` with one element): Time in [0, 1] of all rows.

        Returns:
            `torch.Tensor` of shape `(rows, tokens, channels)`.
        """

    @abstractmethod
    def answer_logits(self, pixel_values: torch.Tensor, questions: Sequence[TextSegment]) -> torch.Tensor:
        """
        Logits of the first token of an answer to each question about one image, which is read once.

        Args:
            pixel_values (`torch.Tensor` of shape `(3, height, width)`):
                Result of [`UnifiedProcessor.question_pixels`].
            questions (`Sequence[TextSegment]`): Questions about the image.

        Returns:
            `torch.Tensor` of shape `(questions, vocabulary)`.
        """

    @torch.no_grad()
    def text_log_probs(
        self, contexts: Sequence[Sequence[Segment]], texts: Sequence[TextSegment]
    ) -> list[torch.Tensor]:
        """
        Log-probabilities of given texts as answers without a thought, e.g. of a prompt after an image. They are those of the
        tokens alone, because the logits of whole texts would fill the memory. The work is not counted.

        The default takes them from a packed forward. A family whose answers begin in another way than what its policy writes
        in a rollout overrides it, so that the first token is predicted from the same place as in `answer_logits`.

        Args:
            contexts (`Sequence[Sequence[Segment]]`):
                What each text follows, such as an image and a request. An image without latents, `(0, channels)`, is looked at
                through the vision tower alone.
            texts (`Sequence[TextSegment]`): One text per context. Delimiters and end tokens have no values.

        Returns:
            `list[torch.Tensor]`: For every text a tensor of shape `(tokens,)`, in nats, fp32. It does not depend on the other
            texts of the batch.
        """
        answers = [TextSegment(list(text.content_ids), sampled=True, ended=False) for text in texts]
        trajectories = [Trajectory([*context, answer]) for context, answer in zip(contexts, answers, strict=True)]
        batch = self.pack(trajectories, GuidanceConfig(text_scale=1.0))
        inputs = {name: tensor.to(self.device) for name, tensor in batch.inputs.items()}
        counter, self.work = self.work, None
        try:
            log_probs = self(**inputs).log_probs
        finally:
            self.work = counter
        lengths = [len(answer.token_ids) for answer in answers]
        columns = log_probs.new_zeros(len(answers), max(lengths, default=0))
        places = (batch.score_trajectory.to(self.device), batch.score_column.to(self.device))
        return [row[:length] for row, length in zip(columns.index_put(places, log_probs), lengths, strict=True)]

    @abstractmethod
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Encode pixels `(batch, 3, height, width)` in [-1, 1] to clean latents `(batch, tokens, channels)`, fp32."""

    @abstractmethod
    def decode_latents(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Decode clean latents `(batch, tokens, channels)` to pixels `(batch, 3, height, width)` in [-1, 1]."""


class UnifiedProcessor(ABC):
    """
    Turns texts and images into segments. A concrete processor is a [`~transformers.processing_utils.ProcessorMixin`]
    as well.

    Sizes of images are `(height, width)` in pixels.
    """

    tokenizer: PreTrainedTokenizerBase
    """The tokenizer. It has an `eos_token_id`."""
    thought_contexts: ClassVar[tuple[str, ...]] = ("in_place",)
    """What `thought_context` may be."""
    thought_context: str = "in_place"
    """
    What an image is painted from after a thought: `"in_place"`, the conversation as it stands, which the thought ends, or
    `"rewrite"`, the context of its own that [`UnifiedProcessor.painting_context`] makes of the thought.
    """
    keep_verdict: str = "<done/>"
    """What a reflection says where the image is right, so that nothing is painted."""
    repaint_verdict: str = "<edit/>"
    """What it says where the image is to be painted anew."""
    verdict_request: str = (
        "\nAfter the thought, write <done/> if nothing must be changed, so that the image is kept, or <edit/> if the corrected "
        "image is to be painted."
    )
    """What the request adds where a reflection may end without painting, so that it has one of the two verdicts."""

    number_ranges: ClassVar[Mapping[str, str]] = {}
    """Intervals of the whole numbers among its settings, by name, as [`~alphagrpo_ext.ranges.check_number`] reads them."""

    @abstractmethod
    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids."""

    def decode_sampled(self, texts: Sequence[TextSegment]) -> str:
        """
        What the policy wrote, as rewards and people read it: without end tokens, and with what the family's template wrote
        for the policy, such as an opening `<think>`.
        """
        return self.decode([token_id for text in texts for token_id in text.content_ids])

    @abstractmethod
    def text_segment(self, text: str) -> TextSegment:
        """A given text, without the delimiters that the model puts around it."""

    @abstractmethod
    def system_segments(self, think: bool, edits: bool) -> list[TextSegment]:
        """
        System prompt that a context begins with.

        Args:
            think (`bool`): Whether the policy writes a thought before it paints.
            edits (`bool`): Whether the request is about a given image.
        """

    def answering_segments(self, think: bool) -> list[TextSegment]:
        """
        System prompt of a question about an image, which is answered with a text alone. The default has none.

        Args:
            think (`bool`): Whether the policy writes a thought before it answers.
        """
        return []

    def request_segment(self, text: str, size: tuple[int, int]) -> TextSegment:
        """A user's request for an image of the given size."""
        return self.text_segment(text)

    @abstractmethod
    def reflection_request(self, prompt: str, may_stop: bool = False) -> str:
        """
        Text of the request to refine an image that was made for `prompt`. With `may_stop` it asks for one of the two verdicts.
        """

    def is_done(self, text: str) -> bool:
        """Whether the last verdict in a reflection is `keep_verdict`. A text without a verdict is not done."""
        return text.rfind(self.keep_verdict) > text.rfind(self.repaint_verdict)

    @abstractmethod
    def resize_image(self, image: Image.Image) -> Image.Image:
        """The resize that every input image goes through first, to a size that the model can encode."""

    @abstractmethod
    def image_segment(self, image: Image.Image, model: Any) -> ImageSegment:
        """An image of any size and mode as context. `model`, a [`UnifiedModel`], encodes it."""

    def look(self, image: Image.Image) -> torch.Tensor | None:
        """
        Pixels `(3, height, width)` of an image as the model's vision tower reads them. `None` for a family that reads
        an image by its latents alone.
        """
        return None

    @abstractmethod
    def question_pixels(self, image: Image.Image) -> torch.Tensor:
        """Pixels `(3, height, width)` of an image as [`UnifiedModel.answer_logits`] reads them."""

    def looked_at(self, image: Image.Image, model: Any) -> ImageSegment:
        """
        An image as context that is seen through the vision tower alone, as in a question about it. `model` is the
        [`UnifiedModel`] that reads it.

        Raises:
            `ValueError`: If the family has no vision tower.
        """
        pixels = self.look(image)
        if pixels is None:
            raise ValueError(f"{type(model).__name__} has no vision tower: it reads images by their latents alone")
        return ImageSegment(torch.empty(0, model.latent_channels), (0, 0), pixels, image=image)

    @abstractmethod
    def branch_context(self, branch: str, context: Sequence[Segment], size: tuple[int, int]) -> list[Segment]:
        """
        The context of a guidance branch.

        Args:
            branch (`str`): Name of a branch; `"full"` returns `context`.
            context (`Sequence[Segment]`):
                All that the policy sees when it starts to act: what was given, and what it sampled in earlier turns.
            size (`tuple[int, int]`): Size of the image that is painted.
        """

    def with_thought_context(self, name: str | None) -> Self:
        """
        A copy of the processor with another `thought_context`, or the processor itself for `None` and for what it has.

        Raises:
            `ValueError`: If the family does not have it.
        """
        if name is None or name == self.thought_context:
            return self
        if name not in self.thought_contexts:
            raise ValueError(
                f"thought_context={name!r} is not one of those of {type(self).__name__}: {', '.join(self.thought_contexts)}"
            )
        processor = copy.copy(self)
        processor.thought_context = name
        return processor

    def painting_context(
        self, context: Sequence[Segment], thought: TextSegment, size: tuple[int, int]
    ) -> list[Segment]:
        """
        The context that an image is painted from after a thought, where `thought_context` is `"rewrite"`. It holds the
        sampled ids themselves, as a given text.

        Args:
            context (`Sequence[Segment]`): All that the policy saw when it started to act.
            thought (`TextSegment`): What it sampled then.
            size (`tuple[int, int]`): Size of the image that is painted.

        Raises:
            `ValueError`: If the family paints in place alone.
        """
        raise ValueError(f"{type(self).__name__} paints in place alone: thought_context must be 'in_place'")


class Family(ABC):
    """
    A model family. Register a subclass with `@FAMILIES.register(model_type)`, or by an entry point of that name in the
    group `alphagrpo_ext.models`. A family whose configurations have several `model_type`s is registered under each.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    """Model, a [`UnifiedModel`] with a `config_class`."""
    processor_class: ClassVar[type[ProcessorMixin]]
    """Processor, a [`UnifiedProcessor`]."""
    lora_presets: ClassVar[Mapping[str, str]]
    """
    PEFT's `target_modules` for some of [`LORA_TARGETS`], at least `"both"`: regular expressions that match whole
    names.
    """
    frozen_modules: ClassVar[tuple[str, ...]] = ()
    """Names of the model's modules that are never trained, e.g. an autoencoder."""
    vision_modules: ClassVar[tuple[str, ...]] = ()
    """Names of the model's modules that only read images: vision tower and connector."""
    saved_files: ClassVar[tuple[str, ...]] = (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
    )
    """Files of a folder that `save_pretrained` of model and processor wrote."""
    hub_marker: ClassVar[str | None] = None
    """A file that a repository on the Hub has if it is in the released layout; see [`Family.matches`]."""
    hub_files: ClassVar[tuple[str, ...]] = ()
    """Files of such a repository that are downloaded."""
    sampling_settings: ClassVar[Mapping[str, Any]] = {}
    """Settings of [`~alphagrpo_ext.rollout.pipeline.UnifiedPipeline`] that suit released checkpoints."""
    released_sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """
    Arguments of the configuration by the name of each released model, so that its sizes are known without its files. Token ids may
    be stand-ins.
    """
    vision_inputs: ClassVar[tuple[str, ...]] = ()
    """
    Names of the inputs of a packed forward that only the vision modules read. Without them it runs over as many tokens, and
    those of images have other embeddings.
    """
    number_inputs: ClassVar[tuple[str, ...]] = ()
    """Names of the inputs of a packed forward whose values it reads as numbers of Python."""

    def matches(self, folder: Path) -> bool:
        """Whether a folder is in a layout of this family other than that of `save_pretrained`."""
        return False

    def load(
        self, path: str, dtype: torch.dtype | str, revision: str | None = None, **kwargs: Any
    ) -> tuple[PreTrainedModel, ProcessorMixin]:
        """
        Load a model and its processor.

        Args:
            path (`str`): A folder, or the id of a repository on the Hub that is not in the released layout.
            dtype (`torch.dtype` or `"auto"`): Data type of the weights, except those that stay fp32.
            revision (`str`, *optional*): Branch, tag or commit of a repository on the Hub.
            kwargs: Passed to `from_pretrained`, e.g. `attn_implementation`.

        Raises:
            `ValueError`: If a weight is missing, left over, of another shape or type, NaN or infinite, or if the configuration has
                an impossible value.
        """
        if Path(path).is_dir():
            self.check_config(read_json(Path(path) / "config.json"), Path(path) / "config.json")
            check_saved_model(Path(path), self.model_class)
        model, info = self.model_class.from_pretrained(
            path, dtype=dtype, revision=revision, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
        problems = [f"it lacks {name}" for name in sorted(info["missing_keys"])]
        problems += [f"it has {name}, which the model does not have" for name in sorted(info["unexpected_keys"])]
        problems += [
            f"{name} has shape {tuple(actual)} instead of {tuple(expected)}"
            for name, actual, expected in sorted(info["mismatched_keys"])
        ]
        if problems:
            raise ValueError(f"the weights in {path} do not fit its configuration: {summarize(problems)}")
        processor = self.load_processor(path, revision)
        check_vocabulary(processor.tokenizer, model.config.get_text_config().vocab_size, path)
        return model, processor

    def save_released(self, model: PreTrainedModel, processor: ProcessorMixin, folder: str | Path) -> None:
        """
        Write a model and its processor in the layout that the family was released in.

        Raises:
            `ValueError`: If the family has no layout other than that of `save_pretrained`.
        """
        raise ValueError(f"{type(self).__name__} has no released layout: use save_pretrained")

    def check_config(self, values: Mapping[str, Any], source: Path) -> None:
        """
        Check the values of a `config.json` before a configuration is made from them. A family with sizes or scales of its own adds
        their ranges.

        Raises:
            `ValueError`: If a value is impossible; the message names field and file.
        """
        check_finite_numbers(values, source)

    def load_config(self, path: str, revision: str | None = None) -> PreTrainedConfig:
        """
        Load the configuration alone, from a `path` as for [`Family.load`]. No weight is read.

        Raises:
            `ValueError`: If it has an impossible value.
        """
        if Path(path).is_dir():
            self.check_config(read_json(Path(path) / "config.json"), Path(path) / "config.json")
        return self.model_class.config_class.from_pretrained(path, revision=revision)

    def load_processor(self, path: str, revision: str | None = None) -> ProcessorMixin:
        """
        Load the processor alone, from a `path` as for [`Family.load`].

        Raises:
            `ValueError`: If a number of its file is out of its range; the message names field and file.
        """
        check_processor_file(Path(path) / "processor_config.json", self.processor_class.number_ranges)
        return self.processor_class.from_pretrained(path, revision=revision)

    def lora_target_modules(self, preset: str) -> str:
        """
        PEFT's `target_modules` of a preset.

        Raises:
            `ValueError`: If the family does not have it.
        """
        if preset not in self.lora_presets:
            raise ValueError(
                f"{type(self).__name__} has no LoRA preset {preset!r}, available: {', '.join(self.lora_presets)}"
            )
        return self.lora_presets[preset]

    @abstractmethod
    def is_generation_parameter(self, name: str) -> bool:
        """Whether only the generation of images uses a parameter. Wrappers may have put a prefix before its name."""

    def keeps_fp32(self, name: str) -> bool:
        """Whether a parameter stays fp32 in a model of any data type."""
        return False

    def sharded_layers(self, model: Any) -> Sequence[torch.nn.Module]:
        """Modules of a model whose weights are gathered one module at a time when parameters are sharded."""
        return ()

    def mask_sizes(self, inputs: Mapping[str, torch.Tensor]) -> Sequence[int]:
        """
        Number of elements of each mask of pairs of tokens that a packed forward makes with `"sdpa"` and not with
        `"flex_attention"`. A family without the latter has none.
        """
        return ()

    def freeze_vision_tower(self, model: Any) -> None:
        """Exclude the modules that only read images from training. A family without a vision tower does nothing."""
        for name in self.vision_modules:
            model.get_submodule(name).requires_grad_(False)
