# SPDX-License-Identifier: Apache-2.0

"""`recipes/convert_checkpoint.py`: from the released layout, back to it, and what it refuses."""

import resource
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import Cosmos3OmniPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from alphagrpo_ext.models.adapters import save_adapter
from alphagrpo_ext.models.bagel import LORA_TARGET_MODULES, BagelModel
from alphagrpo_ext.models.bagel.checkpoint import MODEL_WEIGHTS, VAE_WEIGHTS, load_released
from alphagrpo_ext.models.loading import load_model
from models.cosmos3.tiny_cosmos3 import write_released_folder


RECIPE = Path(__file__).parents[2] / "recipes" / "convert_checkpoint.py"

Convert = Callable[..., None]


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Convert:
    """Runs the recipe as from a command line."""

    def run(source: Path | str, layout: str, output: Path, *more: str) -> None:
        arguments = ["--model_name_or_path", str(source), "--layout", layout, "--output_dir", str(output), *more]
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *arguments])
        runpy.run_path(str(RECIPE), run_name="__main__")

    return run


def test_both_ways_keep_every_bit(convert: Convert, golden, tmp_path: Path) -> None:
    convert(golden.checkpoint, "pretrained", tmp_path / "pretrained", "--max_shard_size", "1MB")
    assert len(list((tmp_path / "pretrained").glob("model-*.safetensors"))) > 1
    model = BagelModel.from_pretrained(tmp_path / "pretrained")
    expected, _ = load_released(golden.checkpoint)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name].float(), tensor.float()), name

    convert(tmp_path / "pretrained", "released", tmp_path / "released")
    for file in (MODEL_WEIGHTS, VAE_WEIGHTS):
        original, back = load_file(golden.checkpoint / file), load_file(tmp_path / "released" / file)
        assert back.keys() == original.keys()
        for name, tensor in original.items():
            assert torch.equal(back[name].float(), tensor.float()), name
    assert back[name].dtype == torch.float32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pretrained", "released"]


def test_dtype_is_that_of_all_but_the_autoencoder(convert: Convert, golden, tmp_path: Path) -> None:
    convert(golden.checkpoint, "released", tmp_path / "released", "--dtype", "bfloat16")
    for file, dtype in ((MODEL_WEIGHTS, torch.bfloat16), (VAE_WEIGHTS, torch.float32)):
        assert {tensor.dtype for tensor in load_file(tmp_path / "released" / file).values()} == {dtype}


def test_adapter_is_merged(convert: Convert, golden, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=LORA_TARGET_MODULES, init_lora_weights=False)
    adapted = get_peft_model(load_released(golden.checkpoint)[0], config)
    save_adapter(adapted, tmp_path / "adapter")
    convert(tmp_path / "adapter", "released", tmp_path / "merged", "--dtype", "float32")
    expected, (merged, _) = adapted.merge_and_unload().state_dict(), load_model(tmp_path / "merged")
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)
    original, _ = load_released(golden.checkpoint)
    changed = [name for name, tensor in original.state_dict().items() if not torch.equal(tensor, expected[name])]
    assert len(changed) == 2 * 2 * 7


def refusal(capsys: pytest.CaptureFixture[str], convert: Convert, *arguments: Path | str) -> str:
    """What the recipe prints of an error in its arguments."""
    with pytest.raises(SystemExit) as stop:
        convert(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("variant", ["omni", "edge"])
def test_cosmos3_goes_both_ways_and_takes_an_adapter(convert: Convert, tmp_path: Path, variant: str) -> None:
    references = write_released_folder(tmp_path / "source", variant, dtype=torch.bfloat16)
    convert(tmp_path / "source", "pretrained", tmp_path / "pretrained")
    convert(tmp_path / "pretrained", "released", tmp_path / "released")
    back = Cosmos3OmniPipeline.from_pretrained(tmp_path / "released", enable_safety_checker=False)
    for name, tensor in references.transformer.state_dict().items():
        assert torch.equal(back.transformer.state_dict()[name].float(), tensor.float()), name

    model, _ = load_model(tmp_path / "source", dtype=torch.float32)
    targets = model.family.lora_target_modules("both")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    save_adapter(adapted, tmp_path / "adapter")
    convert(tmp_path / "adapter", "released", tmp_path / "merged", "--dtype", "float32")
    expected, (merged, _) = adapted.merge_and_unload().state_dict(), load_model(tmp_path / "merged")
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)
    changed = [
        name
        for name, tensor in references.transformer.state_dict().items()
        if not torch.equal(tensor.float(), expected[f"transformer.{name}"])
    ]
    # Of three layers: four projections of each stream, and each stream's MLP of three or of two matrices.
    assert len(changed) == 3 * 2 * (4 + (3 if variant == "omni" else 2))


def test_folder_with_files_is_refused_before_reading(
    convert: Convert, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "precious").write_text("data")
    assert "output has files" in refusal(capsys, convert, tmp_path / "no_checkpoint", "released", tmp_path / "output")
    assert (tmp_path / "output" / "precious").read_text() == "data"


@pytest.mark.parametrize("layout", ["pretrained", "released"])
def test_failed_conversion_leaves_nothing(convert: Convert, golden, tmp_path: Path, layout: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(Exception, match="(?i)file too large"):
            convert(golden.checkpoint, layout, tmp_path / "output")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_arguments_are_checked(convert: Convert, golden, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    error = refusal(capsys, convert, golden.checkpoint, "saved", tmp_path / "output")
    assert (
        error
        == "convert_checkpoint.py: error: layout must be one of pretrained, released, but is 'saved' (ValueError)\n"
    )
    error = refusal(capsys, convert, golden.checkpoint, "released", tmp_path / "output", "--dtype", "int8")
    assert "dtype must be one of" in error and "but is 'int8'" in error
    with pytest.raises(ValueError, match="no place for .*norm_num_groups"):
        convert("bagel-shapes", "released", tmp_path / "output")
    assert not list(tmp_path.iterdir())
