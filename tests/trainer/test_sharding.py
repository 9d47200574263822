# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.bagel import BagelModel
from alphagrpo_ext.rollout.denoising import DenoisingConfig, denoise
from alphagrpo_ext.trainer.distributed import Sharding, check_sharding, gathered_policy, use_uniform_precision


CONFIGS = sorted((Path(__file__).parents[2] / "recipes" / "accelerate_configs").glob("*.yaml"))


@pytest.fixture
def sharded_bagel(make_shapes_bagel: Callable[[], BagelModel]) -> Iterator[BagelModel]:
    """A policy sharded by FSDP2 as accelerate does it, in a world of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    model = make_shapes_bagel()
    for module in reversed(list(model.modules())[1:]):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    yield model
    torch.distributed.destroy_process_group()


def sharded_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)}


def test_layers_that_are_sharded_apart_are_in_the_model(make_shapes_bagel: Callable[[], BagelModel]) -> None:
    model = make_shapes_bagel()
    assert model._no_split_modules == {"BagelDecoderLayer", "SiglipEncoderLayer"}
    assert model._no_split_modules <= {type(module).__name__ for module in model.modules()}


@torch.no_grad()
def test_gathered_policy_generates_and_is_sharded_again(
    sharded_bagel: BagelModel, make_shapes_bagel: Callable[[], BagelModel]
) -> None:
    names = sharded_names(sharded_bagel)
    assert names == {name for name, _ in sharded_bagel.named_parameters()}
    modules = [module for module in sharded_bagel.modules() if isinstance(module, FSDPModule)]
    layer = sharded_bagel.language_model.model.layers[0]
    config = DenoisingConfig(num_timesteps=3, guidance=GuidanceConfig(text_scale=1.0))
    noise = torch.randn(1, 4, sharded_bagel.latent_channels, generator=torch.Generator().manual_seed(0))

    def paint(model: BagelModel) -> torch.Tensor:
        cache = model.prefill([[]], capacity=model.image_slots((2, 2)))
        latents, _ = denoise(model, cache, noise, (2, 2), config)
        return model.decode_latents(latents, (2, 2))

    for _ in range(2):
        with gathered_policy(sharded_bagel, Accelerator(cpu=True)) as policy:
            image = paint(policy)
            # A layer that has run keeps its parameters.
            assert not sharded_names(policy)
        assert sharded_names(sharded_bagel) == names
    assert torch.equal(image, paint(make_shapes_bagel()))
    # Forwards of training free a layer's parameters again, and leave the root's, as before.
    resharding = {module: module._get_fsdp_state()._fsdp_param_group._reshard_after_forward for module in modules}
    assert resharding.pop(sharded_bagel) is False
    assert layer in resharding and all(resharding.values())


@torch.no_grad()
def test_gathered_policy_is_sharded_again_after_an_error(sharded_bagel: BagelModel) -> None:
    names = sharded_names(sharded_bagel)
    with pytest.raises(RuntimeError, match="out of paint"), gathered_policy(sharded_bagel, Accelerator(cpu=True)):
        raise RuntimeError("out of paint")
    assert sharded_names(sharded_bagel) == names


@pytest.mark.parametrize(
    "sharding, gather, steps_per_forward, message",
    [
        (Sharding(zero_stage=0, fsdp_version=1), True, "auto", "fsdp_version: 2"),
        (Sharding(zero_stage=3, fsdp_version=None), False, "auto", "ds3_gather_for_generation"),
        (Sharding(zero_stage=3, fsdp_version=None), True, 2, "image_steps_per_forward=2"),
    ],
)
def test_sharding_that_cannot_train_is_refused(
    sharding: Sharding, gather: bool, steps_per_forward: int | str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_sharding(sharding, gather, steps_per_forward)


@pytest.mark.parametrize(
    "sharding, shards, gather",
    [
        (Sharding(zero_stage=0, fsdp_version=None), False, False),
        (Sharding(zero_stage=2, fsdp_version=None), False, False),
        (Sharding(zero_stage=3, fsdp_version=None), True, True),
        (Sharding(zero_stage=0, fsdp_version=2), True, True),
    ],
)
def test_sharding_that_works_is_not_refused(sharding: Sharding, shards: bool, gather: bool) -> None:
    assert sharding.shards_parameters == shards
    for steps_per_forward in ("auto", "all", *([] if sharding.zero_stage == 3 else [1])):
        check_sharding(sharding, gather, steps_per_forward)


def test_fsdp_leaves_inputs_in_fp32_and_sums_gradients_in_fp32() -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.cast_forward_inputs
    use_uniform_precision(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert not policy.cast_forward_inputs
    use_uniform_precision(Accelerator(cpu=True))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_accelerate_knows_every_setting(config: Path) -> None:
    settings = load_config_from_file(str(config))
    assert (settings.num_processes, settings.mixed_precision) == (8, "bf16")
