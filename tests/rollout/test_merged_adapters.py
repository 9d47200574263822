# SPDX-License-Identifier: Apache-2.0

"""Adapters that are merged while a policy samples: what is sampled stays on-policy, and weights come back bit by bit."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear

from alphagrpo_ext.flow.transitions import transition
from alphagrpo_ext.models.bagel import LORA_TARGET_MODULES, BagelModel, BagelProcessor
from alphagrpo_ext.objectives import ImageScores
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator, generator
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.rollout.generator import sample_generator
from alphagrpo_ext.rollout.merged_adapters import mergeable_layers, merged_adapters
from alphagrpo_ext.trajectory import Trajectory


CONFIG = RolloutConfig(24, 24, max_new_tokens=8, denoising=DenoisingConfig(5, window_start=0, window_size=3))
MakeModel = Callable[[], BagelModel]
PROJECTION = "q_proj"


def adapted(model: BagelModel, scale: float = 0.02, **settings: Any) -> PeftModel:
    """A model in evaluation mode with an adapter as training makes it."""
    torch.manual_seed(0)
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": LORA_TARGET_MODULES} | settings))
    policy = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)
    return policy.eval()


@pytest.fixture
def policy(make_shapes_bagel: MakeModel) -> PeftModel:
    return adapted(make_shapes_bagel())


def in_bf16(model: BagelModel) -> BagelModel:
    """Weights in bf16, as those of a released checkpoint are loaded."""
    vae = model.vae
    model.to(torch.bfloat16)
    vae.float()
    return model


def break_adapter(policy: PeftModel) -> None:
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_A" in name:
                parameter[0, 0] = torch.nan


def autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def sample(policy: PeftModel, processor: BagelProcessor) -> list[Trajectory]:
    generate = RolloutGenerator(policy, processor, TASKS.get("reasoning_t2i")(think=True))
    rows = [{"prompt": "a red circle"}] * 4
    return generate(rows, [sample_generator(0, 0, i) for i in range(4)], CONFIG)


@torch.no_grad()
def score(policy: PeftModel, trajectories: list[Trajectory]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of texts, velocities and log-probabilities of transitions by the packed forward of training."""
    batch = policy.pack(trajectories, CONFIG.denoising.guidance)
    output = policy(**batch.inputs)
    scores = ImageScores.from_packed(trajectories, batch, output)
    steps = transition(
        "flow_sde", scores.latents, scores.velocities, scores.t, scores.t_next, 0.7, next_latents=scores.next_latents
    )
    return output.log_probs.float(), scores.velocities.float(), steps.log_prob


def recorded(trajectories: list[Trajectory]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of texts and of transitions as they were sampled."""
    texts = [p for t in trajectories for text in t.sampled_texts for p in text.log_probs]
    return torch.tensor(texts), torch.stack([t.sampled_images[0].window.log_probs for t in trajectories])


def without_merging(policy: PeftModel) -> PeftModel:
    """The policy in a state in which nothing is merged, and which computes the same."""
    for layer in mergeable_layers(policy):
        layer.get_base_layer().weight.requires_grad_(True)
    return policy


def count_calls(policy: PeftModel) -> list[int]:
    """One entry per call of an adapter, from now on."""
    calls: list[int] = []
    for layer in policy.modules():
        if isinstance(layer, LoraLinear):
            layer.lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
    return calls


def norm(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


@pytest.mark.invariant
def test_merged_rollout_is_on_policy_in_fp32(policy: PeftModel, shapes_processor: BagelProcessor) -> None:
    calls = count_calls(policy)
    trajectories = sample(policy, shapes_processor)
    assert not calls
    (texts, _, steps), expected = score(policy, trajectories), recorded(trajectories)
    assert calls
    torch.testing.assert_close(texts, expected[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(steps, expected[1], atol=1e-5, rtol=0)


@pytest.mark.invariant
def test_merged_rollout_under_autocast_deviates_as_bf16_does(
    policy: PeftModel, shapes_processor: BagelProcessor
) -> None:
    """
    Rollout and packed forward round differently in bf16, with an adapter or without. Merged, the policy is as near to that in fp32
    as with PEFT's own computation, and what it samples is scored as that is.
    """
    trajectories = sample(policy, shapes_processor)
    exact = score(policy, trajectories)
    with autocast():
        usual = score(policy, trajectories)
        with merged_adapters(policy):
            merged = score(policy, trajectories)
        deviations = []
        for _ in range(2):
            sampled = sample(policy, shapes_processor)
            found = score(policy, sampled)
            deviations.append(
                [norm(found[place] - values) for place, values in zip((0, 2), recorded(sampled), strict=True)]
            )
            policy = without_merging(policy)
    assert not torch.equal(merged[1], usual[1])
    assert norm(merged[1] - exact[1]) < 1.1 * norm(usual[1] - exact[1])
    for merged_deviation, usual_deviation in zip(*deviations, strict=True):
        assert merged_deviation < 2 * usual_deviation


@pytest.mark.invariant
@pytest.mark.parametrize("under_autocast", [False, True])
def test_rollout_with_weights_in_bf16_is_that_of_peft(
    make_shapes_bagel: MakeModel, shapes_processor: BagelProcessor, under_autocast: bool
) -> None:
    """Bit by bit, although the adapter is converted once under autocast."""
    policy = adapted(in_bf16(make_shapes_bagel()))
    with autocast(under_autocast):
        sampled = recorded(sample(policy, shapes_processor))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generator, "merged_adapters", lambda model: nullcontext())
            expected = recorded(sample(policy, shapes_processor))
    for values, others in zip(sampled, expected, strict=True):
        assert torch.equal(values, others)


def test_parameters_stay_as_they_are_and_forwards_come_back(policy: PeftModel) -> None:
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in policy.named_parameters()}
    layers = [module for module in policy.modules() if isinstance(module, LoraLinear)]

    def assert_parameters_are_as_before() -> None:
        for name, parameter in policy.named_parameters():
            pointer, values = before[name]
            assert parameter.data_ptr() == pointer and torch.equal(parameter, values), name

    with pytest.raises(KeyboardInterrupt), autocast(), merged_adapters(policy):
        replaced = [vars(module)["forward"] for module in policy.modules() if "forward" in vars(module)]
        assert len(replaced) == len(layers) > 0
        assert {forward.keywords["weight"].dtype for forward in replaced} == {torch.bfloat16}
        # Another thread may read them, such as that of a judge.
        assert_parameters_are_as_before()
        assert not any(layer.merged for layer in layers)
        raise KeyboardInterrupt
    assert_parameters_are_as_before()
    assert mergeable_layers(policy) == layers
    assert not any("forward" in vars(module) for module in policy.modules())


@torch.no_grad()
def test_several_adapters_are_added_with_their_own_scaling(make_shapes_bagel: MakeModel) -> None:
    policy = adapted(make_shapes_bagel(), use_rslora=True)
    policy.add_adapter("other", LoraConfig(r=2, target_modules=LORA_TARGET_MODULES, init_lora_weights=False))
    policy.add_adapter("idle", LoraConfig(r=2, target_modules=LORA_TARGET_MODULES, init_lora_weights=False))
    policy.base_model.set_adapter(["default", "other"])
    layer = next(module for module in policy.modules() if isinstance(module, LoraLinear))
    inputs = torch.randn(3, layer.in_features)
    expected = layer(inputs)
    calls = count_calls(policy)
    with merged_adapters(policy):
        torch.testing.assert_close(layer(inputs), expected, atol=1e-5, rtol=1e-5)
        # Within another one, nothing is merged twice.
        with merged_adapters(policy):
            torch.testing.assert_close(layer(inputs), expected, atol=1e-5, rtol=1e-5)
    assert not calls
    assert not torch.allclose(layer.base_layer(inputs), expected, atol=1e-2)
    assert torch.equal(layer(inputs), expected)


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        pytest.param({"use_dora": True}, None, id="DoRA"),
        pytest.param({"lora_bias": True, "target_modules": [PROJECTION]}, None, id="biases"),
        pytest.param({"lora_dropout": 0.1}, lambda policy: policy.train(), id="dropout"),
        pytest.param({}, without_merging, id="a trained weight"),
        pytest.param({}, lambda policy: in_bf16(policy.get_base_model()), id="bf16"),
        pytest.param({}, lambda policy: policy.base_model.disable_adapter_layers(), id="switched off"),
        pytest.param({}, lambda policy: policy.merge_adapter(), id="merged already"),
        pytest.param({"target_modules": [PROJECTION]}, break_adapter, id="not finite"),
    ],
)
def test_what_is_not_safe_is_not_merged(
    make_shapes_bagel: MakeModel, settings: dict[str, Any], change: Callable[[PeftModel], Any] | None
) -> None:
    policy = adapted(make_shapes_bagel(), **settings)
    if change is not None:
        change(policy)
    assert mergeable_layers(policy) == []
    before = {name: parameter.data_ptr() for name, parameter in policy.named_parameters()}
    with merged_adapters(policy):
        assert {name: parameter.data_ptr() for name, parameter in policy.named_parameters()} == before
        assert not any("forward" in vars(module) for module in policy.modules())


def test_choice_is_logged_once(make_shapes_bagel: MakeModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    policy = adapted(make_shapes_bagel(), target_modules=["model.layers.1.self_attn.k_proj", "layers.1.mlp.up_proj"])
    policy.get_submodule("base_model.model.language_model.model.layers.1.mlp.up_proj.base_layer").bfloat16()
    with autocast():
        for _ in range(2):
            with merged_adapters(policy):
                pass
    (message,) = caplog.messages
    assert message == (
        "Of 2 adapted layers, 1 sample with their adapter merged, 1 with their adapter converted once, and 0 as PEFT computes them."
    )
