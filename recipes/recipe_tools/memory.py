# SPDX-License-Identifier: Apache-2.0

"""How much memory an update takes, before there is a machine to try it on.

Weights, gradients and optimizer states are counted. What the forward and backward need is found by running the model's
own code over tensors that have a size and no contents, and adding up what is alive at each operation; so adapters,
gradient checkpointing, guidance branches and the chunked head are in it as they are in training.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.flow.timesteps import flow_timesteps
from alphagrpo_ext.models.bagel.guidance import BRANCHES
from alphagrpo_ext.models.contract import FAMILIES, LORA_TARGETS, UnifiedModel
from alphagrpo_ext.trajectory import DenoisingWindow, ImageSegment, TextSegment, Trajectory


DTYPES = ("float32", "bfloat16", "float16")
ATTENTION_IMPLEMENTATIONS = ("sdpa", "flex_attention", "eager")


@dataclass(frozen=True)
class MemorySettings:
    """
    What an update does. The defaults are those of the paper's configuration for reasoning text-to-image.

    Args:
        lora_rank (`int`, *optional*, defaults to `32`):
            Rank of the adapter; `None` trains all weights.
        lora_targets (`str`, *optional*, defaults to `"both"`):
            Which expert it is put on; see [`~alphagrpo_ext.trainer.AlphaGRPOConfig`].
        batch_size (`int`, *optional*, defaults to `14`):
            Trajectories a process trains on at once: `per_device_train_batch_size`.
        prompt_tokens, thought_tokens (`int`, *optional*, defaults to `128` and `512`):
            Length of given and of sampled text, in tokens.
        context_images (`int`, *optional*, defaults to `0`):
            Images that the policy is given, of the size that it paints: 1 in self-reflection.
        height, width (`int`, *optional*, defaults to `512`):
            Size of images, in pixels.
        sde_window_size (`int`, *optional*, defaults to `10`):
            Trained steps K of an image.
        image_steps_per_forward (`int`, *optional*):
            Most trained steps in one forward; `None` takes all.
        num_branches (`int`, *optional*, defaults to `2`):
            Guidance branches, 1 to 3. All trained steps are taken to be guided, which is the most there can be.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`):
            Whether the backward computes each layer anew.
        attn_implementation (`str`, *optional*, defaults to `"flex_attention"`):
            `"sdpa"` and `"eager"` store masks of pairs of tokens, and `"eager"` their scores as well.
        dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Of the weights. Adapters are fp32.
        autocast (`bool`, *optional*, defaults to `True`):
            Whether operations run in bf16 whatever the type of the weights, as under `--bf16`.
        with_reference (`bool`, *optional*, defaults to `False`):
            Whether a copy of all weights stays for a KL; an adapter needs none.
        num_shards (`int`, *optional*, defaults to `1`):
            Processes that weights, gradients and optimizer states are spread over, as by FSDP2 and ZeRO-3. Under `autocast`
            these keep trained weights, their gradients and moments in fp32, whatever `dtype` is.
    """

    lora_rank: int | None = 32
    lora_targets: str = "both"
    batch_size: int = 14
    prompt_tokens: int = 128
    thought_tokens: int = 512
    context_images: int = 0
    height: int = 512
    width: int = 512
    sde_window_size: int = 10
    image_steps_per_forward: int | None = None
    num_branches: int = 2
    gradient_checkpointing: bool = True
    attn_implementation: str = "flex_attention"
    dtype: str = "bfloat16"
    autocast: bool = True
    with_reference: bool = False
    num_shards: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "prompt_tokens", "sde_window_size", "num_shards", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}")
        for name in ("lora_rank", "image_steps_per_forward"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 or left out, but is {getattr(self, name)}")
        if not 1 <= self.num_branches <= len(BRANCHES):
            raise ValueError(f"num_branches must be 1 to {len(BRANCHES)}, but is {self.num_branches}")
        for name, choices in (
            ("attn_implementation", ATTENTION_IMPLEMENTATIONS),
            ("lora_targets", LORA_TARGETS),
            ("dtype", DTYPES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, but is {getattr(self, name)!r}")

    @property
    def steps_per_forward(self) -> int:
        """Trained steps in the largest forward."""
        return min(self.image_steps_per_forward or self.sde_window_size, self.sde_window_size)

    @property
    def guidance(self) -> GuidanceConfig:
        """Guidance at all times, in `num_branches` branches."""
        return GuidanceConfig(
            text_scale=4.0 if self.num_branches > 1 else 1.0,
            image_scale=2.0 if self.num_branches > 2 else 1.0,
            interval=(0.0, 1.0),
        )


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Bytes of one process at the peak of an update.

    Args:
        weights (`int`): Of the model and its adapter.
        gathered (`int`): Weights of other shards that are there for the time of their use; 0 without shards.
        reference (`int`): Of the reference model.
        gradients (`int`): Of what is trained.
        optimizer (`int`): AdamW's two moments.
        activations (`int`): The most that forward and backward have alive beside these.
    """

    weights: int
    gathered: int
    reference: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(getattr(self, part.name) for part in fields(self))


class LiveBytes(TorchDispatchMode):
    """
    Adds up the storages that operations make and that are still in use.

    Args:
        known (`Iterable[torch.Tensor]`): Tensors that are there already and do not count.
        ignored_sizes (`Iterable[int]`): Storages of these sizes, in bytes, do not count.
    """

    def __init__(self, known: Iterable[torch.Tensor], ignored_sizes: Iterable[int] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.ignored_sizes = set(ignored_sizes)
        self._alive = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._alive:
            return
        self._alive.add(storage)
        size = storage.nbytes()
        if size in self.ignored_sizes:
            return
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size


def example_trajectories(model: UnifiedModel, settings: MemorySettings) -> list[Trajectory]:
    """Trajectories of the size that `settings` describes, with the trained steps of the largest forward."""
    grid = (settings.height // model.latent_downsample, settings.width // model.latent_downsample)
    tokens, num_steps = grid[0] * grid[1], settings.steps_per_forward
    window = DenoisingWindow(
        latents=torch.zeros(num_steps + 1, tokens, model.latent_channels),
        timesteps=flow_timesteps(settings.sde_window_size + 2, 1.0)[: num_steps + 1],
        start=0,
        log_probs=torch.zeros(num_steps),
    )
    given: list[Any] = []
    for _ in range(settings.context_images):
        given.append(ImageSegment(torch.zeros(tokens, model.latent_channels), grid))
        # The vision tower is frozen and keeps nothing: what the decoder reads of it is as long as a text.
        given.append(TextSegment([0] * model.vision_tokens(settings.height, settings.width)))
    given.append(TextSegment([0] * settings.prompt_tokens))
    thought = (
        [TextSegment([0] * settings.thought_tokens, sampled=True, ended=False)] if settings.thought_tokens else []
    )
    image = ImageSegment(
        torch.zeros(tokens, model.latent_channels),
        grid,
        sampled=True,
        window=window,
        guidance_contexts={BRANCHES[1]: given[:-1], BRANCHES[2]: given[-1:]},
    )
    return [Trajectory([*given, *thought, image]) for _ in range(settings.batch_size)]


def build_policy(config: PreTrainedConfig, settings: MemorySettings) -> tuple[UnifiedModel, torch.nn.Module]:
    """The model that `config` describes as training sets it up: types, frozen parts, adapter, checkpointing."""
    # Flex attention keeps what SDPA keeps, but for the mask.
    name = "eager" if settings.attn_implementation == "eager" else "sdpa"
    config = type(config).from_dict(config.to_dict())
    config._attn_implementation = name
    family = FAMILIES.get(config.model_type)()
    model = family.model_class(config)
    dtype = getattr(torch, settings.dtype)
    keep = family.keeps_fp32
    for parameter_name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if keep(parameter_name) else dtype)
    family.freeze_vision_tower(model)
    policy: torch.nn.Module = model
    if settings.lora_rank is not None:
        targets = family.lora_target_modules(settings.lora_targets)
        policy = get_peft_model(model, LoraConfig(r=settings.lora_rank, target_modules=targets))
    if settings.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        if settings.lora_rank is not None:
            policy.enable_input_require_grads()
    return model, policy.train()


def _leave_meta(module: torch.nn.Module) -> None:
    """Put weights and buffers on the CPU, where mixed precision applies; in a fake mode they still have no contents."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                part._parameters[name] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _mask_sizes(inputs: dict[str, torch.Tensor], dtypes: Iterable[torch.dtype]) -> list[int]:
    sizes = []
    for rows, context_und, context_gen, copies, copy_latents in inputs["buckets"].tolist():
        context = context_und + context_gen
        pairs = (rows * context * context, rows * copies * (copy_latents + 2) * context)
        sizes += [num_pairs * dtype.itemsize for num_pairs in pairs for dtype in (torch.bool, *dtypes)]
    return sizes


def estimate_memory(config: PreTrainedConfig, settings: MemorySettings) -> MemoryEstimate:
    """
    Memory of one process that trains a model.

    Rollouts need less and are not looked at, nor are what the process itself takes, communication buffers and what an
    allocator loses to fragments: leave a tenth of a device free.

    Args:
        config (`PreTrainedConfig`): Of a registered model family, e.g. a [`BagelConfig`].
        settings ([`MemorySettings`]): What an update does.
    """
    with torch.device("meta"):
        model, policy = build_policy(config, settings)
    batch = model.pack(example_trajectories(model, settings), settings.guidance)
    fake = FakeTensorMode()
    with fake:
        _leave_meta(policy)
        # Sizes are read, and not computed with.
        inputs = {n: t if n == "buckets" else fake.from_tensor(t) for n, t in batch.inputs.items()}
        parameters = list(policy.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in trained:
            # Gradients of the micro-batch before are there when the next one begins.
            parameter.grad = torch.zeros_like(parameter)
        known = [*parameters, *policy.buffers(), *inputs.values(), *(parameter.grad for parameter in trained)]
        dtype = torch.bfloat16 if settings.autocast else getattr(torch, settings.dtype)
        ignored = _mask_sizes(batch.inputs, {dtype}) if settings.attn_implementation == "flex_attention" else []
        with LiveBytes(known, ignored) as tracker:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.autocast):
                output = policy(**inputs)
            loss = output.velocities.square().sum()
            if settings.thought_tokens:
                loss = loss + output.log_probs.sum()
            loss.backward()
        peak = tracker.peak
        layers = [_num_bytes(layer.parameters()) for layer in model.family.sharded_layers(model)]
    computed, shards = _num_bytes(parameters), settings.num_shards
    root = computed - sum(layers)
    in_training = _num_bytes(trained)
    if shards > 1 and settings.autocast:
        in_training = 4 * sum(parameter.numel() for parameter in trained)
    return MemoryEstimate(
        weights=(computed - _num_bytes(trained) + in_training) // shards,
        # The embeddings and the head stay for all of the forward; of the layers, one is used while the next one comes.
        gathered=(root + 2 * max(layers)) * (shards - 1) // shards,
        reference=_num_bytes(model.parameters()) // shards if settings.with_reference else 0,
        gradients=in_training // shards,
        optimizer=2 * in_training // shards,
        activations=peak,
    )
