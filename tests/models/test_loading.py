# SPDX-License-Identifier: Apache-2.0

"""[`load_model`]: what a folder lacks or has too much of, and ids of repositories on the Hub."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from alphagrpo_ext.models.bagel.checkpoint import RELEASED_FILES, load_released
from alphagrpo_ext.models.contract import FAMILIES, Family
from alphagrpo_ext.models.loading import PACKAGED_CHECKPOINTS, load_model, resolve_model_path
from alphagrpo_ext.models.saving import save_model
from alphagrpo_ext.registry import UnknownNameError


ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "someone/BAGEL-tiny"

LOAD_FROM_HUB = """
import sys
from alphagrpo_ext.models.contract import Family
from alphagrpo_ext.models.loading import load_model

model, processor = load_model(sys.argv[1], dtype="auto")
print("loaded", model.config._name_or_path, model.name_or_path, model.num_parameters())
"""


@pytest.fixture
def saved(tmp_path) -> Path:
    return Path(shutil.copytree(PACKAGED_CHECKPOINTS["bagel-shapes"], tmp_path / "saved"))


def cache_repository(cache: Path, files: Path, revision: str = "main") -> Path:
    """Lay a folder out as the Hub's cache holds a repository."""
    root = cache / f"models--{REPOSITORY.replace('/', '--')}"
    shutil.copytree(files, root / "snapshots" / COMMIT)
    (root / "refs").mkdir()
    (root / "refs" / revision).write_text(COMMIT)
    return root / "snapshots" / COMMIT


class TestSavedFolder:
    @pytest.mark.parametrize("name", Family.saved_files)
    def test_missing_file_is_named(self, saved, name):
        (saved / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"lacks {re.escape(name)}"):
            load_model(saved)

    def test_run_without_a_model_names_its_newest_checkpoint(self, saved, tmp_path):
        run = tmp_path / "run"
        for step in (9, 10):
            shutil.copytree(saved, run / f"checkpoint-{step}")
        (run / "checkpoint-11").mkdir()
        (run / "checkpoint-best").mkdir()
        with pytest.raises(
            FileNotFoundError, match=f"lacks config.json.*; its newest checkpoint is {run}/checkpoint-10:"
        ):
            load_model(run)

    def test_truncated_file_is_named(self, saved):
        path = saved / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match="model.safetensors is truncated or damaged"):
            load_model(saved)

    @pytest.mark.parametrize("fault", ["truncated", "missing"])
    def test_shard_is_named(self, golden, tmp_path, fault):
        save_model(*load_released(golden.checkpoint), tmp_path / "saved", max_shard_size="1MB")
        path = sorted((tmp_path / "saved").glob("model-*.safetensors"))[1]
        if fault == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:1000])
        error, message = {
            "missing": (FileNotFoundError, f"lacks {path.name}"),
            "truncated": (ValueError, f"{path.name} is truncated"),
        }[fault]
        with pytest.raises(error, match=message):
            load_model(tmp_path / "saved")

    @pytest.mark.parametrize("key", ["language_model.model.norm_moe_gen.weight", "vae.decoder.conv_out.bias"])
    @pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
    def test_weights_must_fit(self, saved, key, fault):
        weights = load_file(saved / "model.safetensors")
        if fault == "missing":
            del weights[key]
        elif fault == "extra":
            weights[f"{key}_extra"] = torch.zeros(1)
        else:
            weights[key] = weights[key][1:].clone()
        save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
        message = {
            "missing": f"it lacks {key}",
            "extra": f"it has {key}_extra, which the model does not have",
            "shape": rf"{key} has shape \(\d+,\) instead of \(\d+,\)",
        }[fault]
        with pytest.raises(ValueError, match=message):
            load_model(saved)


class TestFamily:
    def set_type(self, folder: Path, model_type: str) -> None:
        config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
        (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))

    def test_unknown_type_lists_the_known(self, saved):
        self.set_type(saved, "bagle")
        with pytest.raises(UnknownNameError, match="unknown model family 'bagle'. Did you mean 'bagel'?"):
            load_model(saved)

    def test_released_layout_is_recognised_beside_a_foreign_configuration(self, golden, tmp_path):
        folder = Path(shutil.copytree(golden.checkpoint, tmp_path / "released"))
        self.set_type(folder, "qwen2")
        assert load_model(folder)[0].config.model_type == "bagel"

    def test_unknown_lora_preset_lists_the_known(self):
        with pytest.raises(ValueError, match="BagelFamily has no LoRA preset 'all', available: both, generation"):
            FAMILIES.get("bagel")().lora_target_modules("all")


class TestHub:
    @pytest.fixture
    def cache(self, tmp_path, monkeypatch) -> Path:
        """The Hub's cache of a machine without network."""
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        return tmp_path / "cache"

    def test_released_layout_loads_from_the_cache(self, golden, cache):
        snapshot = cache_repository(cache, golden.checkpoint)
        assert resolve_model_path(REPOSITORY) == str(snapshot)
        model, processor = load_model(REPOSITORY)
        expected, _ = load_released(golden.checkpoint)
        for name, tensor in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        assert processor.generation_system_prompt
        # An adapter is to name the repository, and not a folder of this machine.
        assert model.name_or_path == model.config._name_or_path == REPOSITORY

    def test_other_layout_loads_from_the_cache(self, cache):
        cache_repository(cache, PACKAGED_CHECKPOINTS["bagel-shapes"])
        assert resolve_model_path(REPOSITORY) == REPOSITORY
        model, processor = load_model(REPOSITORY)
        expected, _ = load_model("bagel-shapes")
        assert torch.equal(model.llm2vae.weight, expected.llm2vae.weight)

    def test_revision(self, golden, cache):
        snapshot = cache_repository(cache, golden.checkpoint, revision="v2")
        assert resolve_model_path(REPOSITORY, "v2") == str(snapshot)
        with pytest.raises(FileNotFoundError, match=REPOSITORY):
            resolve_model_path(REPOSITORY)

    @pytest.mark.parametrize("name", [name for name in RELEASED_FILES if name != "llm_config.json"])
    def test_incomplete_cache_is_named(self, golden, cache, name):
        (cache_repository(cache, golden.checkpoint) / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"lacks {re.escape(name)}"):
            load_model(REPOSITORY)

    @pytest.mark.parametrize("name", ["bagel-shape", REPOSITORY, "not a name"])
    def test_unknown_name_says_what_there_is(self, cache, name):
        with pytest.raises(FileNotFoundError, match=rf"'{name}' is no packaged checkpoint \(bagel-shapes\)"):
            load_model(name)

    def test_misspelled_name_says_what_was_meant(self):
        with pytest.raises(FileNotFoundError, match="'bagel-shape' is no packaged .* Did you mean 'bagel-shapes'?"):
            load_model("bagel-shape")

    @pytest.mark.parametrize("name", ["/no/such/folder", "./folder", "runs/some/folder", "~/folder", "runs/nope"])
    def test_missing_folder_is_not_looked_up(self, name, unreachable_hub):
        with pytest.raises(FileNotFoundError, match=f"there is no folder {name}"):
            load_model(name)

    def test_neighbour_of_a_missing_folder_is_named(self, tmp_path, monkeypatch, unreachable_hub):
        monkeypatch.chdir(tmp_path)
        Path("models", "circles").mkdir(parents=True)
        Path("models", "circles.safetensors").touch()
        with pytest.raises(FileNotFoundError, match="as models is one, .* Did you mean models/circles?"):
            load_model("models/circle")
        with pytest.raises(FileNotFoundError, match="models/circles.safetensors is a file: give the folder"):
            load_model("models/circles.safetensors")

    @pytest.fixture
    def unreachable_hub(self, monkeypatch) -> None:
        """Fails the test if the Hub is asked."""

        def ask(*args, **kwargs):
            pytest.fail(f"the Hub was asked for {args}")

        monkeypatch.setattr("alphagrpo_ext.models.loading.hf_hub_download", ask)


@pytest.mark.parametrize("name", [None, "", 3])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(
        ValueError, match=rf"model_name_or_path must be a packaged name \(bagel-shapes\), .* but is {name!r}"
    ):
        load_model(name)


def test_unknown_data_type_is_named():
    with pytest.raises(ValueError, match="dtype must be the name of a data type of PyTorch, .* but is 'half16'"):
        load_model("bagel-shapes", dtype="half16")


class HubHandler(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as a download needs, over a folder."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args, files: Path, asked: list[str], **kwargs) -> None:
        self.files, self.asked = files, asked
        super().__init__(*args, **kwargs)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:  # noqa: N802  (named by the library)
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            entries = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}
                for file in sorted(self.files.iterdir())
            ]
            return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        if path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": file.name} for file in sorted(self.files.iterdir())]
            info = {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        file = self.files / path.rsplit("/", 1)[-1]
        if not file.exists():
            return self.answer(404, X_Error_Code="EntryNotFound")
        if self.command == "GET":
            self.asked.append(file.name)
        return self.answer(200, file.read_bytes(), ETag=f'"{file.name}"')

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        return


@pytest.fixture
def hub(golden, tmp_path) -> Iterator[tuple[str, list[str]]]:
    """Address of a server on this machine with a released repository, and the names of files that were fetched."""
    files = Path(shutil.copytree(golden.checkpoint, tmp_path / "repository"))
    # What a release may hold besides, and nobody needs here.
    for name in ("model.safetensors", "README.md", "pytorch_model.bin"):
        (files / name).write_bytes(b"not needed")
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(HubHandler, files=files, asked=asked))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.slow
@pytest.mark.low_priority
def test_download_takes_the_needed_files_alone_and_serves_later_loads(hub, tmp_path) -> None:
    address, asked = hub

    def load(**environment: str) -> str:
        command = [sys.executable, "-c", LOAD_FROM_HUB, REPOSITORY]
        settings = {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "cache")}
        result = subprocess.run(
            command, env=os.environ | settings | environment, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    loaded = load()
    assert loaded.startswith(f"loaded {REPOSITORY} {REPOSITORY} ")
    needed = {*RELEASED_FILES, "tokenizer.json", "vocab.json", "merges.txt"}
    assert set(asked) == needed
    asked.clear()
    assert load(HF_HUB_OFFLINE="1") == loaded
    assert not asked
