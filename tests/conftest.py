# SPDX-License-Identifier: Apache-2.0

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alphagrpo_ext.models.bagel import BagelConfig, BagelModel, BagelProcessor
from alphagrpo_ext.shapes.model import build_config, build_processor
from support.golden_io import Golden


def pytest_configure() -> None:
    # Threads that wait for each other on busy cores cost more than they bring. Processes that tests start inherit it.
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def golden() -> Golden:
    """The recorded tensors in the folder `ALPHAGRPO_GOLDEN_DIR`, by default those beside the tests."""
    return Golden(os.environ.get("ALPHAGRPO_GOLDEN_DIR", Path(__file__).parent / "golden"))


@pytest.fixture(scope="session")
def shapes_processor() -> BagelProcessor:
    """Tokenizer and image transforms of the shapes world."""
    return build_processor()


@pytest.fixture(scope="session")
def make_shapes_bagel(shapes_processor: BagelProcessor) -> Callable[[], BagelModel]:
    """
    Builds a BAGEL for the shapes world with two layers and random weights, the same at every call: in fp32 and
    evaluation mode. Nothing is learned, so nothing depends on how good a checkpoint is.
    """
    config = build_config(shapes_processor.tokenizer).to_dict()
    config["text_config"] |= {"num_hidden_layers": 2, "layer_types": None}

    def make() -> BagelModel:
        model = BagelModel(BagelConfig.from_dict(config))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Of a size at which every weight matters: the initial velocity, for one, is not 0.
                scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
                noise = scale * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise + (1 if "norm" in name and name.endswith("weight") else 0))
        return model.eval()

    return make
