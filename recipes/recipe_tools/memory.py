# SPDX-License-Identifier: Apache-2.0

"""
How much memory an update takes, estimated without a machine that could run it.

Weights, gradients and optimizer states are counted. For the forward and backward, the model's own code runs on fake tensors, which
have a size but no contents, and the storages that are alive at each operation are added up. So the estimate includes adapters,
gradient checkpointing, guidance branches and the chunked head as training does.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

from alphagrpo_ext.flow.timesteps import flow_timesteps
from alphagrpo_ext.models.attention.choice import attention_implementations
from alphagrpo_ext.models.contract import FAMILIES, Family, UnifiedModel
from alphagrpo_ext.trajectory import DenoisingWindow, ImageSegment, TextSegment, Trajectory
from recipe_tools.memory_settings import MemorySettings


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Memory of one process at the peak of an update, in bytes.

    Args:
        weights (`int`): Weights of the model and its adapter.
        gathered (`int`): Weights of other shards while they are in use; 0 without shards.
        reference (`int`): Weights of the reference model.
        gradients (`int`): Gradients of the trained weights.
        optimizer (`int`): Two moments of AdamW per trained weight.
        activations (`int`): Peak of what forward and backward keep alive besides these.
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
    Adds up the storages that operations allocate and that are still in use.

    Args:
        known (`Iterable[torch.Tensor]`): Tensors that exist before and do not count.
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
    """Build trajectories of the size that `settings` describes, with the trained steps of the largest forward."""
    grid = model.latent_grid(settings.height, settings.width)
    vision_size = model.vision_size(settings.height, settings.width)
    tokens = grid[0] * grid[1]
    num_steps = settings.steps_per_forward(tokens, model.num_generation_weights)
    window = DenoisingWindow(
        latents=torch.zeros(num_steps + 1, tokens, model.latent_channels),
        timesteps=flow_timesteps(settings.sde_window_size + 2, 1.0)[: num_steps + 1],
        start=0,
        log_probs=torch.zeros(num_steps),
    )
    given: list[Any] = []
    for _ in range(settings.context_images):
        pixels = None if vision_size is None else torch.zeros(3, *vision_size)
        given.append(ImageSegment(torch.zeros(tokens, model.latent_channels), grid, pixels))
    given.append(TextSegment([0] * settings.prompt_tokens))
    thought = (
        [TextSegment([0] * settings.thought_tokens, sampled=True, ended=False)] if settings.thought_tokens else []
    )
    image = ImageSegment(
        torch.zeros(tokens, model.latent_channels),
        grid,
        sampled=True,
        window=window,
        guidance_contexts=dict(zip(model.branches[1:], (given[:-1], given[-1:]), strict=False)),
    )
    return [Trajectory([*given, *thought, image]) for _ in range(settings.batch_size)]


def build_policy(config: PreTrainedConfig, settings: MemorySettings) -> tuple[UnifiedModel, torch.nn.Module]:
    """Build the model of a configuration as training sets it up: data types, frozen parts, adapter, checkpointing."""
    family = FAMILIES.get(config.model_type)()
    _check_supported(family, settings)
    # Flex attention keeps what SDPA keeps, except the mask.
    name = "eager" if settings.attn_implementation == "eager" else "sdpa"
    config = type(config).from_dict(config.to_dict())
    config._attn_implementation = name
    model = family.model_class(config)
    dtype = getattr(torch, settings.dtype)
    keep = family.keeps_fp32
    for parameter_name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if keep(parameter_name) else dtype)
    return model, prepare_policy(model, settings)


def prepare_policy(model: UnifiedModel, settings: MemorySettings) -> torch.nn.Module:
    """Set a model up as training does: frozen parts, adapter, checkpointing."""
    family = model.family
    family.freeze_vision_tower(model)
    policy: torch.nn.Module = model
    if settings.lora_rank:
        targets = family.lora_target_modules(settings.lora_targets)
        policy = get_peft_model(model, LoraConfig(r=settings.lora_rank, target_modules=targets))
    if settings.gradient_checkpointing:
        with warnings.catch_warnings():
            # The old name works with every version of Transformers that the package supports.
            warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
            policy.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        if settings.lora_rank:
            policy.enable_input_require_grads()
    return policy.train()


def released_config(model_name: str) -> PreTrainedConfig | None:
    """The configuration of a released model whose sizes a family knows by its name; `None` for other names."""
    for family in (FAMILIES.get(name) for name in FAMILIES.names()):
        sizes = family.released_sizes.get(model_name)
        if sizes is not None:
            return family.model_class.config_class(**sizes)
    return None


def _check_supported(family: Family, settings: MemorySettings) -> None:
    """Raise `ValueError` if a model of the family has no such attention or branch."""
    name, attention = family.model_class.__name__, attention_implementations(family)
    if settings.attn_implementation not in attention:
        raise ValueError(
            f"attn_implementation must be one of {', '.join(attention)} for a {name}, but is {settings.attn_implementation!r}"
        )
    branches = family.model_class.branches
    if settings.num_branches > len(branches):
        raise ValueError(
            f"num_branches must be at most {len(branches)} for a {name}, whose branches are {', '.join(branches)}, but is "
            f"{settings.num_branches}"
        )


def leave_meta(module: torch.nn.Module) -> None:
    """Put weights and buffers on the CPU, where autocast applies; in a fake mode they still have no contents."""
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


def estimate_memory(config: PreTrainedConfig, settings: MemorySettings) -> MemoryEstimate:
    """
    Estimate the memory of one process that trains a model.

    Rollouts need less and are not considered. The memory of the process itself, communication buffers and fragmentation are not
    included: leave a tenth of a device free.

    Args:
        config (`PreTrainedConfig`): Configuration of a registered model family, e.g. a [`BagelConfig`].
        settings ([`MemorySettings`]): Settings of the update.

    Raises:
        `ValueError`: If the model cannot paint the size, or has no such attention or guidance branch.
    """
    with torch.device("meta"):
        model, policy = build_policy(config, settings)
    activations, layers = _run_update(model, policy, settings)
    parameters = list(policy.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    weights, shards = _num_bytes(parameters), settings.num_shards
    in_training = _num_bytes(trained)
    if shards > 1 and settings.autocast:
        in_training = 4 * sum(parameter.numel() for parameter in trained)
    return MemoryEstimate(
        weights=(weights - _num_bytes(trained) + in_training) // shards,
        # Embeddings and head stay gathered for the whole forward. Of the layers, one is used while the next one is gathered.
        gathered=(weights - sum(layers) + 2 * max(layers)) * (shards - 1) // shards,
        reference=_num_bytes(model.parameters()) // shards if settings.with_reference else 0,
        gradients=in_training // shards,
        optimizer=2 * in_training // shards,
        activations=activations,
    )


def _run_update(model: UnifiedModel, policy: torch.nn.Module, settings: MemorySettings) -> tuple[int, list[int]]:
    """Run forward and backward on fake tensors. Returns the peak of their activations and the size of each layer, in bytes."""
    batch = model.pack(example_trajectories(model, settings), settings.guidance)
    family = model.family
    # The vision tower is frozen and keeps no activations.
    needed = {name: tensor for name, tensor in batch.inputs.items() if name not in family.vision_inputs}
    fake = FakeTensorMode()
    with fake:
        leave_meta(policy)
        # A fake tensor has no values to read.
        inputs = {n: t if n in family.number_inputs else fake.from_tensor(t) for n, t in needed.items()}
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        for parameter in trained:
            # The gradients of one micro-batch exist when the next one begins.
            parameter.grad = torch.zeros_like(parameter)
        known = [*policy.parameters(), *policy.buffers(), *inputs.values(), *(parameter.grad for parameter in trained)]
        dtype = torch.bfloat16 if settings.autocast else getattr(torch, settings.dtype)
        masks = family.mask_sizes(needed) if settings.attn_implementation == "flex_attention" else ()
        ignored = [size * mask_dtype.itemsize for size in masks for mask_dtype in (torch.bool, dtype)]
        with LiveBytes(known, ignored) as tracker:
            with (
                torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.autocast),
                disable_input_dtype_casting(policy, active=settings.autocast),
            ):
                output = policy(**inputs)
            loss = output.velocities.square().sum()
            if settings.thought_tokens:
                loss = loss + output.log_probs.sum()
            loss.backward()
        peak = tracker.peak
        layers = [_num_bytes(layer.parameters()) for layer in family.sharded_layers(model)]
    return peak, layers
