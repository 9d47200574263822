# SPDX-License-Identifier: Apache-2.0

"""What stays fp32 in a bf16 run, and memory that falls with `image_steps_per_forward`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alphagrpo_ext.models.bagel import BagelModel
from alphagrpo_ext.trainer import AlphaGRPOTrainer
from alphagrpo_ext.trainer.scoring.contexts import SharedContexts
from alphagrpo_ext.trainer.scoring.scores import PackedScores


MakeTrainer = Callable[..., AlphaGRPOTrainer]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_fp32_where_bf16_would_move_the_ratio(
    make_trainer: MakeTrainer, make_shapes_bagel: Callable[[], BagelModel], lora: bool, autocast: bool
) -> None:
    """Weights in bf16, as BAGEL-7B is loaded: latents, log-probabilities, velocities and adapters are fp32."""
    model = make_shapes_bagel()
    vae = model.vae
    model.to(torch.bfloat16)
    vae.float()
    trainer = make_trainer(model=model, lora=lora, bf16=autocast, image_beta=0.1, learning_rate=1e-2, max_steps=2)
    trainer.train()
    for update in trainer.recorder.updates:
        assert update.log_probs.dtype == torch.float32
        assert update.images.velocities.dtype == torch.float32
        for reference in update.inputs["ref_velocities"]:
            assert reference.dtype == torch.float32
        for trajectory in update.trajectories:
            window = trajectory.sampled_images[0].window
            assert {t.dtype for t in (window.latents, window.timesteps, window.log_probs)} == {torch.float32}
            # Not values of bf16 that were stored in fp32.
            assert (window.latents != window.latents.bfloat16()).any()
    parameters: dict[str, torch.nn.Parameter] = dict(trainer.model.named_parameters())
    for name, parameter in parameters.items():
        is_fp32 = "lora_" in name or ".vae." in f".{name}"
        assert parameter.dtype == (torch.float32 if is_fp32 else torch.bfloat16), name
        if lora and parameter.requires_grad:
            state: dict[str, Any] = trainer.optimizer.state[parameter]
            assert {state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {torch.float32}
    ratios = [entry["image/ratio_mean"] for entry in trainer.state.log_history if "image/ratio_mean" in entry]
    assert ratios == [1.0, 1.0]


def test_adapters_of_a_layer_read_one_rounded_tensor(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(lora=True, bf16=True, max_steps=1)
    inputs: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                inputs.setdefault(name, []).append(args[0])

        return hook

    for name, module in trainer.model.named_modules():
        if name.endswith(".lora_A.default"):
            module.register_forward_pre_hook(keep(name.removesuffix(".lora_A.default")))
    trainer.train()
    assert {tensor.dtype for tensors in inputs.values() for tensor in tensors} == {torch.bfloat16}
    for first, *others in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        names = [name for name in inputs if first in name]
        assert names
        for name in names:
            for other in others:
                pairs = zip(inputs[name], inputs[name.replace(first, other)], strict=True)
                assert all(one.data_ptr() == two.data_ptr() for one, two in pairs)


def kept_for_backward(trainer: AlphaGRPOTrainer) -> list[int]:
    """Bytes of activations that each packed forward with gradient keeps, from now on, with those of its contexts."""
    sizes: list[int] = []
    contexts: dict[int, int] = {}
    score, read_contexts = trainer.scorer.score, trainer.scorer.read_contexts

    def measure(run: Callable[..., Any], args: tuple[Any, ...], storages: dict[int, int]) -> Any:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return run(*args)

    def measuring_contexts(*args: Any) -> SharedContexts | None:
        contexts.clear()
        return measure(read_contexts, args, contexts)

    def measuring(*args: Any) -> PackedScores:
        storages: dict[int, int] = {}
        result = measure(score, args, storages)
        storages |= contexts
        weights = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
        if torch.is_grad_enabled():
            sizes.append(sum(size for pointer, size in storages.items() if pointer not in weights))
        return result

    trainer.scorer.score, trainer.scorer.read_contexts = measuring, measuring_contexts
    return sizes


def test_fewer_steps_a_forward_keep_less(make_trainer: MakeTrainer) -> None:
    kept = {}
    for steps in ("all", 1):
        trainer = make_trainer(image_steps_per_forward=steps, sde_window_size=4, sde_window_range=[0, 4], think=False)
        sizes = kept_for_backward(trainer)
        trainer.train()
        assert len(sizes) == (1 if steps == "all" else 4)
        kept[steps] = max(sizes)
    # The context of a prompt is short beside four copies of an image.
    assert kept[1] < 0.5 * kept["all"]
