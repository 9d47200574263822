# SPDX-License-Identifier: Apache-2.0

"""The toy family, installed as a third party's package is: by an entry point."""

from pathlib import Path

import pytest
import torch

from alphagrpo_ext.models.contract import FAMILIES
from support.toy_family import ToyConfig, ToyModel


@pytest.fixture
def installed_toy_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a folder with the metadata of a package on the path, and forgets its family afterwards."""
    metadata = tmp_path / "site" / "toy_family-0.1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-family\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text("[alphagrpo_ext.models]\ntoy = support.toy_family:ToyFamily\n")
    monkeypatch.syspath_prepend(str(metadata.parent))
    monkeypatch.setattr(FAMILIES, "_objects", dict(FAMILIES._objects))


@pytest.fixture
def toy_model() -> ToyModel:
    """A model with random weights, the same at every call, in fp32 and evaluation mode."""
    torch.manual_seed(0)
    model = ToyModel(ToyConfig())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Of a size at which every weight matters.
            scale = 0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape) + (1 if "norm" in name else 0))
    return model.eval()
