# SPDX-License-Identifier: Apache-2.0

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from alphagrpo_ext.shapes.editing import editing_rows
from reward_models.evaluation.settings_digest import settings_digest


@pytest.mark.slow
def test_digest_of_images_is_the_same_in_every_process() -> None:
    code = "from alphagrpo_ext.shapes.editing import editing_rows\n"
    code += "from reward_models.evaluation.settings_digest import settings_digest\n"
    code += "print(settings_digest('model', editing_rows(4, seed=0)))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == settings_digest("model", editing_rows(4, seed=0))


def test_digest_tells_pixels_and_fields_apart() -> None:
    @dataclass
    class Settings:
        image: Image.Image
        sizes: tuple[int, ...] = (1, 2)

    red, other = Image.new("RGB", (3, 2), "red"), Image.new("RGB", (3, 2), (255, 0, 1))
    assert settings_digest(Settings(red)) == settings_digest(Settings(red.copy()))
    digests = {settings_digest(s) for s in (Settings(red), Settings(other), Settings(red, (1,)), {"image": red})}
    assert len(digests) == 4


def test_digest_of_what_only_has_an_address_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        settings_digest({"judge": object()})
