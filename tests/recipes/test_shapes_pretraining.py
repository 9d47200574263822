# SPDX-License-Identifier: Apache-2.0

import random
from collections import Counter

import pytest

from alphagrpo_ext.shapes.prompts import split_of
from recipe_tools.shapes_pretraining.examples import sample_pretraining_spec


def test_pretraining_mixes_in_rare_combinations():
    rng = random.Random(0)
    specs = [sample_pretraining_spec(rng) for _ in range(4000)]
    splits = Counter(map(split_of, specs))
    assert set(splits) == {"train", "rare"}
    assert splits["rare"] / len(specs) == pytest.approx(0.03, abs=0.01)
    assert min(Counter(spec.category for spec in specs).values()) > 0.12 * len(specs)
