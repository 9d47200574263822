# SPDX-License-Identifier: Apache-2.0

"""BAGEL's released layout: every name and shape of the 7B checkpoint, reading it with little memory, and writing it."""

import filecmp
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from alphagrpo_ext.models.bagel import LORA_TARGET_MODULES, BagelConfig, BagelModel, BagelProcessor
from alphagrpo_ext.models.bagel.checkpoint import (
    MODEL_WEIGHTS,
    VAE_WEIGHTS,
    config_from_released,
    load_released,
    released_tensors,
    save_released,
)
from alphagrpo_ext.models.loading import find_family, load_model


BAGEL_7B = json.loads((Path(__file__).parent / "bagel_7b_shapes.json").read_text())
# Of Qwen2.5, in the order of their ids, from 151643 on.
QWEN_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
)


def shapes_of_7b(file: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the release by name; `*` in the recorded names counts layers."""
    shapes = {}
    for name, entry in BAGEL_7B[file].items():
        for layer in range(entry.get("layers", 1)):
            shapes[name.replace("*", str(layer))] = tuple(entry["shape"])
    return shapes


@pytest.fixture
def folder(golden, tmp_path) -> Path:
    return Path(shutil.copytree(golden.checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def folder_of_7b(tmp_path) -> Path:
    """The release's JSON files and a tokenizer as large as its own, with special tokens but without merges."""
    for name in ("llm_config.json", "vit_config.json"):
        (tmp_path / name).write_text(json.dumps(BAGEL_7B[name]))
    (tmp_path / "vocab.json").write_text(json.dumps({f"word{i}": i for i in range(151643)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokens = {str(151643 + i): {"content": token, **flags} for i, token in enumerate(QWEN_TOKENS)}
    settings = {
        "added_tokens_decoder": tokens,
        "additional_special_tokens": list(QWEN_TOKENS[1:]),
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


class TestNames:
    def test_all_weights_of_the_7b_have_a_place(self, folder_of_7b):
        shapes, vae_shapes = shapes_of_7b(MODEL_WEIGHTS), shapes_of_7b(VAE_WEIGHTS)
        assert len(shapes) + len(vae_shapes) == 1223 + 244 == 1467
        with torch.device("meta"):
            model = BagelModel(config_from_released(folder_of_7b, shapes, vae_shapes))
        tensors = released_tensors(model)
        assert tensors.keys() == model.state_dict().keys()
        assert len({(tensor.file, tensor.name) for tensor in tensors.values()}) == 1467
        for file, expected in ((MODEL_WEIGHTS, shapes), (VAE_WEIGHTS, vae_shapes)):
            actual = {tensor.name: tensor.shape for tensor in tensors.values() if tensor.file == file}
            assert actual == expected
        for name, tensor in model.state_dict().items():
            assert tensor.numel() == torch.Size(tensors[name].shape).numel(), name
        for file, expected in ((MODEL_WEIGHTS, shapes), (VAE_WEIGHTS, vae_shapes)):
            assert sum(torch.Size(shape).numel() for shape in expected.values()) == BAGEL_7B["num_parameters"][file]

    def test_the_default_configuration_is_that_of_the_7b(self, folder_of_7b):
        config = config_from_released(folder_of_7b, shapes_of_7b(MODEL_WEIGHTS), shapes_of_7b(VAE_WEIGHTS))
        assert (config.bos_token_id, config.eos_token_id) == (151644, 151645)
        assert (config.image_start_token_id, config.image_end_token_id) == (151652, 151653)
        assert config.to_dict() == BagelConfig().to_dict()


class TestReading:
    @pytest.mark.parametrize(("dtype", "mapped"), [(None, True), (torch.bfloat16, True), (torch.float32, False)])
    def test_weights_of_the_wanted_type_stay_in_the_file(self, folder, dtype, mapped):
        model, _ = load_released(folder, dtype)
        addresses = [
            range(*(int(bound, 16) for bound in line.split()[0].split("-")))
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(str(folder / MODEL_WEIGHTS))
        ]
        weight = model.language_model.model.layers[0].mlp.up_proj.weight
        assert any(weight.data_ptr() in part for part in addresses) == mapped

    def test_the_configuration_alone(self, folder):
        config, expected = find_family(str(folder)).load_config(str(folder)), load_released(folder)[0].config
        stored = {"_name_or_path", "dtype", "architectures"}
        assert {n: v for n, v in config.to_dict().items() if n not in stored} == {
            n: v for n, v in expected.to_dict().items() if n not in stored
        }

    def test_training_does_not_write_into_the_file(self, folder):
        digest = hashlib.sha256((folder / MODEL_WEIGHTS).read_bytes()).hexdigest()
        model, _ = load_released(folder, torch.bfloat16)
        before = model.llm2vae.weight.clone()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        assert (model.llm2vae.weight != before).all()
        assert hashlib.sha256((folder / MODEL_WEIGHTS).read_bytes()).hexdigest() == digest
        assert torch.equal(load_released(folder, torch.bfloat16)[0].llm2vae.weight, before)

    def test_no_weight_stays_without_data(self, golden):
        model, _ = load_model(golden.checkpoint, dtype="auto", attn_implementation="eager")
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            assert not tensor.is_meta, name
        assert model.config.text_config._attn_implementation == "eager"
        assert model.dtype == torch.bfloat16

    @pytest.mark.parametrize("name", [MODEL_WEIGHTS, VAE_WEIGHTS])
    @pytest.mark.parametrize("size", [-1, 5, 0])
    def test_truncated_file_is_named(self, folder, name, size):
        path = folder / name
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size + size if size < 0 else size)
        with pytest.raises(ValueError, match=f"{name} is truncated or damaged.*again"):
            load_released(folder)

    @pytest.mark.parametrize("name", ["llm_config.json", "vit_config.json"])
    def test_damaged_configuration_is_named(self, folder, name):
        path = folder / name
        path.write_text(path.read_text()[:-20])
        with pytest.raises(ValueError, match=f"{name} is not valid JSON"):
            load_released(folder)
        path.write_text("{}")
        with pytest.raises(ValueError, match=f"{name} lacks (vocab_size|num_hidden_layers)"):
            load_released(folder)

    @pytest.mark.parametrize(
        ("removed", "missing"),
        [
            (("tokenizer.json", "vocab.json", "merges.txt"), "tokenizer.json (or vocab.json and merges.txt)"),
            (("tokenizer.json", "merges.txt"), "lacks merges.txt"),
            (("tokenizer.json", "vocab.json"), "lacks vocab.json"),
        ],
    )
    def test_missing_tokenizer_file_is_named(self, folder, removed, missing):
        for name in removed:
            (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=re.escape(missing)):
            load_released(folder)

    def test_slow_tokenizer_files_are_enough(self, golden, folder):
        (folder / "tokenizer.json").unlink()
        model, processor = load_released(folder)
        expected, expected_processor = load_released(golden.checkpoint)
        text = "a <|vision_start|> red circle\n"
        assert processor.encode_text(text) == expected_processor.encode_text(text)
        assert model.config.image_start_token_id == expected.config.image_start_token_id == 304

    def test_tokenizer_of_another_model(self, folder, shapes_processor):
        settings = json.loads((folder / "llm_config.json").read_text())
        (folder / "llm_config.json").write_text(json.dumps(settings | {"vocab_size": 300}))
        with pytest.raises(ValueError, match=re.escape("<|im_start|> the id 301")):
            load_released(folder)
        path = folder / "tokenizer.json"
        path.write_text(path.read_text().replace("<|vision_end|>", "<|vision_gone|>"))
        path = folder / "tokenizer_config.json"
        path.write_text(path.read_text().replace("<|vision_end|>", "<|vision_gone|>"))
        (folder / "llm_config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=re.escape("no token <|vision_end|>")):
            load_released(folder)

    @pytest.mark.parametrize(
        ("file", "key"),
        [
            (MODEL_WEIGHTS, "vae2llm.weight"),
            (MODEL_WEIGHTS, "latent_pos_embed.pos_embed"),
            (VAE_WEIGHTS, "decoder.conv_in.weight"),
            (VAE_WEIGHTS, "encoder.down.1.block.0.conv1.bias"),
        ],
    )
    def test_missing_weight_that_tells_a_size(self, folder, file, key):
        weights = load_file(folder / file)
        del weights[key]
        save_file(weights, folder / file)
        with pytest.raises(ValueError, match=re.escape(f"{file} lacks {key}")):
            load_released(folder)

    def test_all_faults_are_counted_and_some_are_named(self, folder):
        weights = load_file(folder / MODEL_WEIGHTS)
        removed = [name for name in weights if "layers.1.self_attn" in name and "language_model" in name]
        assert len(removed) > 10
        save_file({name: t for name, t in weights.items() if name not in removed}, folder / MODEL_WEIGHTS)
        with pytest.raises(ValueError, match=f"lacks .*layers.1.self_attn.*and {len(removed) - 5} more"):
            load_released(folder)


class TestWriting:
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
    def test_round_trip_is_bit_equal(self, golden, tmp_path, dtype):
        model, processor = load_released(golden.checkpoint, dtype)
        save_released(model, processor, tmp_path / "released")
        for file in (MODEL_WEIGHTS, VAE_WEIGHTS):
            expected, actual = load_file(golden.checkpoint / file), load_file(tmp_path / "released" / file)
            assert actual.keys() == expected.keys()
            file_dtype = torch.float32 if file == VAE_WEIGHTS else dtype
            for name, tensor in expected.items():
                tensor = tensor.to(file_dtype or tensor.dtype)
                assert actual[name].dtype == tensor.dtype, name
                assert torch.equal(actual[name], tensor), name

        again, again_processor = load_released(tmp_path / "released", dtype)
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        again.config._name_or_path = model.config._name_or_path
        assert again.config.to_dict() == model.config.to_dict()
        assert again_processor.to_dict() == processor.to_dict()
        save_released(again, again_processor, tmp_path / "again")
        names = [path.name for path in (tmp_path / "released").iterdir()]
        assert len(names) == 9
        equal, *_ = filecmp.cmpfiles(tmp_path / "released", tmp_path / "again", names, shallow=False)
        assert sorted(equal) == sorted(names)

    def test_other_files_are_those_of_the_release(self, golden, tmp_path):
        save_released(*load_released(golden.checkpoint), tmp_path / "released")
        written = tmp_path / "released"
        assert json.loads((written / "vocab.json").read_text()) == json.loads(
            (golden.checkpoint / "vocab.json").read_text()
        )
        assert (written / "merges.txt").read_text() == (golden.checkpoint / "merges.txt").read_text()
        for name, kept in (
            ("llm_config.json", {"rope_theta", "rms_norm_eps", "architectures", "max_position_embeddings"}),
            ("vit_config.json", {"num_hidden_layers", "image_size", "hidden_act"}),
            ("tokenizer_config.json", {"added_tokens_decoder", "eos_token", "tokenizer_class"}),
        ):
            expected, actual = (json.loads((folder / name).read_text()) for folder in (golden.checkpoint, written))
            assert {key: actual[key] for key in kept} == {key: expected[key] for key in kept}

    def test_settings_of_the_processor_are_kept(self, golden, tmp_path):
        model, processor = load_released(golden.checkpoint)
        changed = BagelProcessor(processor.tokenizer, generation_system_prompt="Plan first.", vae_max_size=512)
        save_released(model, changed, tmp_path / "released")
        loaded = load_released(tmp_path / "released")[1]
        assert (loaded.generation_system_prompt, loaded.vae_max_size) == ("Plan first.", 512)

    def test_merged_adapter_is_written(self, golden, tmp_path):
        model, processor = load_released(golden.checkpoint)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=LORA_TARGET_MODULES, init_lora_weights=False))
        with pytest.raises(ValueError, match="PeftModel: merge an adapter first"):
            save_released(adapted, processor, tmp_path / "released")
        with pytest.raises(ValueError, match="lacks language_model.*q_proj.*"):
            save_released(adapted.get_base_model(), processor, tmp_path / "released")
        assert not (tmp_path / "released").exists()
        merged = adapted.merge_and_unload()
        save_released(merged, processor, tmp_path / "released")
        original = load_file(golden.checkpoint / MODEL_WEIGHTS)[
            "language_model.model.layers.0.mlp_moe_gen.up_proj.weight"
        ]
        actual = load_released(tmp_path / "released")[0].language_model.model.layers[0].mlp_moe_gen.up_proj.weight
        assert torch.equal(actual, merged.language_model.model.layers[0].mlp_moe_gen.up_proj.weight)
        assert not torch.equal(actual, original.float())

    def test_what_has_no_place_is_refused(self, tiny_bagel, golden, tmp_path):
        model, processor = load_released(golden.checkpoint)
        shapes_model, shapes_processor = load_model("bagel-shapes")
        with pytest.raises(ValueError, match=re.escape("vae_config['norm_num_groups']=8 (it would be read as 32)")):
            save_released(shapes_model, shapes_processor, tmp_path / "released")
        model.config.connector_hidden_act = "silu"
        with pytest.raises(ValueError, match="connector_hidden_act='silu'"):
            save_released(model, processor, tmp_path / "released")
        assert not list(tmp_path.iterdir())
