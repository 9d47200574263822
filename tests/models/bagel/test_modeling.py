# SPDX-License-Identifier: Apache-2.0

"""[`BagelModel`] as a Transformers model: saving and loading, training options, and sampling of tokens."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.bagel import LORA_TARGET_MODULES, BagelConfig, BagelModel, BagelProcessor
from alphagrpo_ext.models.bagel.checkpoint import RELEASED_FILES, is_released_layout, load_released
from alphagrpo_ext.models.contract import PackedOutput


GUIDANCE = GuidanceConfig(text_scale=3.0, image_scale=1.5, interval=(0.0, 1.0))


@pytest.fixture
def inputs(tiny_bagel, rollout) -> dict[str, torch.Tensor]:
    """A packed batch with texts, clean, noised and seen images."""
    trajectories = rollout(tiny_bagel, "edit") + rollout(tiny_bagel, "two_rounds")
    return tiny_bagel.pack(trajectories, GUIDANCE).inputs


def total_loss(output: PackedOutput) -> torch.Tensor:
    return output.velocities.square().mean() - output.log_probs.mean() + output.entropies.mean()


def gradients(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total_loss(model(**inputs)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class TestSaving:
    @pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText])
    def test_round_trip_is_exact(self, tiny_bagel, inputs, tmp_path, auto_class):
        tiny_bagel.save_pretrained(tmp_path)
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded) is BagelModel
        expected, actual = tiny_bagel.state_dict(), loaded.state_dict()
        assert expected.keys() == actual.keys()
        assert {"vae.decoder.conv_in.weight", "latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"} <= actual.keys()
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), name
        # The rotary frequencies are not saved, so only an output shows whether they are right.
        expected, actual = tiny_bagel(**inputs), loaded(**inputs)
        for name in ("log_probs", "entropies", "velocities"):
            assert torch.equal(getattr(actual, name), getattr(expected, name)), name

    def test_config_round_trip(self, tiny_bagel, tmp_path):
        tiny_bagel.config.save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        assert type(config) is BagelConfig
        config._name_or_path = tiny_bagel.config._name_or_path
        assert config.to_dict() == tiny_bagel.config.to_dict()
        assert config.get_text_config() is config.text_config
        assert config.get_text_config().to_dict() == tiny_bagel.config.text_config.to_dict()

    def test_autoencoder_stays_in_fp32(self, tiny_bagel, inputs, tmp_path):
        tiny_bagel.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        for name, parameter in loaded.named_parameters():
            assert parameter.dtype == (torch.float32 if name.startswith("vae.") else torch.bfloat16), name
        for name, tensor in tiny_bagel.vae.state_dict().items():
            assert torch.equal(loaded.vae.state_dict()[name], tensor), name
        output, expected = loaded(**inputs), tiny_bagel(**inputs)
        assert output.velocities.dtype == output.log_probs.dtype == torch.float32
        torch.testing.assert_close(output.velocities, expected.velocities, rtol=0.1, atol=0.1)

    def test_only_the_autoencoder_is_frozen(self, tiny_bagel, tmp_path):
        tiny_bagel.save_pretrained(tmp_path)
        for model in (tiny_bagel, AutoModel.from_pretrained(tmp_path)):
            for name, parameter in model.named_parameters():
                assert parameter.requires_grad != name.startswith("vae."), name

    def test_released_checkpoint_round_trip(self, golden, tmp_path):
        model, processor = load_released(golden.checkpoint)
        assert is_released_layout(golden.checkpoint)
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        assert not is_released_layout(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        frequencies = model.language_model.model.rotary_emb.inv_freq
        assert torch.equal(loaded.language_model.model.rotary_emb.inv_freq, frequencies)
        loaded_processor = AutoProcessor.from_pretrained(tmp_path)
        assert type(loaded_processor) is BagelProcessor
        text = processor.generation_system_prompt
        assert loaded_processor.encode_text(text) == processor.encode_text(text)
        assert loaded_processor.to_dict() == processor.to_dict()


class TestReleasedCheckpoint:
    @pytest.fixture
    def folder(self, golden, tmp_path) -> Path:
        return Path(shutil.copytree(golden.checkpoint, tmp_path / "checkpoint"))

    @pytest.mark.parametrize("name", RELEASED_FILES)
    def test_missing_file_is_named(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=re.escape(name)):
            load_released(folder)

    @pytest.mark.parametrize(
        ("name", "key"),
        [
            ("ema.safetensors", "language_model.model.layers.0.mlp_moe_gen.up_proj.weight"),
            ("ema.safetensors", "llm2vae.bias"),
            ("ae.safetensors", "decoder.conv_out.bias"),
        ],
    )
    @pytest.mark.parametrize("fault", ["shape", "missing", "extra"])
    def test_weights_must_fit(self, folder, name, key, fault):
        weights = load_file(folder / name)
        if fault == "shape":
            weights[key] = weights[key][1:].clone()
        elif fault == "missing":
            del weights[key]
        else:
            key = key.replace(".", ".extra_", 1)
            weights[key] = torch.zeros(1)
        save_file(weights, folder / name)
        with pytest.raises(ValueError, match=re.escape(key.rsplit(".", 2)[-2])):
            load_released(folder)

    def test_dtype(self, golden):
        model, _ = load_released(golden.checkpoint, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if name.startswith("vae.") else torch.bfloat16), name


class TestTraining:
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_changes_nothing(self, tiny_bagel, inputs, use_reentrant):
        tiny_bagel.train()
        expected = gradients(tiny_bagel, inputs)
        tiny_bagel.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        calls = []
        layer = tiny_bagel.language_model.model.layers[0].self_attn
        hook = layer.register_forward_hook(lambda *_: calls.append(1))
        actual = gradients(tiny_bagel, inputs)
        hook.remove()
        assert len(calls) == 2
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-7, msg=name)

    def test_attention_implementations_agree(self, make_tiny_bagel, inputs):
        eager, sdpa = (make_tiny_bagel(attn_implementation=name) for name in ("eager", "sdpa"))
        for model, name in ((eager, "eager"), (sdpa, "sdpa")):
            assert model.config.text_config._attn_implementation == name
            assert model.config.vision_config._attn_implementation == name
        expected = sdpa(**inputs)
        for name, tensor in vars(eager(**inputs)).items():
            torch.testing.assert_close(tensor, getattr(expected, name), rtol=0, atol=2e-5)
        expected = gradients(sdpa, inputs)
        for name, gradient in gradients(eager, inputs).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)

    def test_lora_adapts_both_experts_and_no_vision(self, tiny_bagel):
        num_layers = tiny_bagel.config.text_config.num_hidden_layers
        model = get_peft_model(tiny_bagel, LoraConfig(r=2, target_modules=LORA_TARGET_MODULES))
        adapted = {name.rsplit(".lora_A", 1)[0] for name, _ in model.named_parameters() if ".lora_A" in name}
        projections = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
        for expert in ("", "_moe_gen"):
            names = [
                name.replace("mlp.", f"mlp{expert}.") if name.startswith("mlp") else name + expert
                for name in projections
            ]
            for i in range(num_layers):
                for name in names:
                    adapted.remove(f"base_model.model.language_model.model.layers.{i}.{name}")
        assert not adapted

    def test_freeze_vision_tower(self, tiny_bagel):
        tiny_bagel.family.freeze_vision_tower(tiny_bagel)
        for name, parameter in tiny_bagel.named_parameters():
            assert parameter.requires_grad != name.startswith(("vae.", "vit_model.", "connector.")), name


def test_another_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"text_config.hidden_act must be 'silu', but is 'gelu'"):
        BagelConfig(text_config={"hidden_act": "gelu"})
