# SPDX-License-Identifier: Apache-2.0

"""The conformance suite on the families of this repository: BAGEL, and the toy family as a third party's."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.models.saving import save_model
from models.conformance import FamilyCase, FamilyConformance
from support.toy_family import ToyModel, make_toy_processor
from support.trainers import make_trainer  # noqa: F401


class TestBagel(FamilyConformance):
    @pytest.fixture
    def case(self, make_shapes_bagel: Callable[[], BagelModel], shapes_processor: BagelProcessor) -> FamilyCase:
        processor = copy.deepcopy(shapes_processor)
        return FamilyCase(make_shapes_bagel(), processor, size=(16, 24))


@pytest.mark.usefixtures("installed_toy_family")
class TestToyFamily(FamilyConformance):
    @pytest.fixture
    def case(self, toy_model: ToyModel) -> FamilyCase:
        return FamilyCase(toy_model, make_toy_processor(), size=(8, 12))

    def test_loads_by_the_name_of_its_entry_point_and_trains(
        self,
        toy_model: ToyModel,
        make_trainer: Callable,  # noqa: F811
        tmp_path: Path,
    ) -> None:
        save_model(toy_model, make_toy_processor(), tmp_path / "toy")
        trainer = make_trainer(
            model=str(tmp_path / "toy"),
            image_height=8,
            image_width=8,
            cfg_text_scale=2.0,
            max_steps=3,
            output_dir=str(tmp_path / "run"),
        )
        assert type(trainer.model) is ToyModel
        trainer.train()
        ratios = [entry["image/ratio_mean"] for entry in trainer.state.log_history if "image/ratio_mean" in entry]
        assert ratios == pytest.approx([1.0] * 3, abs=1e-4)
        before = load_model(tmp_path / "toy")[0].state_dict()
        unchanged = [name for name, value in trainer.model.state_dict().items() if torch.equal(value, before[name])]
        assert unchanged == ["autoencoder"]
