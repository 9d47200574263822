# SPDX-License-Identifier: Apache-2.0

"""Presets of adapters, and a learning rate for each expert."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from alphagrpo_ext.models.bagel import BagelModel
from alphagrpo_ext.models.contract import LORA_TARGETS
from alphagrpo_ext.trainer import AlphaGRPOConfig, AlphaGRPOTrainer
from alphagrpo_ext.trainer.learning_rates import check_optimizer_is_made_here


MakeTrainer = Callable[..., AlphaGRPOTrainer]
ADAPTED = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


def is_generation(name: str) -> bool:
    return any(part in name for part in ("_moe_gen", "vae2llm", "llm2vae", "time_embedder"))


@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_presets_adapt_their_expert(make_shapes_bagel: Callable[[], BagelModel], targets: str) -> None:
    model = make_shapes_bagel()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=model.family.lora_target_modules(targets)))
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    found = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trainable}
    suffixes = {"both": ("", "_moe_gen"), "generation": ("_moe_gen",), "understanding": ("",)}[targets]
    assert found == {
        f"language_model.model.layers.{layer}."
        + (f"self_attn.{name}{suffix}" if name[0] in "qkvo" else f"mlp{suffix}.{name}")
        for layer in range(2)
        for name in ADAPTED
        for suffix in suffixes
    }


def test_recipe_arguments_reach_the_preset(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="lora_targets must be one of both, generation, understanding, but is 'all'"):
        make_trainer(lora_targets="all")


@pytest.mark.parametrize("lora", [False, True])
def test_every_parameter_is_in_one_group(make_trainer: MakeTrainer, lora: bool) -> None:
    settings = {"lora": lora, "learning_rate": 1e-3, "weight_decay": 0.1}
    plain, split = make_trainer(**settings), make_trainer(**settings, generation_learning_rate=1e-4)

    def groups(trainer: AlphaGRPOTrainer) -> dict[str, tuple[float, float]]:
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        optimizer = trainer.create_optimizer()
        found = [
            (names[id(p)], group["lr"], group["weight_decay"])
            for group in optimizer.param_groups
            for p in group["params"]
        ]
        assert len(found) == len({name for name, *_ in found})
        return {name: rates for name, *rates in found}

    expected, actual = groups(plain), groups(split)
    assert actual.keys() == {name for name, parameter in split.model.named_parameters() if parameter.requires_grad}
    assert {decay for _, decay in expected.values()} == ({0.1} if lora else {0.0, 0.1})
    for name, (learning_rate, decay) in actual.items():
        assert decay == expected[name][1]
        assert learning_rate == (1e-4 if is_generation(name) else 1e-3)
    assert {rate for rate, _ in actual.values()} == {1e-3, 1e-4}
    # A second call, as of a resumed run, makes nothing anew.
    optimizer = split.optimizer
    assert split.create_optimizer() is optimizer
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(actual)


def test_generation_rate_of_zero_trains_the_other_expert_alone(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(generation_learning_rate=0.0)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    changed = {n for n, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[n])}
    assert changed == {name for name in trainable if not is_generation(name)}


def test_scheduler_scales_both_rates(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        learning_rate=1e-3, generation_learning_rate=1e-4, lr_scheduler_type="linear", max_steps=4, think=False
    )
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    for step in range(5):
        factor = 1 - step / 4
        rates = {group["lr"] for group in optimizer.param_groups}
        assert sorted(rates) == pytest.approx(sorted({1e-4 * factor, 1e-3 * factor}))
        assert scheduler.get_last_lr()[0] == pytest.approx(1e-3 * factor)
        optimizer.step()
        scheduler.step()


def test_rate_for_an_optimizer_that_is_passed_is_refused(
    make_shapes_bagel: Callable[[], BagelModel], make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(generation_learning_rate=1e-4)
    optimizer = torch.optim.SGD(trainer.model.llm2vae.parameters(), lr=1.0)
    with pytest.raises(
        ValueError, match="generation_learning_rate=0.0001 has no effect on an optimizer that is passed"
    ):
        AlphaGRPOTrainer(
            model=make_shapes_bagel(),
            reward_funcs=lambda **kwargs: [],
            args=trainer.args,
            train_dataset=trainer.train_dataset,
            processing_class=trainer.processing_class,
            optimizers=(optimizer, None),
        )


def test_vision_tower_and_autoencoder_are_frozen_by_default(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    frozen = {name.split(".")[0] for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert frozen == {"vae", "vit_model", "connector"}
    assert not any(p.requires_grad for n, p in trainer.model.named_parameters() if n.split(".")[0] in frozen)


def test_rate_for_an_optimizer_of_deepspeed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    # What a configuration sets for the whole process is gone after the test.
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    optimizer = {"type": "AdamW", "params": {"lr": 1e-4}}
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "generation_learning_rate": 1e-4}
    zero2 = {"zero_optimization": {"stage": 2}}
    check_optimizer_is_made_here(AlphaGRPOConfig(**settings, deepspeed=zero2), None)
    with pytest.raises(ValueError, match="on an optimizer that DeepSpeed makes: remove 'optimizer' from its config"):
        check_optimizer_is_made_here(AlphaGRPOConfig(**settings, deepspeed=zero2 | {"optimizer": optimizer}), None)


def test_adapters_start_gaussian_if_asked(make_trainer: MakeTrainer) -> None:
    """Of standard deviation 1 / r; PEFT's default depends on the width of the layer."""
    spreads = {}
    for init in ("kaiming", "gaussian"):
        parameters = dict(make_trainer(lora=True, lora_init=init).model.named_parameters())
        first = torch.cat([p.detach().flatten() for name, p in parameters.items() if "lora_A" in name])
        spreads[init] = first.std().item()
        assert not any(p.any() for name, p in parameters.items() if "lora_B" in name)
    assert spreads["gaussian"] == pytest.approx(1 / 4, rel=0.02)
    assert spreads["kaiming"] < 0.1
    own = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="orthogonal")
    trainer = make_trainer(arguments={"peft_config": own}, lora_init="gaussian")
    assert trainer.model.peft_config["default"].init_lora_weights == "orthogonal"
    with pytest.raises(ValueError, match="lora_init must be one of kaiming, gaussian, but is 'normal'"):
        make_trainer(lora_init="normal")
