# SPDX-License-Identifier: Apache-2.0

"""The released layout of Cosmos3, which Diffusers and Transformers read as well."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import Cosmos3OmniPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from alphagrpo_ext.models.cosmos3 import Cosmos3Processor
from alphagrpo_ext.models.cosmos3.released import checkpoint
from alphagrpo_ext.models.cosmos3.released.checkpoint import (
    load_cosmos3,
    load_cosmos3_processor,
    matches,
    save_cosmos3,
)
from alphagrpo_ext.models.loading import find_family, load_model
from models.cosmos3.tiny_cosmos3 import (
    VARIANTS,
    References,
    make_tiny_model,
    tiny_config,
    vision_state,
    write_released_folder,
)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, References]]:
    """A released folder of each variant, and the library models that it was written from."""
    root = tmp_path_factory.mktemp("released")
    return {variant: (root / variant, write_released_folder(root / variant, variant)) for variant in VARIANTS}


@pytest.fixture
def damaged(released: dict[str, tuple[Path, References]], tmp_path: Path) -> Callable[[str], Path]:
    """Copies a released folder, for a test to damage."""
    return lambda variant="omni": Path(shutil.copytree(released[variant][0], tmp_path / "checkpoint"))


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def first_shard(folder: Path) -> Path:
    return sorted((folder / "transformer").glob("*.safetensors"))[0]


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)]
    assert not different


def part(model: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in model.state_dict().items() if name.startswith(prefix)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_goes_through_ours_to_both_libraries(
    released: dict[str, tuple[Path, References]], variant: str, tmp_path: Path
) -> None:
    folder, references = released[variant]
    assert matches(folder)
    model, processor = load_cosmos3(folder)
    assert_equal(part(model, "transformer."), references.transformer.state_dict())
    assert_equal(part(model, "autoencoder.vae."), references.autoencoder.state_dict())
    tower = {f"model.{name}": tensor for name, tensor in part(model, "vision.").items()}
    prefix = "model.visual." if variant == "omni" else ""
    assert_equal(
        {name.removeprefix(prefix): t for name, t in tower.items()}, vision_state(references.reasoner, variant)
    )
    assert model.config.timestep_shift == 3.0
    assert processor.use_system_prompt is (variant == "omni")

    save_cosmos3(model, processor, tmp_path / "saved")
    pipeline = Cosmos3OmniPipeline.from_pretrained(tmp_path / "saved", enable_safety_checker=False)
    assert_equal(pipeline.transformer.state_dict(), references.transformer.state_dict())
    assert_equal(pipeline.vae.state_dict(), references.autoencoder.state_dict())
    original = Cosmos3OmniPipeline.from_pretrained(folder, enable_safety_checker=False)
    for name in ("transformer", "vae", "scheduler"):
        given, kept = dict(getattr(original, name).config), dict(getattr(pipeline, name).config)
        assert {n: v for n, v in kept.items() if n[0] != "_"} == {n: v for n, v in given.items() if n[0] != "_"}
    settings = ("default_use_system_prompt", "use_native_flow_schedule")
    assert [pipeline.config[name] for name in settings] == [original.config[name] for name in settings]
    arguments = {"prompt": "a é <b>", "num_frames": 1, "height": 64, "width": 96}
    assert pipeline.tokenize_prompt(**arguments) == original.tokenize_prompt(**arguments)

    reasoner, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    assert type(reasoner) is type(references.reasoner)
    assert_equal(reasoner.state_dict(), references.reasoner.state_dict())
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "é?"}]}]
    texts = [
        AutoTokenizer.from_pretrained(path).apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for path in (folder, tmp_path / "saved")
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", Cosmos3Processor.number_ranges)
def test_impossible_number_of_a_saved_processor_is_named(damaged: Callable[..., Path], name: str) -> None:
    folder = damaged()
    for value in (float("nan"), "24", -1, 12.5, None):
        (folder / checkpoint.PROCESSOR_SETTINGS).write_text(json.dumps({name: value}))
        with pytest.raises(
            ValueError, match=f"^{name} in {folder / checkpoint.PROCESSOR_SETTINGS} must .* is {value!r}"
        ):
            load_cosmos3_processor(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_folder_is_read_back(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, released: dict[str, tuple[Path, References]]
) -> None:
    """A model that was made here and not loaded, in several shards, with other settings of the processor."""
    model = make_tiny_model(variant)
    processor = load_cosmos3_processor(released[variant][0])
    processor.min_pixels, processor.use_system_prompt = 1024, variant != "omni"
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 300_000)
    save_cosmos3(model, processor, tmp_path / "saved")
    assert len(list((tmp_path / "saved" / "transformer").glob("*.safetensors"))) > 2
    back, back_processor = load_cosmos3(tmp_path / "saved")
    assert_equal(back.state_dict(), model.state_dict())
    assert (back_processor.min_pixels, back_processor.use_system_prompt) == (1024, variant != "omni")
    kept = {name for name, value in model.config.to_dict().items() if back.config.to_dict()[name] == value}
    # The folder also states defaults that ours had left out.
    assert kept >= set(model.config.to_dict()) - {
        *("transformer_config", "autoencoder_config", "vision_config", "pipeline_config", "scheduler_config"),
        # Only Edge has a projector.
        *(("projector_hidden_size",) if variant == "omni" else ()),
        *("architectures", "dtype", "_name_or_path"),
    }
    reasoner = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert torch.equal(reasoner.state_dict()["lm_head.weight"], model.transformer.lm_head.weight)


def test_data_types(tmp_path: Path) -> None:
    """Autoencoder and embedding of time are fp32 in a model of any type, with the exact values of the file."""
    references = write_released_folder(tmp_path / "bf16", "edge", dtype=torch.bfloat16)
    references.transformer.time_embedder.float()
    for dtype, expected in ((None, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)):
        model, _ = load_cosmos3(tmp_path / "bf16", dtype)
        for name, tensor in model.state_dict().items():
            keeps = name.startswith(("autoencoder.", "transformer.time_embedder."))
            assert tensor.dtype == (torch.float32 if keeps else expected), name
    wide = write_released_folder(tmp_path / "fp32", "edge")
    model, _ = load_cosmos3(tmp_path / "fp32", torch.bfloat16)
    assert_equal(part(model, "transformer.time_embedder."), wide.transformer.time_embedder.state_dict())


def test_only_what_is_trained_has_a_gradient(released: dict[str, tuple[Path, References]]) -> None:
    model, _ = load_cosmos3(released["omni"][0])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    expected = {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("autoencoder.", "transformer.action_", "transformer.audio_"))
    }
    assert frozen == expected
    assert {"transformer.action_modality_embed", "transformer.action_proj_in.fc.weight"} < frozen


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tower_of_a_loaded_model_sees_as_the_library_does(
    released: dict[str, tuple[Path, References]], variant: str
) -> None:
    """Buffers that are in no file are made again after a load."""
    model, _ = load_cosmos3(released[variant][0])
    assert not [name for name, buffer in model.named_buffers() if buffer.is_meta]
    pixels = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows, grid = model.vision.patch_rows(pixels), torch.tensor([[1, 4, 6]])
    with torch.no_grad():
        features, _ = model.vision([pixels])
        theirs = released[variant][1].reasoner.model.get_image_features(pixel_values=rows, image_grid_thw=grid)
    assert (features - torch.cat(list(theirs.pooler_output))).abs().max() < 1e-6


def test_a_pipeline_without_a_reasoner_has_no_vision_tower(damaged: Callable[..., Path], tmp_path: Path) -> None:
    folder = damaged("edge")
    pipeline = Cosmos3OmniPipeline.from_pretrained(folder, enable_safety_checker=False)
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert matches(tmp_path / "pipeline")
    model, processor = load_cosmos3(tmp_path / "pipeline")
    assert model.vision is None
    save_cosmos3(model, processor, tmp_path / "saved")
    assert not (tmp_path / "saved" / "config.json").exists()
    back, _ = load_cosmos3(tmp_path / "saved")
    assert_equal(back.state_dict(), model.state_dict())


MISSING = (
    *("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"),
    *("config.json", "text_tokenizer/tokenizer.json", "vision_encoder/model.safetensors"),
    *("transformer/diffusion_pytorch_model-00002-of-00004.safetensors",),
)


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_component_is_named(damaged: Callable[..., Path], name: str) -> None:
    folder = damaged()
    (folder / name).unlink()
    assert matches(folder)
    with pytest.raises(FileNotFoundError, match=name):
        load_cosmos3(folder)


def test_a_reasoner_without_its_generator_is_refused(damaged: Callable[..., Path]) -> None:
    folder = damaged()
    for name in ("transformer", "vae", "scheduler"):
        shutil.rmtree(folder / name)
    (folder / "model_index.json").unlink()
    assert matches(folder)
    for load in (load_cosmos3, load_model):
        with pytest.raises(FileNotFoundError, match="reasoner of Cosmos3 without its generator"):
            load(folder)


def quantize(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("to_q.weight"))
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[name.replace("weight", "weight_scale")] = torch.ones(1)


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.0.self_attn.to_k.weight"][0, 0] = float("nan")


WEIGHTS = {
    "quantized": (quantize, "is of type F8_E4M3.*quantized model must be converted"),
    "NaN": (spoil, r"layers\.0\.self_attn\.to_k\.weight .* NaN"),
    "missing": (lambda tensors: tensors.pop("layers.0.self_attn.to_k.weight"), r"lacks layers\.0\.self_attn\.to_k"),
    "left over": (lambda tensors: tensors.update(extra=torch.ones(2)), "has extra, which the model does not have"),
    "shape": (
        lambda tensors: tensors.update({"layers.0.self_attn.to_k.weight": torch.ones(2, 3)}),
        r"to_k\.weight in transformer has shape \(2, 3\) instead of \(32, 64\)",
    ),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_wrong_weights_are_refused_before_they_are_read(
    damaged: Callable[..., Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = damaged()
    monkeypatch.setattr(checkpoint, "read_tensors", lambda *_: pytest.fail("weights were read"))
    edit_weights(first_shard(folder), WEIGHTS[kind][0])
    with pytest.raises(ValueError, match=WEIGHTS[kind][1]):
        load_cosmos3(folder)


def test_a_truncated_file_is_refused(damaged: Callable[..., Path]) -> None:
    folder = damaged()
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{path.name} is truncated or damaged"):
        load_cosmos3(folder)


CONFIGS = {
    "other class": ("model_index.json", {"_class_name": "WanPipeline"}, "is of a WanPipeline"),
    "other transformer": ("transformer/config.json", {"_class_name": "WanTransformer"}, "is of a WanTransformer"),
    "quantized": ("transformer/config.json", {"quantization_config": {"quant_method": "x"}}, "quantization_config"),
    "other variant": ("config.json", {"model_type": "cosmos3_edge"}, "cosmos3_edge.*belong to different models"),
    "activation": ("transformer/config.json", {"hidden_act": "gelu"}, "hidden_act='gelu'.*no variant"),
    "no layers": ("transformer/config.json", {"num_hidden_layers": 0}, r"num_hidden_layers in .* must be .*0"),
    "layers": ("transformer/config.json", {"num_hidden_layers": 4}, "num_hidden_layers=3 .* differs from 4"),
    "heads": ("transformer/config.json", {"num_key_value_heads": 3}, "no multiple of num_key_value_heads=3|differs"),
    "axes": ("transformer/config.json", {"rope_axes_dim": [4, 4, 4]}, "rope_axes_dim"),
    "rows": ("transformer/config.json", {"unified_3d_mrope_reset_spatial_ids": False}, "reset_spatial_ids .* true"),
    "latents": ("vae/config.json", {"z_dim": 8}, "z_dim=8 .* latent_channel=16"),
    "deviations": ("vae/config.json", {"latents_std": [0.0] * 16}, "latents_std .* positive"),
    "token": ("config.json", {"image_token_id": 5}, "image_token_id=5 .* differs from 261"),
    "pixels": ("preprocessor_config.json", {"image_mean": [0.4, 0.5, 0.5]}, "image_mean"),
    "areas": (
        "preprocessor_config.json",
        {"size": {"shortest_edge": -1, "longest_edge": 9}},
        "min_pixels in .*preprocessor_config.json must not be negative, but is -1",
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_wrong_configurations_are_refused(
    damaged: Callable[..., Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = damaged()
    monkeypatch.setattr(checkpoint, "read_tensors", lambda *_: pytest.fail("weights were read"))
    name, values, message = CONFIGS[kind]
    edit_json(folder / name, **values)
    with pytest.raises(ValueError, match=message):
        load_cosmos3(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_configuration_is_read_without_weights(
    variant: str, released: dict[str, tuple[Path, References]], damaged: Callable[..., Path]
) -> None:
    expected = load_model(released[variant][0])[0].config.to_dict()
    folder = damaged(variant)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    config = find_family(str(folder)).load_config(str(folder)).to_dict()
    names = config.keys() - {"_name_or_path", "dtype", "architectures"}
    assert {name: config[name] for name in names} == {name: expected[name] for name in names}
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="lacks vae/config.json"):
        find_family(str(folder)).load_config(str(folder))


def test_an_adapter_has_no_place(tmp_path: Path, released: dict[str, tuple[Path, References]]) -> None:
    model, processor = load_cosmos3(released["omni"][0])
    adapted = get_peft_model(model, LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        save_cosmos3(adapted, processor, tmp_path / "saved")
    with pytest.raises(ValueError, match="do not fit its configuration"):
        save_cosmos3(adapted.base_model.model, processor, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_karras_sigmas_hide_the_shift_of_the_scheduler(damaged: Callable[..., Path]) -> None:
    folder = damaged("edge")
    index = json.loads((folder / "model_index.json").read_text())
    del index["native_flow_shift"]
    (folder / "model_index.json").write_text(json.dumps(index))
    edit_json(folder / "scheduler" / "scheduler_config.json", flow_shift=5.0)
    assert load_cosmos3(folder)[0].config.timestep_shift == 5.0
    edit_json(folder / "scheduler" / "scheduler_config.json", use_karras_sigmas=True)
    assert load_cosmos3(folder)[0].config.timestep_shift == tiny_config("edge").timestep_shift == 3.0
