# SPDX-License-Identifier: Apache-2.0

"""Folders that are written whole or not at all, and safetensors files."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphagrpo_ext.models.bagel import BagelConfig, BagelModel
from alphagrpo_ext.models.bagel.checkpoint import load_released, save_released
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.models.saving import check_free_space, save_model, staged_folder
from alphagrpo_ext.models.weight_files import read_tensors, write_tensors


ROOT = Path(__file__).parents[2]

KILLED_WHILE_WRITING = """
import os, signal, sys
from alphagrpo_ext.models.saving import staged_folder

with staged_folder(sys.argv[1]) as stage:
    (stage / "config.json").write_text("half of it")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """A process that may not write more than 100 kB into a file: what a full disk does, without filling one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class TestStagedFolder:
    def test_appears_when_it_is_complete(self, tmp_path):
        folder = tmp_path / "deep" / "folder"
        with staged_folder(folder) as stage:
            (stage / "config.json").write_text("{}")
            assert not folder.exists()
            assert stage.parent == folder.parent
        assert [path.name for path in folder.iterdir()] == ["config.json"]
        assert [path.name for path in folder.parent.iterdir()] == ["folder"]
        # As any folder of this user, and not private as temporary ones are.
        (tmp_path / "other").mkdir()
        assert folder.stat().st_mode == (tmp_path / "other").stat().st_mode

    def test_takes_the_place_of_an_empty_folder_behind_a_link(self, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "disk")
        with staged_folder(tmp_path / "link") as stage:
            (stage / "config.json").write_text("{}")
        assert (tmp_path / "disk" / "config.json").read_text() == "{}"
        assert (tmp_path / "link").is_symlink()

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_leaves_nothing_when_the_block_fails(self, tmp_path, error):
        with pytest.raises(error):
            with staged_folder(tmp_path / "folder") as stage:
                (stage / "config.json").write_text("{}")
                raise error
        assert not list(tmp_path.iterdir())

    def test_refuses_a_folder_with_files(self, tmp_path):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "precious").write_text("data")
        with pytest.raises(FileExistsError, match="folder has files"):
            with staged_folder(tmp_path / "folder"):
                pytest.fail("the block must not run")
        with pytest.raises(FileExistsError, match="precious is a file"):
            with staged_folder(tmp_path / "folder" / "precious"):
                pytest.fail("the block must not run")
        assert [path.name for path in tmp_path.rglob("*")] == ["folder", "precious"]

    def test_does_not_overwrite_what_came_meanwhile(self, tmp_path):
        with pytest.raises(OSError):
            with staged_folder(tmp_path / "folder") as stage:
                (stage / "config.json").write_text("{}")
                (tmp_path / "folder").mkdir()
                (tmp_path / "folder" / "precious").write_text("data")
        assert [path.name for path in tmp_path.rglob("*")] == ["folder", "precious"]

    def test_killed_process_leaves_no_folder(self, tmp_path):
        command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path / "folder")]
        result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300)
        assert result.returncode == -signal.SIGKILL
        (left,) = tmp_path.iterdir()
        assert left.name.startswith(".folder.")
        assert left.name.endswith(".tmp")
        with staged_folder(tmp_path / "folder"):
            pass
        assert (tmp_path / "folder").is_dir()

    def test_free_space_is_checked_first(self, tmp_path):
        check_free_space(tmp_path / "not" / "there", 1)
        with pytest.raises(
            OSError, match=r"folder needs 1000000000.00 GB, but its disk has \d+\.\d\d GB free"
        ) as info:
            with staged_folder(tmp_path / "folder", num_bytes=10**18):
                pytest.fail("the block must not run")
        assert info.value.errno == errno.ENOSPC
        assert not list(tmp_path.iterdir())


class TestFullDisk:
    def test_too_large_a_model_is_refused_before_writing(self, golden, tmp_path):
        config, processor = BagelConfig.from_dict(load_released(golden.checkpoint)[0].config.to_dict()), None
        config.text_config.vocab_size = 2**45
        with torch.device("meta"):
            model = BagelModel(config)
        for save in (save_released, save_model):
            with pytest.raises(OSError, match="GB free: make room"):
                save(model, processor, tmp_path / "saved")
            assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("save", [save_released, save_model])
    def test_nothing_half_written_is_left(self, golden, tmp_path, save, small_files_only):
        model, processor = load_released(golden.checkpoint, torch.bfloat16)
        with pytest.raises(Exception, match="(?i)file too large"):
            save(model, processor, tmp_path / "saved")
        assert not list(tmp_path.iterdir())


class TestSaveModel:
    def test_shards_load_again(self, golden, tmp_path):
        model, processor = load_released(golden.checkpoint, torch.bfloat16)
        save_model(model, processor, tmp_path / "saved", max_shard_size="1MB")
        assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 2
        loaded, loaded_processor = load_model(tmp_path / "saved", dtype=torch.bfloat16)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded_processor.to_dict() == processor.to_dict()


class TestWeightFiles:
    TENSORS = {
        "b": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "a": torch.randn(3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
        "é": torch.randn(5, 7, generator=torch.Generator().manual_seed(1)),
        "scalar": torch.tensor(2.5),
        "transposed": torch.arange(6.0, dtype=torch.float64).view(2, 3).T,
        "empty": torch.empty(0, 3),
        "half": torch.ones(3, dtype=torch.float16),
    }

    def test_written_file_reads_as_that_of_the_library(self, tmp_path):
        write_tensors(tmp_path / "ours", self.TENSORS)
        save_file({name: tensor.contiguous() for name, tensor in self.TENSORS.items()}, tmp_path / "theirs")
        expected, actual = load_file(tmp_path / "theirs"), load_file(tmp_path / "ours")
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert actual[name].dtype == tensor.dtype
            assert torch.equal(actual[name], tensor)

    def test_trained_parameters_are_written(self, tmp_path):
        weight = torch.nn.Parameter(torch.ones(2, 2))
        write_tensors(tmp_path / "file", {"weight": weight})
        assert torch.equal(load_file(tmp_path / "file")["weight"], weight)

    def test_unknown_type_is_named(self, tmp_path):
        with pytest.raises(ValueError, match="steps is of type torch.int64"):
            write_tensors(tmp_path / "file", {"steps": torch.arange(3)})
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("remap_bytes", [1, 10**9])
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
    def test_reads_every_tensor_once(self, tmp_path, monkeypatch, remap_bytes, dtype):
        monkeypatch.setattr("alphagrpo_ext.models.weight_files.REMAP_BYTES", remap_bytes)
        write_tensors(tmp_path / "file", self.TENSORS)
        names, tensors = zip(*read_tensors(tmp_path / "file", dtype), strict=True)
        assert sorted(names) == sorted(self.TENSORS)
        for name, tensor in zip(names, tensors, strict=True):
            assert torch.equal(tensor, self.TENSORS[name].to(dtype or self.TENSORS[name].dtype)), name
            assert tensor.dtype == (dtype or self.TENSORS[name].dtype)
