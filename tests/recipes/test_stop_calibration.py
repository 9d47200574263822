# SPDX-License-Identifier: Apache-2.0

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.rollout import RolloutConfig
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.rollout.stopping import saved_threshold
from alphagrpo_ext.shapes.prompts import build_dataset
from recipe_tools.evaluation.calibration import calibrate, save_threshold
from reward_models.dvreward import DVReward


CONFIG = RolloutConfig(24, 24, max_new_tokens=40, temperature=0.0, denoising=DenoisingConfig(5, 1.0))
CONFIGS = {"reasoning_t2i": CONFIG, "self_reflection": CONFIG}


def test_a_threshold_is_calibrated_and_kept_with_the_model(tmp_path: Path) -> None:
    model, processor = load_model("bagel-shapes", attn_implementation="eager")
    rows = list(build_dataset("train", 6, seed=0))
    result = calibrate(model.eval(), processor, rows, CONFIGS, DVReward("shapes"), range(2), batch_size=5)
    assert result.num_images == 12 and 0 <= result.threshold <= 1
    assert result.calibrated >= max(result.never, result.always)
    assert f"stop_threshold {result.threshold:.4f} from 12 images" in str(result)

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    save_threshold(tmp_path, model, result.threshold)
    after = json.loads((tmp_path / "config.json").read_text())
    assert after.pop("sampling") == {**before.pop("sampling"), "stop_threshold": result.threshold}
    assert after == before
    assert saved_threshold(load_model(tmp_path)[0]) == result.threshold


def test_a_model_without_verdicts_is_refused(
    make_shapes_bagel: Callable[[], BagelModel], shapes_processor: BagelProcessor
) -> None:
    rows = list(build_dataset("train", 2, seed=0))
    with pytest.raises(ValueError, match="has not learned to give a verdict"):
        calibrate(make_shapes_bagel(), shapes_processor, rows, CONFIGS, DVReward("shapes"), range(1), batch_size=2)
